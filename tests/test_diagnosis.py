"""`diagnose`: embeddings of known faults, measured and written as trials do, are called what they are."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from raylab.base.mistakes import JobError
from raylab.cli import main
from raylab.measures.geometry import Options, measure_geometry
from raylab.results.tables import now, write_rows
from raylab.statistics.diagnosis import SIGNATURES, diagnose_job

OPTIONS = Options((0.5,), (0.01, 0.05), (1, 10))
RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 4, 400)
GROUPS = RNG.integers(0, 20, 400)


def write_job(folder: Path) -> None:
    (folder / "study").mkdir(parents=True, exist_ok=True)
    (folder / "study" / "job.yaml").write_text("name: study\n")


def write_trial(
    folder: Path, arm: str, x: np.ndarray | None, *, scores: dict, heldout: dict, seed: int = 0, phase: str = "fixed"
) -> None:
    """A complete trial of one rung in the tables, with all metrics of x where there are embeddings."""
    trial_id = f"{arm}-{seed}"
    row = {"arm": arm, "seed": seed, "phase": phase, "status": "complete", "rung": 1, "num_rungs": 1}
    row |= {"pretrain.objective": "none"} if arm == "random" else {"pretrain.objective": "mlm", "pretrain.rungs": 1}
    write_rows(folder, "study", "trials", trial_id, [row | {"started_at": now(), "updated_at": now()}])
    cell = {"rung": 1, "task": "kind", "split": "validation"}
    if x is not None:
        found = measure_geometry(
            x.astype(np.float32), LABELS, options=OPTIONS, max_points=400, graph_points=400, seed=0, references=True
        )
        rows = [{k: None if v != v else v for k, v in value._asdict().items()} for value in found]
        write_rows(folder, "study", "geometry", trial_id, [cell | row for row in rows])
    depth, probe = (None, None) if arm.startswith("baseline") else ("all", "logistic")
    rows = [
        cell | {"shots": shots, "frozen_layers": depth, "probe": probe, "draw": 0, "metric": "f1_macro", "value": value}
        for shots, value in scores.items()
    ]
    write_rows(folder, "study", "scores", trial_id, rows)
    curves = [{"step": step, "tokens": step, "metric": m, "value": v} for m, ends in heldout.items()
              for step, v in enumerate(ends)]  # fmt: skip
    write_rows(folder, "study", "curves", trial_id, curves)


def make_embeddings(kind: str) -> np.ndarray:
    noise = RNG.normal(size=(400, 32))
    clusters = RNG.normal(size=(20, 32))
    return {
        "rank one": RNG.uniform(1, 5, size=(400, 1)) * noise[:1],
        "rank one, both ways": RNG.normal(size=(400, 1)) * noise[:1],
        "one point": 50 + 0.1 * noise,
        "random": noise,
        "clustered": noise + 2 * np.eye(32)[LABELS * 8] * 4,
        "fragments": clusters[GROUPS] * 5 + 0.1 * noise,
    }[kind]


EXPECTED = {
    "rank one": "collapse",
    "rank one, both ways": "collapse",
    "one point": "collapse",
    "random": "spread out but not clustered",
    "clustered": None,
    "fragments": "graph in fragments",
}
TRAINED = {"heldout_mlm_loss": (7.0, 4.0), "heldout_unigram_entropy": (6.0, 6.0)}
UNTRAINED = TRAINED | {"heldout_mlm_loss": (7.0, 6.5)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diagnosis")
    write_job(folder)
    write_trial(folder, "baseline:majority", None, scores={8: 0.1, None: 0.1}, heldout={})
    write_trial(folder, "baseline:tfidf", None, scores={8: 0.3, None: 0.7}, heldout={})
    for kind in EXPECTED:
        write_trial(folder, kind, make_embeddings(kind), scores={8: 0.1, None: 0.69}, heldout=TRAINED)
    clustered = make_embeddings("clustered")
    write_trial(folder, "poor", clustered, scores={8: 0.9, None: 0.39}, heldout=TRAINED)
    write_trial(folder, "poor", clustered, scores={8: 0.9, None: 0.39}, heldout=TRAINED, seed=1)
    write_trial(folder, "poor, untrained", clustered, scores={8: 0.9, None: 0.39}, heldout=UNTRAINED)
    write_trial(folder, "not scored", clustered, scores={}, heldout={})
    write_trial(folder, "searched", clustered, scores={None: 0.39}, heldout=TRAINED, phase="search")
    return folder


@pytest.mark.parametrize("kind", EXPECTED)
def test_known_faults_are_found_and_nothing_else(folder, kind):
    rows = {row["signature"]: row for row in diagnose_job(folder, "study") if row["arm"] == kind}
    assert rows.keys() == SIGNATURES.keys()
    found = {name for name, row in rows.items() if row["found"]}
    assert found == ({EXPECTED[kind]} - {None})
    # Of the settings, the one in which the arms differ.
    assert rows["collapse"]["settings"] == f"objective={'none' if kind == 'random' else 'mlm'}"
    assert rows["collapse"]["evidence"]["rankme_gaussian"] == pytest.approx(32, abs=1)


def test_a_poor_probe_is_one_only_despite_training_and_at_the_most_shots(folder):
    rows = {row["arm"]: row for row in diagnose_job(folder, "study") if row["signature"].startswith("poor")}
    found = {arm for arm, row in rows.items() if row["found"]}
    assert found == {"poor", "searched"}  # also an arm that a search did not confirm
    evidence = rows["poor"]["evidence"]
    assert (evidence["f1_macro"], evidence["f1_macro_tfidf"], evidence["f1_macro_majority"]) == (0.39, 0.7, 0.1)
    assert rows["not scored"]["found"] is None
    assert "f1_macro" in rows["not scored"]["missing"]
    assert not any(arm.startswith("baseline") for arm in rows)


def test_the_command_prints_what_was_found(folder, capsys):
    for form in ("json", "table", "csv"):
        with pytest.raises(SystemExit) as ended:
            main(["diagnose", "study", "--results", str(folder), "--format", form])
        assert ended.value.code == 0
        told = capsys.readouterr().out
        if form == "json":
            rows = json.loads(told)
            collapsed = {row["arm"] for row in rows if row["signature"] == "collapse" and row["found"]}
            assert collapsed == {"rank one", "rank one, both ways", "one point"}
            assert all(math.isfinite(value) for row in rows for value in row["evidence"].values())
        assert "collapse" in told


def test_a_job_without_geometry_is_told_so(tmp_path):
    write_job(tmp_path)
    with pytest.raises(JobError, match="no complete trial"):
        diagnose_job(tmp_path, "study")
    with pytest.raises(JobError, match="no job 'other'"):
        diagnose_job(tmp_path, "other")
