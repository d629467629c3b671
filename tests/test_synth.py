"""The synthetic notes: columns, repeatability, shape, and that each field is related to what it should be."""

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.stats import chi2_contingency
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from raylab.data import synth
from raylab.data.language import build_language

Columns = dict[str, list[str]]


def read(directory: Path) -> Columns:
    return pq.read_table(directory / "notes.parquet").to_pydict()


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Columns:
    directory = tmp_path_factory.mktemp("clean")
    synth.write_notes(directory, num_notes=4000, label_noise=0.0)
    return read(directory)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Columns:
    directory = tmp_path_factory.mktemp("noisy")
    synth.write_notes(directory, num_notes=4000, label_noise=0.3)
    return read(directory)


def cross_table(a: list[str], b: list[str]) -> np.ndarray:
    counts = np.zeros((len(set(a)), len(set(b))))
    np.add.at(counts, (np.unique(a, return_inverse=True)[1], np.unique(b, return_inverse=True)[1]), 1)
    return counts


def test_columns_types_and_classes(clean: Columns) -> None:
    assert list(clean) == synth.COLUMNS
    assert all(type(value) is str and value for values in clean.values() for value in values)
    assert len(set(clean["note_id"])) == 4000
    for column, names in {**synth.TASKS, "category": synth.CATEGORIES, "ward": synth.WARDS}.items():
        assert set(clean[column]) == set(names)
        assert min(np.unique(clean[column], return_counts=True)[1]) > 300
    assert set(clean["service"]) == set(synth.SERVICES)


def test_summary_counts_what_was_written(tmp_path: Path) -> None:
    summary = synth.write_notes(tmp_path, num_notes=500, seed=3)
    notes = read(tmp_path)
    assert summary["notes"] == 500
    assert summary["patients"] == len(set(notes["patient"]))
    assert summary["words"] == sum(len(text.split()) for text in notes["text"])
    for task in synth.TASKS:
        assert summary["classes"][task] == {name: notes[task].count(name) for name in synth.TASKS[task]}
    described = json.loads((tmp_path / "synth.json").read_text(encoding="utf-8"))
    assert described["summary"] == summary
    assert described["arguments"] == {"num_notes": 500, "seed": 3, "label_noise": 0.05, "max_words": 3000}
    assert not any(text[:60] in json.dumps(described) for text in notes["text"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gold.parquet", "notes.parquet", "synth.json"]


def test_same_arguments_same_notes_other_seed_other_notes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        synth.write_notes(tmp_path / name, num_notes=200, seed=seed)
    assert read(tmp_path / "a") == read(tmp_path / "b")
    assert not set(read(tmp_path / "a")["text"]) & set(read(tmp_path / "c")["text"])


@pytest.mark.parametrize("num_notes", [1, 2, 137])
def test_first_notes_do_not_depend_on_the_number(tmp_path: Path, clean: Columns, num_notes: int) -> None:
    synth.write_notes(tmp_path, num_notes=num_notes, label_noise=0.0)
    assert read(tmp_path) == {column: values[:num_notes] for column, values in clean.items()}


def test_patients_have_several_notes_and_one_condition(clean: Columns) -> None:
    sizes = np.unique(clean["patient"], return_counts=True)[1]
    assert sizes.min() >= 1
    assert sizes.max() <= 12
    assert 3 <= np.median(sizes) <= 5
    conditions = defaultdict(set)
    for patient, condition in zip(clean["patient"], clean["condition"], strict=True):
        conditions[patient].add(condition)
    assert all(len(found) == 1 for found in conditions.values())


def test_lengths(clean: Columns) -> None:
    lengths = np.array([len(text.split()) for text in clean["text"]])
    assert lengths.min() >= synth.MIN_WORDS
    assert lengths.max() <= 3000
    assert lengths.max() > 1000
    assert np.mean((lengths >= 60) & (lengths <= 400)) > 0.75
    category = np.array(clean["category"])
    medians = {name: np.median(lengths[category == name]) for name in synth.CATEGORIES}
    assert max(medians, key=lambda name: medians[name]) == "discharge_summary"


@pytest.mark.parametrize("max_words", [synth.MIN_WORDS, 100])
def test_max_words_caps_the_text_and_keeps_the_labels(tmp_path: Path, clean: Columns, max_words: int) -> None:
    synth.write_notes(tmp_path, num_notes=300, label_noise=0.0, max_words=max_words)
    notes = read(tmp_path)
    assert max(len(text.split()) for text in notes["text"]) == max_words
    for column in ("patient", "category", "ward", "service", *synth.TASKS):
        assert notes[column] == clean[column][:300]


def test_row_groups_are_bounded(tmp_path: Path, clean: Columns, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synth, "ROW_GROUP", 64)
    for num_notes in (640, 641, 700):
        synth.write_notes(tmp_path, num_notes=num_notes, label_noise=0.0)
        file = pq.ParquetFile(tmp_path / "notes.parquet")
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        assert max(sizes) <= 64
        assert sum(sizes) == num_notes
        assert len(sizes) == -(-num_notes // 64)
        assert read(tmp_path) == {column: values[:num_notes] for column, values in clean.items()}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synth.write_notes(tmp_path, num_notes=20)
    before = (tmp_path / "notes.parquet").read_bytes()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(synth, "_build_patient", fail)
    with pytest.raises(OSError, match="disk full"):
        synth.write_notes(tmp_path, num_notes=30)
    assert (tmp_path / "notes.parquet").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3


def test_label_noise_changes_its_share_of_labels_and_nothing_else(clean: Columns, noisy: Columns) -> None:
    flips = {}
    for column in synth.COLUMNS:
        if column in synth.TASKS:
            flips[column] = np.array(clean[column]) != np.array(noisy[column])
            assert abs(flips[column].mean() - 0.3) < 0.03
        else:
            assert clean[column] == noisy[column]
    # Independent tasks: both labels of a note are replaced as often as chance says.
    assert abs(np.mean(flips["condition"] & flips["severity"]) - 0.09) < 0.02


def test_replaced_labels_are_uniform_over_the_other_classes(clean: Columns, noisy: Columns) -> None:
    pairs = zip(clean["condition"], noisy["condition"], strict=True)
    others = [after for before, after in pairs if before == "cardiac" != after]
    counts = np.unique(others, return_counts=True)[1]
    assert len(counts) == 5
    assert counts.max() < 2 * counts.min()


def test_service_follows_the_condition_and_ward_nothing(clean: Columns) -> None:
    tied = cross_table(clean["condition"], clean["service"])
    # A condition's own service: 0.7, and a fifth of the rest.
    assert np.allclose(tied.max(1) / tied.sum(1), 0.76, atol=0.06)
    # Nearby notes share a patient, but the wards are drawn a note, so that chi2 holds.
    for column in ("condition", "severity", "outcome", "category", "service"):
        assert chi2_contingency(cross_table(clean["ward"], clean[column])).pvalue > 1e-3


def test_outcome_follows_the_described_rule(tmp_path: Path) -> None:
    synth.write_notes(tmp_path, num_notes=2000, seed=5, label_noise=0.0)
    notes = read(tmp_path)
    structure = json.loads((tmp_path / "synth.json").read_text(encoding="utf-8"))["structure"]
    rule = structure["outcome_rule"]
    lowest = rule["readmitted_from_severity"]
    order = synth.TASKS["severity"].index
    expected = [
        "readmitted" if order(severity) >= order(lowest[condition]) else "recovered"
        for condition, severity in zip(notes["condition"], notes["severity"], strict=True)
    ]
    held = np.mean(np.array(expected) == np.array(notes["outcome"]))
    assert abs(held - rule["chance_that_the_rule_holds"]) < 0.03


def test_words_follow_a_law_like_zipf(clean: Columns) -> None:
    words = np.array(" ".join(clean["text"]).lower().replace(".", "").split())
    counts = np.sort(np.unique(words, return_counts=True)[1])[::-1]
    assert 1000 < len(counts) < 10000
    ranks = np.arange(1, len(counts) + 1)
    middle = slice(10, 2000)
    slope = np.polyfit(np.log(ranks[middle]), np.log(counts[middle]), 1)[0]
    assert -1.5 < slope < -0.6


def test_phrases_are_predictable(clean: Columns) -> None:
    language = build_language(0)
    row = language.first_row["phrase_a"]
    first = language.words[0, language.table[row, 0]].strip()
    second = language.words[0, language.table[language.first_row["phrase_b"], 0]].strip()
    words = " ".join(clean["text"]).lower().replace(".", "").split()
    after = [b for a, b in pairwise(words) if a == first]
    assert len(after) > 50
    assert np.mean(np.array(after) == second) > 0.95  # a cut at the end of a note may part the two


def test_halves_of_a_note_resemble_each_other_more_than_notes_of_the_class(clean: Columns) -> None:
    texts, labels, patients, halves = [], [], [], []
    for text, label, patient in zip(clean["text"][:800], clean["condition"], clean["patient"], strict=False):
        words = text.split()
        if len(words) >= 120:
            halves.append((" ".join(words[:60]), " ".join(words[60:120])))
            labels.append(label)
            patients.append(patient)
    texts = [half for pair in halves for half in pair]
    vectors = TfidfVectorizer(sublinear_tf=True).fit_transform(texts)
    similarity = (vectors[0::2] @ vectors[1::2].T).toarray()
    own = np.diag(similarity)
    same = np.equal.outer(labels, labels)
    others = ~np.equal.outer(patients, patients)
    within, across = similarity[same & others].mean(), similarity[~same].mean()
    assert own.mean() > 1.2 * within
    assert within > across


def test_tasks_are_learnable_from_few_shots_and_better_from_all(tmp_path: Path) -> None:
    synth.write_notes(tmp_path, num_notes=4000)
    notes = {column: np.array(values) for column, values in read(tmp_path).items()}
    held_out = np.array([int(patient[1:]) % 4 == 0 for patient in notes["patient"]])
    features = TfidfVectorizer(min_df=2, sublinear_tf=True).fit_transform(notes["text"])
    rng = np.random.default_rng(0)

    def score(task: str, shots: int | None) -> float:
        labels, train = notes[task], np.flatnonzero(~held_out)
        if shots:
            train = np.concatenate(
                [rng.choice(train[labels[train] == name], shots, replace=False) for name in synth.TASKS[task]]
            )
        model = LogisticRegression(C=10 if shots else 1, max_iter=200).fit(features[train], labels[train])
        return float(f1_score(labels[held_out], model.predict(features[held_out]), average="macro"))

    few = {task: float(np.mean([score(task, 8) for _ in range(4)])) for task in synth.TASKS}
    full = {task: score(task, None) for task in synth.TASKS}
    assert 0.45 < few["condition"] < 0.8
    for task, classes in synth.TASKS.items():
        assert few[task] > 1 / len(classes) + 0.03
        assert few[task] + 0.05 < full[task] < 0.97


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"num_notes": 0}, "num_notes"),
        ({"seed": -1}, "seed"),
        ({"label_noise": -0.1}, "label_noise"),
        ({"label_noise": 1.0}, "label_noise"),
        ({"label_noise": float("nan")}, "label_noise"),
        ({"max_words": 29}, "max_words"),
    ],
)
def test_bad_arguments_name_the_argument(tmp_path: Path, arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is .* must be at least"):
        synth.write_notes(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"num_notes.*max_words"):
        synth.write_notes(tmp_path, num_notes=0, max_words=0)


def test_gold_labels_are_the_patients_problems(tmp_path: Path, clean: Columns) -> None:
    summary = synth.write_notes(tmp_path, num_notes=300, label_noise=0.0)
    gold = pq.read_table(tmp_path / "gold.parquet").to_pydict()
    patients = dict(zip(clean["note_id"], clean["patient"], strict=True))
    assert summary["gold"] == len(gold["note_id"]) < 300
    assert len(set(gold["note_id"])) == len(gold["note_id"])
    of_patient = defaultdict(set)
    for note, problems in zip(gold["note_id"], gold["problems"], strict=True):
        assert problems == sorted(set(problems))
        assert len(problems) == synth.PROBLEMS_A_PATIENT
        of_patient[patients[note]].add(tuple(problems))
    assert all(len(found) == 1 for found in of_patient.values())
    uncoded = set(patients[note] for note in clean["note_id"][:300]) - of_patient.keys()
    assert {int(patient[1:]) % synth.UNCODED_PATIENTS for patient in uncoded} == {synth.UNCODED_PATIENTS - 1}
    # What the label says is in the text: the problems' own words are more frequent where it is.
    described = json.loads((tmp_path / "synth.json").read_text(encoding="utf-8"))["structure"]
    mix = described["problem_mix_of_condition"]
    conditions = dict(zip(clean["note_id"], clean["condition"], strict=True))
    own = [
        mix[conditions[note]][int(problem[-2:])]
        for note, problems in zip(gold["note_id"], gold["problems"], strict=True)
        for problem in problems
    ]
    assert np.mean(own) > 2 / synth.NUM_PROBLEMS
