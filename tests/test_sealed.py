"""Promise 3: nothing of the test split reaches a tokenizer, checkpoint, validation row or ranking."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from raylab.results.queries import open_tables
from raylab.results.ranking import list_cells, rank_arms
from raylab.results.tables import OF_A_RUN
from raylab.runs.preparation import name_point, prepare
from raylab.runs.progress import SweepProgress
from raylab.runs.sweep import run_job


@pytest.fixture(scope="module")
def changed_notes(notes, make_job, tmp_path_factory):
    """The notes with the test rows' labels permuted and their texts replaced."""
    table = pq.read_table(notes / "notes.parquet")
    split = prepare(make_job(), tmp_path_factory.mktemp("unused")).split(0)
    texts = set(split.sealed["documents"]["text"].to_pylist())
    is_test = np.array([text in texts for text in table["text"].to_pylist()])
    assert 10 < is_test.sum() < len(table)
    rng = np.random.default_rng(0)
    for column in ("condition", "severity", "category"):
        values = np.array(table[column].to_pylist(), dtype=object)
        values[is_test] = rng.permutation(values[is_test])
        table = table.set_column(table.schema.get_field_index(column), column, pa.array(values.tolist()))
    words = [f"quite other words {row} Ωμέγα" if test else None for row, test in enumerate(is_test)]
    replaced = pc.coalesce(pa.array(words, pa.string()), table["text"].cast(pa.string()))
    table = table.set_column(table.schema.get_field_index("text"), "text", replaced)
    folder = tmp_path_factory.mktemp("changed")
    pq.write_table(table, folder / "notes.parquet")
    return folder / "notes.parquet"


def run(job, results):
    run_job(job, results, SweepProgress(Console(quiet=True)), here=True)
    base, _ = name_point(prepare(job, results), {})
    connection = open_tables(results)
    return {
        "scores": connection.execute(
            "select * exclude (job, train_seconds) from scores where split = 'validation' order by all"
        ).fetchall(),
        "geometry": connection.execute("select * exclude (job) from geometry order by all").fetchall(),
        "curves": connection.execute(
            f"select * exclude (job) from curves where metric not in {OF_A_RUN} order by all"
        ).fetchall(),
        "trials": connection.execute(
            "select trial_id, arm, status, target_values, data_digest from trials order by all"
        ).fetchall(),
        "ranking": [rank_arms(results, job, *cell, base) for cell in list_cells(job)],
        "files": {
            file.relative_to(results): file.read_bytes()
            for pattern in ("tokenizer-*/*", "pretrain-*/**/*.safetensors", "tokens-*/*.arrow", "corpus-*/*.arrow")
            for file in sorted(results.glob(f"_stages/{pattern}"))
            if file.name != "stage.json"
        },
    }


@pytest.mark.slow
def test_test_rows_change_nothing(make_job, notes, changed_notes, tmp_path):
    space = {"pretrain.objective": {"choices": ["none", "mlm", "declutr", "metadata"]}}
    changes = {
        "pretrain.metadata": {"field": "category"},
        "search": {"space": space, "targets": [{"task": "severity"}]},
    }
    found = []
    for name, path in (("first", notes / "notes.parquet"), ("second", changed_notes)):
        place = {
            "corpus.documents": {"path": str(path)},
            "corpus.tasks": {t: {"path": str(path)} for t in ("condition", "severity")},
        }
        found.append(run(make_job("declutr", {**changes, **place, "pretrain.objective": "mlm"}), tmp_path / name))
    first, second = found
    assert len(first["files"]) >= 10
    for key in first:
        # NaN is not equal to itself; as text it is.
        assert str(first[key]) == str(second[key]), key
