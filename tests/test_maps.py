"""Maps of validation embeddings: the right rows, places and classes; small classes, texts and ids in no file."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylab.data.corpus import VALIDATION
from raylab.data.synth import write_notes
from raylab.data.tokens import Vocabulary, open_tokens
from raylab.evaluation.evaluation import open_encoder
from raylab.job.settings import resolve_target
from raylab.report.maps import MOST_CLASSES, MOST_POINTS, choose_rows, find_apart, project, share_between, tell_maps
from raylab.report.page import write_page
from raylab.report.parts import MissingError, Plot, Study, Table
from raylab.runs.preparation import find_last_rung, make_spec, prepare
from raylab.runs.trial import run_trial
from raylab.statistics.analysis import default_target, list_arms
from raylab.store.stages import FOLDER, Stage, peek_key, read_info
from raylab.training.embedding import embed

RARE = "Zebra's disease"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """400 notes with a class of six rows, of which some are in validation."""
    folder = tmp_path_factory.mktemp("mapped")
    write_notes(folder, num_notes=400, seed=0, max_words=40)
    notes = pq.read_table(folder / "notes.parquet")
    patients = notes["patient"].to_pylist()
    rare = set(dict.fromkeys(patients[::25]))
    kinds = [
        RARE if place % 25 == 0 and patient in rare else name
        for place, (patient, name) in enumerate(zip(patients, notes["severity"].to_pylist(), strict=True))
    ]
    pq.write_table(notes.append_column("kind", pa.array(kinds)), folder / "notes.parquet")
    return folder


@pytest.fixture(scope="module")
def run_job(make_job, folder):
    """`run_job(results, ["mlm", "none"])`: a job with an arm an objective, run to the end; more are `searched`."""
    table = {"path": str(folder / "notes.parquet"), "text": "text", "group": "patient", "id": "note_id"}

    def run(results, objectives, searched=None):
        job = make_job("mlm", {
            "corpus.documents": table, "corpus.tasks": {"kind": {**table, "label": "kind"}},
            "corpus.split": {"train": 0.5, "validation": 0.4, "test": 0.1}, "evaluate.tasks": ["kind"],
            "search": {"design": "grid", "space": {"pretrain.objective": objectives}, "seeds": [0]},
        })  # fmt: skip
        preparation = prepare(job, results)
        specs = [make_spec(preparation, {"pretrain.objective": name}, 0, "fixed") for name in objectives]
        for name, seed in (searched or {}).items():
            specs.append(make_spec(preparation, {"pretrain.objective": name}, seed, "search"))
        for spec in specs:
            assert run_trial(spec)["status"] == "complete"
        target = default_target(job)
        return Study(results, job, target, resolve_target(job, target), list_arms(results, job)), preparation, specs

    return run


@pytest.fixture(scope="module")
def ran(run_job, tmp_path_factory):
    return run_job(tmp_path_factory.mktemp("results"), ["mlm", "none"])


def embed_validation(study, preparation, spec):
    """Unit vectors of the validation rows by the trial's last encoder, and their class names."""
    stage = Stage("pretrain", "", find_last_rung(study.results, spec.job, spec.trial_id), True, 0.0, {})
    rows = preparation.split(0).open["kind"]
    chosen = np.flatnonzero(rows["part"].to_numpy() == VALIDATION)
    root = study.results / FOLDER
    x = embed(
        open_encoder(stage), open_tokens(root / spec.tokens["kind"]), chosen,
        Vocabulary(**read_info(root / spec.tokenizer)), max_length=64, long_documents="truncate",
    ).astype(np.float64)  # fmt: skip
    names = np.array(preparation.split(0).classes["kind"])[rows["label"].to_numpy()[chosen]]
    return x / np.linalg.norm(x, axis=1, keepdims=True), names


def find_plot(section):
    [plot] = [part for part in section.parts if isinstance(part, Plot)]
    [table] = [part for part in section.parts if isinstance(part, Table)]
    return plot, {row["encoder"]: row for row in table.rows}


def test_places_classes_and_shares_are_those_of_the_validation_rows(ran):
    study, preparation, specs = ran
    plot, spaces = find_plot(tell_maps(study))
    assert len(spaces) == 2
    for spec in specs:
        [role] = [role for role in spaces if ("start" in role) == (spec.settings.pretrain.objective == "none")]
        x, names = embed_validation(study, preparation, spec)
        shown = names != RARE
        assert 0 < (~shown).sum() < 10
        x, names = x[shown], names[shown]
        centred = x - x.mean(axis=0)
        u, s, _ = np.linalg.svd(centred, full_matrices=False)
        expected = np.abs(u[:, :2] * s[:2])
        here = [row for row in plot.rows if row["encoder"] == role]
        assert len(here) == len(x)
        for name in set(names):
            found = np.array([[row["x"], row["y"]] for row in here if row["class"] == name])
            for axis in (0, 1):  # signs of axes are free
                assert np.sort(np.abs(found[:, axis])) == pytest.approx(
                    np.sort(expected[names == name, axis]), rel=2e-3
                )
        assert spaces[role]["shown"] == pytest.approx((s[:2] ** 2).sum() / (s**2).sum())
        left = sum(((x[names == name] - x[names == name].mean(axis=0)) ** 2).sum() for name in set(names))
        assert spaces[role]["between"] == pytest.approx(1 - left / (centred**2).sum())
        assert spaces[role]["chance"] == pytest.approx((len(set(names)) - 1) / (len(names) - 1))


def test_lead_alt_and_figure_say_the_same(ran):
    section = tell_maps(ran[0])
    plot, spaces = find_plot(section)
    for role, row in spaces.items():
        assert f"{role} {row['between']:.1%}" in section.lead[0]
        assert f"{role}: {row['shown']:.0%} of the variance is shown" in plot.alt
    titles = [panel.get_title().split("\n")[0] for panel in plot.figure.axes]
    assert titles == list(spaces)
    classes = {row["class"] for row in plot.rows}
    assert {text.get_text()[2:] for text in plot.figure.legends[0].get_texts()} == classes
    assert all(name in plot.alt for name in classes)


def test_small_classes_texts_and_ids_are_in_no_file(ran, folder, tmp_path):
    page = write_page([tell_maps(ran[0])], "maps", "now", tmp_path / "report")
    written = b"".join(path.read_bytes() for path in page.parent.rglob("*") if path.is_file())
    notes = pq.read_table(folder / "notes.parquet")
    assert b"Zebra" not in written
    assert not any(str(value).encode() in written for value in notes["note_id"].to_pylist())
    assert not any(text[:20].encode() in written for text in notes["text"].to_pylist())
    assert b"class" in written


def test_without_the_start_the_first_rung_stands_for_it_and_it_is_said(run_job, tmp_path):
    study, _, _ = run_job(tmp_path, ["mlm"])
    section = tell_maps(study)
    _, spaces = find_plot(section)
    first, last = spaces
    assert first.startswith(f"{last}, after")
    assert first.endswith("of its tokens")
    assert any("start was not measured" in part for part in section.parts if isinstance(part, str))


def test_a_start_that_was_only_searched_is_shown_of_its_own_seed(run_job, tmp_path):
    study, preparation, [_, untrained] = run_job(tmp_path, ["mlm"], {"none": 3})
    plot, spaces = find_plot(tell_maps(study))
    assert [(role, row["seed"]) for role, row in spaces.items()] == [("start", 3), ("base and best", 0)]
    assert plot.figure.axes[0].get_title() == "start\nsearched, not confirmed, seed 3"
    x, names = embed_validation(study, preparation, untrained)
    centred = x[names != RARE] - x[names != RARE].mean(axis=0)
    s = np.linalg.svd(centred, compute_uv=False)
    assert spaces["start"]["shown"] == pytest.approx((s[:2] ** 2).sum() / (s**2).sum())


def test_what_is_gone_is_left_out_or_missing(run_job, tmp_path):
    study, _, [trained, untrained] = run_job(tmp_path, ["mlm", "none"])
    start, end = (find_last_rung(tmp_path, spec.job, spec.trial_id).name for spec in (untrained, trained))
    stages = {peek_key(tmp_path, path.name)["encoder"]: path for path in (tmp_path / FOLDER).glob("embed-*")}
    assert len(stages) == 3  # the start and two rungs

    def list_shown():
        return list(find_plot(tell_maps(study))[1])

    assert len(list_shown()) == 2
    shutil.rmtree(stages.pop(start))
    first, last = list_shown()  # the first rung in its place
    assert first.startswith(f"{last}, after")
    [middle] = [encoder for encoder in stages if encoder != end]
    shutil.rmtree(stages.pop(middle))
    assert list_shown() == [last]
    shutil.rmtree(stages.pop(end))
    with pytest.raises(MissingError, match="no embeddings of kind are kept"):
        tell_maps(study)


def test_at_most_ten_classes_and_few_points_are_drawn():
    rng = np.random.default_rng(0)
    sizes = [*range(400, 400 - 12 * 20, -20), 9, 1]
    labels = rng.permutation(np.repeat(np.arange(14), sizes))
    found = choose_rows(labels, [f"c{code}" for code in range(14)])
    assert found.names == [f"c{code}" for code in range(MOST_CLASSES)]
    assert len(found.rows) == MOST_POINTS
    assert (np.diff(found.rows) > 0).all()
    for row, code in zip(found.rows, found.codes, strict=True):
        assert code == (labels[row] if labels[row] < MOST_CLASSES else -1)
    again = choose_rows(labels, [f"c{code}" for code in range(14)])
    assert (found.rows == again.rows).all()


def test_others_under_ten_are_not_drawn_and_from_ten_on_are_one_class():
    labels = np.repeat([0, 1, 2, 3], [20, 10, 5, 4])
    few = choose_rows(labels, list("abcd"))
    assert (few.names, few.rows.max(), few.codes.min()) == (["a", "b"], 29, 0)
    more = choose_rows(np.append(labels, -1), list("abcd"))
    assert (more.names, len(more.rows), (more.codes == -1).sum()) == (["a", "b"], 40, 10)
    with pytest.raises(MissingError, match="under two classes have 10"):
        choose_rows(np.repeat([0, 1], [50, 9]), ["a", "b"])


def test_of_several_labels_a_row_a_class_is_their_set():
    labels = np.repeat(np.array([[1, 1], [1, 0], [0, 0], [1, -1]], dtype=np.int8), [12, 15, 11, 30], axis=0)
    found = choose_rows(labels, ["pain", "fever"])
    assert found.names == ["pain", "pain + fever", "none"]
    assert [(found.codes == code).sum() for code in (-1, 0, 1, 2)] == [30, 15, 12, 11]


def test_the_share_between_classes_ignores_others():
    x = np.array([[0.0, 0], [0, 2], [4, 0], [4, 2], [99, 99]])
    assert share_between(x, np.array([0, 0, 1, 1, -1])) == pytest.approx(16 / 20)
    assert np.isnan(share_between(x[:1].repeat(3, axis=0), np.array([0, 0, 1])))


def test_a_row_without_an_embedding_does_not_end_the_map():
    x = np.random.default_rng(0).normal(size=(30, 4))
    x[3] = 0.0
    found = project(None, x, np.repeat([0, 1], 15))
    assert np.isfinite(found.places).all()
    assert np.isfinite(found.between)


def test_numbers_stand_only_at_means_that_are_apart():
    means = np.array([[0.0, 0], [0.01, 0], [1, 1]])
    assert find_apart(means, 2.0).tolist() == [False, False, True]
