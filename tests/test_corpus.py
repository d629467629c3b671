"""The corpus: groups stay on one side, only training rows make codes, and digests see what can change a result."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raylab.base.mistakes import JobError
from raylab.data.corpus import (
    DOCUMENTS,
    TEST,
    TRAIN,
    ReadCorpus,
    SplitCorpus,
    digest_column,
    open_rows,
    read_corpus,
    store_corpus,
)
from raylab.data.corpus import split_corpus as split_rows
from raylab.job.blocks import Corpus

FIELDS = ["source"]


def corpus(tasks: tuple[str, ...] = ("kind",), min_class_size: int = 1, label: str = "label", **split: Any) -> Corpus:
    table = {"path": "unused", "text": "text", "group": "group"}
    return Corpus.model_validate(
        {
            "documents": table,
            "tasks": {name: table | {"label": label, "min_class_size": min_class_size} for name in tasks},
            "split": split,
        }
    )


def rows(**columns: list[Any]) -> pa.Table:
    return pa.table({name: pa.array(values, pa.large_string()) for name, values in columns.items()})


def read(**tables: pa.Table) -> ReadCorpus:
    return ReadCorpus(tables, {name: {"rows": len(table)} for name, table in tables.items()})


def example(num_groups: int = 60, **changes: list[Any]) -> ReadCorpus:
    """Two documents and two passages a group; `changes` replace columns of the passages."""
    groups = [f"g{i // 2}" for i in range(2 * num_groups)]
    documents = rows(
        text=[f"document {i}" for i in range(len(groups))],
        group=groups,
        source=["abc"[i % 3] for i in range(len(groups))],
    )
    passages = {
        "text": [f"passage {i}" for i in range(len(groups))],
        "group": groups,
        "label": ["xy"[i % 2] for i in range(len(groups))],
    }
    return read(documents=documents, kind=rows(**passages | changes))


def split_corpus(read: ReadCorpus, spec: Corpus, seed: int = 0, fields: list[str] = FIELDS) -> SplitCorpus:
    return split_rows(read, spec, fields, seed)


def sides(split: SplitCorpus) -> dict[str, dict[str, set[int]]]:
    """Table -> text -> parts that it stands in."""
    found: dict[str, dict[str, set[int]]] = {}
    for name in split.open:
        for table in (split.open[name], split.sealed[name]):
            for text, part in zip(table["text"].to_pylist(), table["part"].to_pylist(), strict=True):
                found.setdefault(name, {}).setdefault(text, set()).add(part)
    return found


def parts_by_group(split: SplitCorpus) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {}
    for tables in (split.open, split.sealed):
        for table in tables.values():
            for group, part in zip(table["group"].to_pylist(), table["part"].to_pylist(), strict=True):
                found.setdefault(group, set()).add(part)
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(
    documents=st.lists(st.integers(0, 30), min_size=30, max_size=80),
    passages=st.lists(st.tuples(st.integers(0, 40), st.sampled_from(["x", "y", None])), min_size=30, max_size=80),
    seed=st.integers(0, 2**31 - 1),
    train=st.floats(0.3, 0.8),
)
def test_no_group_is_on_two_sides_of_any_table(
    documents: list[int], passages: list[tuple[int, str | None]], seed: int, train: float
) -> None:
    given_rows = read(
        documents=rows(
            text=[f"d{i}" for i in range(len(documents))],
            group=[str(group) for group in documents],
            source=["ab"[i % 2] for i in range(len(documents))],
        ),
        kind=rows(
            text=[f"p{i}" for i in range(len(passages))],
            group=[str(group) for group, _ in passages],
            label=[label for _, label in passages],
        ),
    )
    spec = corpus(train=train, validation=(1 - train) / 2, test=(1 - train) / 2, seed=seed)
    try:
        split = split_corpus(given_rows, spec)
    except JobError:  # a part without rows, or one class: refused, whatever the split
        return
    assert all(len(parts) == 1 for parts in parts_by_group(split).values())
    for name, table in given_rows.tables.items():
        counts = split.counts[name]
        dropped = counts.get("unlabelled", 0) + counts.get("rare_or_unseen_class", 0)
        assert sum(counts[part] for part in ("train", "validation", "test")) == len(table) - dropped
        assert counts["test"] == len(split.sealed[name])


def test_a_group_keeps_its_part_when_others_come() -> None:
    few, many = (sides(split_corpus(example(num), corpus())) for num in (60, 200))
    for name, texts in few.items():
        assert texts.items() <= many[name].items()


def test_fractions_are_met() -> None:
    split = split_corpus(example(5000), corpus(train=0.6, validation=0.15, test=0.25))
    parts = [min(parts) for parts in parts_by_group(split).values()]
    shares = np.bincount(parts, minlength=3) / len(parts)
    np.testing.assert_allclose(shares, [0.6, 0.15, 0.25], atol=0.02)


def test_split_seed_moves_groups() -> None:
    first, second = (sides(split_corpus(example(), corpus(seed=seed))) for seed in (0, 1))
    assert first != second


def test_split_varies_with_the_seed_only_when_asked() -> None:
    fixed = [split_corpus(example(), corpus(), seed) for seed in (0, 1)]
    assert sides(fixed[0]) == sides(fixed[1])
    assert fixed[0].digests == fixed[1].digests
    varied = [split_corpus(example(), corpus(vary=True), seed) for seed in (0, 1)]
    assert sides(varied[0]) != sides(varied[1])
    assert varied[0].digests == varied[1].digests
    assert varied[0].stored_digest != varied[1].stored_digest


@pytest.mark.parametrize("change", [{"seed": 5}, {"train": 0.6, "test": 0.3}, {"min_class_size": 3}])
def test_rules_of_a_varying_split_are_in_its_digests(change: dict[str, Any]) -> None:
    base = split_corpus(example(), corpus(vary=True))
    assert split_corpus(example(), corpus(vary=True, **change)).digests != base.digests


def test_split_by_column() -> None:
    read_rows = example(10)
    part = [("fit", "dev", "held", "more")[i // 2 % 4] for i in range(20)]
    tables = {
        name: table.append_column("fold", pa.array(part, pa.large_string())) for name, table in read_rows[0].items()
    }
    values = {"train": ("fit", "more"), "validation": ("dev",), "test": ("held",)}
    split = split_corpus(ReadCorpus(tables, read_rows.counts), corpus(column="fold", values=values))
    codes = {"fit": 0, "more": 0, "dev": 1, "held": 2}
    assert sides(split)["kind"] == {f"passage {i}": {codes[part[i]]} for i in range(20)}


def test_split_by_column_needs_no_mapping_for_the_parts_own_names() -> None:
    part = ["train", "train", "validation", "test", "train", "validation"]
    tables = {
        "documents": rows(text=list("abcdef"), group=list("abcdef"), source=list("xyxyxy"), part=part),
        "kind": rows(text=list("ghijkl"), group=list("ghijkl"), label=list("xyxyxy"), part=part),
    }
    counts = split_corpus(read(**tables), corpus(column="part")).counts
    assert [counts["kind"][name] for name in ("train", "validation", "test")] == [3, 2, 1]


def test_split_column_with_other_values_is_refused_for_all_tables_at_once() -> None:
    tables = {
        name: table.append_column(
            "fold", pa.array(["train", "odd", None] + ["test"] * (len(table) - 3), pa.large_string())
        )
        for name, table in example().tables.items()
    }
    with pytest.raises(JobError) as caught:
        split_corpus(read(**tables), corpus(column="fold"))
    assert len(caught.value.problems) == 2
    for line in caught.value.problems:
        assert "1 values that name no part and 1 nulls" in line
        assert "odd" not in line


def test_crossing_groups_are_counted_and_refused() -> None:
    part = ["train", "validation"] * 10 + ["train", "train"] * 10
    tables = {
        name: table.append_column("fold", pa.array(part, pa.large_string()))
        for name, table in example(20).tables.items()
    }
    with pytest.raises(JobError, match=r"corpus\.split\.column: 10 groups stand on two sides"):
        split_corpus(read(**tables), corpus(column="fold"))


def column_split(labels: dict[str, list[str | None]], min_class_size: int = 1) -> SplitCorpus:
    """A corpus whose task has these labels in each part, every row its own group."""
    part = [name for name, values in labels.items() for _ in values]
    names = [str(i) for i in range(len(part))]
    label = [value for values in labels.values() for value in values]
    tables = {
        "documents": rows(text=names, group=names, source=["ab"[i % 2] for i in range(len(part))], part=part),
        "kind": rows(text=names, group=names, label=label, part=part),
    }
    return split_corpus(read(**tables), corpus(column="part", min_class_size=min_class_size), fields=[])


def test_classes_come_from_training_rows_only() -> None:
    split = column_split(
        {
            "train": ["b", "b", "a", "a", "rare"],
            "validation": ["a", "rare", "rare", "new", None],
            "test": ["rare", "rare", "new", "b", None],
        },
        min_class_size=2,
    )
    assert split.classes == {"kind": ["a", "b"]}
    assert split.open["kind"]["label"].to_pylist() == [1, 1, 0, 0, 0]
    assert split.sealed["kind"]["label"].to_pylist() == [1]
    assert split.counts["kind"] == {
        "rows": 15, "unlabelled": 2, "rare_or_unseen_class": 7, "train": 4, "validation": 1, "test": 1,
    }  # fmt: skip


def test_label_codes_follow_the_sorted_names_not_the_rows() -> None:
    names = ["c", "a", "b", "a", "c", "b"]
    split = column_split({"train": names, "validation": names[::-1], "test": []})
    assert split.classes["kind"] == ["a", "b", "c"]
    assert split.open["kind"]["label"].to_pylist() == ["abc".index(name) for name in names + names[::-1]]


def test_one_class_is_refused() -> None:
    with pytest.raises(JobError, match=r"corpus\.tasks\.kind\.label: 'label' has 1 class"):
        column_split({"train": ["a", "a", "b"], "validation": ["a", "b"], "test": []}, min_class_size=2)


def test_a_part_without_rows_is_refused() -> None:
    with pytest.raises(JobError, match=r"no validation rows"):
        column_split({"train": ["a", "b"], "validation": [None], "test": []})


def test_without_groups_equal_texts_stay_together() -> None:
    texts = [f"note {i % 40}" for i in range(400)]
    tables = {
        "documents": rows(text=texts, source=["ab"[i % 2] for i in range(400)]),
        "kind": rows(text=texts[::-1], label=["xy"[i % 3 % 2] for i in range(400)]),
    }
    spec = Corpus.model_validate(
        {
            "documents": {"path": "unused", "text": "text"},
            "tasks": {"kind": {"path": "unused", "text": "text", "label": "label"}},
        }
    )
    found = sides(split_corpus(read(**tables), spec))
    assert found["documents"] == found["kind"]
    assert all(len(parts) == 1 for parts in found["documents"].values())
    assert {min(parts) for parts in found["documents"].values()} == {0, 1, 2}


def replaced(read_rows: ReadCorpus, table: str, column: str, texts: set[str], change: Any) -> ReadCorpus:
    """The rows whose text is among `texts` have `change(value)` in a column."""
    old = read_rows.tables[table]
    values = [
        change(value) if text in texts else value
        for text, value in zip(old["text"].to_pylist(), old[column].to_pylist(), strict=True)
    ]
    new = old.set_column(old.schema.get_field_index(column), column, pa.array(values, pa.large_string()))
    return ReadCorpus(read_rows.tables | {table: new}, read_rows.counts)


def texts_in(split: SplitCorpus, table: str, part: int) -> list[str]:
    return sorted(text for text, parts in sides(split)[table].items() if parts == {part})


def assert_same_before_unseal(one: SplitCorpus, other: SplitCorpus) -> None:
    assert one.digests == other.digests
    assert one.stored_digest == other.stored_digest
    assert one.classes == other.classes
    assert one.categories == other.categories
    assert one.supervised_by == other.supervised_by
    for name, table in one.open.items():
        assert table.equals(other.open[name])


def test_test_labels_and_texts_change_nothing_before_unseal() -> None:
    read_rows = example()
    base = split_corpus(read_rows, corpus(min_class_size=2))
    rng = np.random.default_rng(0)
    changed = read_rows
    for table, column in (("kind", "label"), (DOCUMENTS, "source")):
        hidden = texts_in(base, table, TEST)
        values = iter(rng.permutation(["x", "y", "brand new"] * len(hidden)).tolist())
        changed = replaced(changed, table, column, set(hidden), lambda old, values=values: next(values))
    for table in ("kind", DOCUMENTS):
        changed = replaced(changed, table, "text", set(texts_in(base, table, TEST)), lambda old: old + " replaced")
    other = split_corpus(changed, corpus(min_class_size=2))
    assert not base.sealed["kind"].equals(other.sealed["kind"])
    assert_same_before_unseal(base, other)


@settings(max_examples=25, deadline=None)
@given(labels=st.lists(st.sampled_from(["x", "y", "z", None]), min_size=120, max_size=120))
def test_any_test_labels_change_nothing_before_unseal(labels: list[str | None]) -> None:
    base = split_corpus(example(), corpus())
    hidden = set(texts_in(base, "kind", TEST))
    values = iter(labels)
    other = split_corpus(replaced(example(), "kind", "label", hidden, lambda old: next(values)), corpus())
    assert_same_before_unseal(base, other)


@pytest.mark.parametrize(
    ("table", "column", "part", "changed"),
    [
        (DOCUMENTS, "text", 0, {DOCUMENTS}),
        (DOCUMENTS, "text", 1, {DOCUMENTS}),
        (DOCUMENTS, "source", 0, {"metadata:source"}),
        ("kind", "text", 0, {"kind"}),
        ("kind", "label", 0, {"kind"}),
        ("kind", "label", 1, {"kind"}),
    ],
)
def test_digests_see_what_training_and_validation_read(table: str, column: str, part: int, changed: set[str]) -> None:
    base = split_corpus(example(), corpus())
    chosen = texts_in(base, table, part)[0]
    # Another value of the same column: no class list changes, only one row.
    value = {"text": "other text", "source": "a", "label": "x"}[column]
    spare = {"source": "b", "label": "y"}.get(column, value)
    other = split_corpus(
        replaced(example(), table, column, {chosen}, lambda old: spare if old == value else value), corpus()
    )
    assert {name for name, found in other.digests.items() if found != base.digests[name]} == changed
    assert other.stored_digest != base.stored_digest


def test_digests_see_groups_and_class_names() -> None:
    base = split_corpus(example(), corpus())
    other = split_corpus(replaced(example(), "kind", "group", {"passage 0", "passage 1"}, lambda old: "g1"), corpus())
    assert other.digests["kind"] != base.digests["kind"]
    assert other.digests[DOCUMENTS] == base.digests[DOCUMENTS]
    renamed = split_corpus(example(label=["XY"[i % 2] for i in range(120)]), corpus())
    assert renamed.open["kind"].equals(base.open["kind"])
    assert renamed.digests["kind"] != base.digests["kind"]


def test_column_digest_sees_values_and_order_but_not_chunks() -> None:
    values = ["ab", "", "c", "é"]
    whole = digest_column(pa.chunked_array([pa.array(values, pa.large_string())]))
    cut = [pa.array(part, pa.large_string()) for part in (["zz", *values[:1]], values[1:])]
    assert digest_column(pa.chunked_array([cut[0][1:], cut[1]])) == whole
    for other in (["a", "b", "c", "é"], ["a", "bc", "", "é"], values[::-1], ["ab", None, "c", "é"]):
        assert digest_column(pa.chunked_array([pa.array(other, pa.large_string())])) != whole


def test_store_holds_the_open_rows_without_text(tmp_path: Path) -> None:
    split = split_corpus(example(), corpus())
    stage = store_corpus(tmp_path, split)
    for name, table in split.open.items():
        stored = open_rows(stage.path, name)
        assert set(stored) == set(table.column_names) - {"text"}
        for column, values in stored.items():
            np.testing.assert_array_equal(values, table[column].to_numpy())
        assert (stored["part"] < TEST).all()
    assert stage.info["classes"] == {"kind": ["x", "y"]}
    assert store_corpus(tmp_path, split).reused
    for file in stage.path.iterdir():
        assert b"passage" not in file.read_bytes()
        assert b"document 1" not in file.read_bytes()


def test_a_field_of_the_tasks_own_column_supervises_it() -> None:
    split = split_corpus(example(source=["xy"[i % 2] for i in range(120)]), corpus(label="source"))
    assert split.supervised_by == {"source": "kind"}


@pytest.mark.parametrize("field", ["source", "label"])
def test_a_field_that_matches_labels_one_to_one_supervises_them(field: str) -> None:
    texts = [f"note {i}" for i in range(200)]

    def split(sources: list[str]) -> SplitCorpus:
        tables = {
            "documents": rows(text=texts, group=texts, **{field: sources}),
            "kind": rows(text=texts, group=texts, kind=["xyz"[i % 3] for i in range(200)]),
        }
        return split_corpus(read(**tables), corpus(label="kind"), fields=[field])

    assert split(["abc"[i % 3] for i in range(200)]).supervised_by == {field: "kind"}
    assert split(["ab"[i % 3 % 2] for i in range(200)]).supervised_by == {}
    assert split(["abc"[i % 7 % 3] for i in range(200)]).supervised_by == {}


def test_stored_corpora_with_other_supervision_are_not_shared(tmp_path: Path) -> None:
    named, plain = (
        split_corpus(example(**{label: ["xy"[i % 2] for i in range(120)]}), corpus(label=label))
        for label in ("source", "label")
    )
    assert named.stored_digest == plain.stored_digest
    assert store_corpus(tmp_path, named).info["supervised_by"] == {"source": "kind"}
    assert store_corpus(tmp_path, plain).info["supervised_by"] == {}


def test_many_equal_texts_do_not_multiply() -> None:
    # Joined row by row these would be 400 million pairs.
    texts = [f"note {i}" for i in range(100)] + ["see chart"] * 20_000
    groups = [str(i) for i in range(len(texts))]
    tables = {
        "documents": rows(text=texts, group=groups, source=["ab"[i % 2] for i in range(len(texts))]),
        "kind": rows(text=texts, group=groups, label=["xy"[i % 2] for i in range(len(texts))]),
    }
    assert split_corpus(read(**tables), corpus()).supervised_by == {}


def test_metadata_is_coded_from_training_rows() -> None:
    part = ["train"] * 4 + ["validation"] * 3 + ["test"]
    names = [str(i) for i in range(8)]
    tables = {
        "documents": rows(text=names, group=names, source=["b", "a", None, "b", "a", "new", None, "b"], part=part),
        "kind": rows(text=names, group=names, label=list("xyxyxyxy"), part=part),
    }
    split = split_corpus(read(**tables), corpus(column="part"))
    assert split.categories == {"source": ["a", "b"]}
    assert split.open[DOCUMENTS]["source"].to_pylist() == [1, 0, -1, 1, 0, -1, -1]
    assert split.counts[DOCUMENTS]["without_source"] == 3


def test_files_are_read_and_every_problem_listed(tmp_path: Path) -> None:
    names = [str(i) for i in range(50)]
    pq.write_table(rows(text=names, group=names, source=["a", "b"] * 25, part=["p"] * 50), tmp_path / "notes.parquet")
    table = {"path": str(tmp_path / "notes.parquet"), "text": "text", "group": "group"}
    spec = Corpus.model_validate({"documents": table, "tasks": {"kind": table | {"label": "source"}}})
    found = read_corpus(spec, FIELDS)
    assert found.counts == {name: {"rows_read": 50, "empty_text": 0, "rows": 50} for name in (DOCUMENTS, "kind")}
    split = split_corpus(found, spec)
    assert split.supervised_by == {"source": "kind"}
    assert (open_part(split) == TRAIN).sum() == split.counts["kind"]["train"]

    wrong = Corpus.model_validate(
        {
            "documents": {key: value for key, value in table.items() if key != "group"},
            "tasks": {"kind": table | {"label": "lable"}, "gone": table | {"path": "no/such.csv", "label": "x"}},
        }
    )
    with pytest.raises(JobError) as caught:
        read_corpus(wrong, FIELDS)
    assert len(caught.value.problems) == 3
    assert "documents names no 'group' while other tables do" in caught.value.problems[-1]


@pytest.mark.parametrize("field", ["part", "group"])
def test_a_field_named_as_a_coded_column_is_refused(tmp_path: Path, field: str) -> None:
    names = [str(i) for i in range(50)]
    pq.write_table(rows(text=names, group=names, source=["a", "b"] * 25, part=["p", "q"] * 25), tmp_path / "a.parquet")
    table = {"path": str(tmp_path / "a.parquet"), "text": "text", "group": "group"}
    spec = Corpus.model_validate({"documents": table, "tasks": {"kind": table | {"label": "source"}}})
    with pytest.raises(JobError, match=f"a field can't be named '{field}'"):
        read_corpus(spec, [field])


def open_part(split: SplitCorpus) -> np.ndarray:
    return split.open["kind"]["part"].to_numpy()
