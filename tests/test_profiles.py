"""Profiles of tiny encoders: every cell is there and adds up; the commands' tables, charts and refusals."""

import json

import matplotlib.image
import numpy as np
import pytest
import torch

from raylab.base.mistakes import JobError
from raylab.cli import main
from raylab.encoders.chart import GREYS, LINES, MARKERS, plot_profile
from raylab.encoders.profiles import HEAD_SIZE, NUM_CLASSES, Load, check_load, profile_encoder, read_numbers
from raylab.runs.preparation import make_spec, prepare
from raylab.runs.trial import run_trial
from raylab.store.stages import FOLDER
from raylab.training.encoder import load_encoder

CPU = Load(("cpu",), batches=(1, 3), lengths=(8, 40), repeats=4, seconds=60.0)


def call(*arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


@pytest.fixture(scope="module")
def rows(encoder_folders):
    return profile_encoder(str(encoder_folders["roberta"]), CPU)


def test_every_cell_is_measured_once(rows):
    cells = [(row["device"], row["precision"], row["batch"], row["work"], row["length"]) for row in rows]
    wanted = {
        ("cpu", precision, batch, *work)
        for precision in ("float32", "bf16")
        for batch in (1, 3)
        for work in (("encode", 8), ("encode", 40), ("kept", None))
    }
    assert len(cells) == len(wanted)
    assert set(cells) == wanted
    assert {row["calls"] for row in rows} == {4}


def test_rates_follow_from_the_median(rows):
    kept = {(row["precision"], row["batch"]): row for row in rows if row["work"] == "kept"}
    for row in rows:
        assert 0 < row["p50_ms"] <= row["p95_ms"]
        assert row["texts_per_s"] == pytest.approx(1000 * row["batch"] / row["p50_ms"])
        if row["work"] == "encode":
            assert row["tokens_per_s"] == pytest.approx(row["texts_per_s"] * row["length"])
            beside = kept[row["precision"], row["batch"]]
            assert row["kept_speedup"] == pytest.approx(row["p50_ms"] / beside["p50_ms"])
        else:
            assert row["tokens_per_s"] is None
            assert row["kept_speedup"] is None
        # torch and the interpreter alone take more than this, and no tiny encoder takes this much.
        assert 50 < row["peak_mb"] < 20_000


@pytest.mark.parametrize("family", ["roberta", "distilbert", "modernbert"])
def test_what_is_timed(family, encoder_folders, monkeypatch):
    """Batches of whole texts without padding enter an encoder of the precision named; class scores leave."""
    seen, left = [], []
    real = torch.nn.Sequential.forward

    def watch(head, x):
        out = real(head, x)
        if out.shape[-1] == NUM_CLASSES:
            left.append((tuple(x.shape), tuple(out.shape)))
        return out

    model, _ = load_encoder(str(encoder_folders[family]))
    kind = type(model.base_model)
    forward = kind.forward

    def look(self, input_ids, attention_mask, **more):
        ids = input_ids
        seen.append(
            (next(self.parameters()).dtype, tuple(ids.shape), int(attention_mask.sum()), 1 in ids, int(ids.max()))
        )
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, **more)

    monkeypatch.setattr(kind, "forward", look)
    monkeypatch.setattr(torch.nn.Sequential, "forward", watch)
    profile_encoder(str(encoder_folders[family]), CPU._replace(batches=(3,), lengths=(40,), repeats=1))
    assert {(dtype, shape, total) for dtype, shape, total, _, _ in seen} == {
        (torch.float32, (3, 40), 120),
        (torch.bfloat16, (3, 40), 120),
    }
    assert not any(padded for *_, padded, _ in seen)  # the padding token is 1
    assert all(largest < 400 for *_, largest in seen)
    assert set(left) == {((3, 16), (3, NUM_CLASSES))}
    assert len(left) == 2 * len(seen)  # as often from an embedding that is kept
    assert HEAD_SIZE == 128


def test_time_ends_the_calls(encoder_folders):
    quick = CPU._replace(precisions=("float32",), repeats=50, seconds=0.0)
    assert {row["calls"] for row in profile_encoder(str(encoder_folders["bert"]), quick)} == {3}


def test_usual_lengths_end_where_the_encoder_does():
    assert check_load(CPU._replace(lengths=None), 512) == (32, 128, 512)
    assert check_load(CPU._replace(lengths=None), 80) == (32,)
    assert check_load(CPU._replace(lengths=None), 20) == (20,)
    assert check_load(CPU._replace(lengths=None), None) == (32, 128, 512)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--lengths", "8,100"], "--lengths: 100 exceeds the encoder's 78 positions; lower it"),
        (["--precisions", "float32,int4"], "--precisions: 'int4' is not one of float32, bf16"),
        (["--devices", "tpu"], "--devices: 'tpu' is not one of cpu"),
        (["--batches", "1,none"], "--batches: '1,none' must be whole numbers above 0"),
        (["--batches", "0"], "must be whole numbers above 0"),
        (["--plot", "chart.pdf"], "must end with .png or .svg"),
        (["--plot", "/nowhere/at/all/chart.png"], "its folder is not there"),
    ],
)
def test_a_wrong_request_is_refused(arguments, problem, encoder_folders, capsys):
    assert call("profile", encoder_folders["roberta"], *arguments) == 2
    shown = capsys.readouterr()
    assert problem in shown.err
    assert not shown.out


def test_an_encoder_that_is_not_there_is_refused(tmp_path, capsys):
    for name in (tmp_path, "nobody/nothing"):
        assert call("profile", name) == 2
        assert "is no encoder's directory, Hugging Face name or trial" in capsys.readouterr().err
    assert call("profile", "f" * 12 + "-0", "--results", tmp_path) == 2
    assert "profile: no trial" in capsys.readouterr().err


def test_numbers_are_read():
    assert read_numbers("--batches", "1, 8,8") == (1, 8)
    with pytest.raises(JobError):
        read_numbers("--batches", "")


def test_a_trial_is_profiled_by_its_id(make_job, tmp_path, capsys):
    job = make_job("mlm", {"pretrain": {"objective": "none"}})
    row = run_trial(make_spec(prepare(job, tmp_path), {}, 0, "fixed"))
    options = ("--batches", "2", "--lengths", "16", "--precisions", "float32", "--repeats", "2")
    chart = tmp_path / "chart.svg"
    request = ("profile", row["trial_id"], "--results", tmp_path, *options, "--format", "json", "--plot", chart)
    assert call(*request) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(r["work"], r["batch"], r["length"]) for r in found] == [("encode", 2, 16), ("kept", 2, None)]
    assert chart.read_text().startswith("<?xml")
    assert (tmp_path / FOLDER).is_dir()


def test_the_chart_tells_series_apart_without_colour(rows, tmp_path):
    plot_profile(rows, "tiny", tmp_path / "chart.png")
    image = matplotlib.image.imread(tmp_path / "chart.png")[..., :3]
    assert image.shape[0] > 500
    assert np.abs(image - image.mean(2, keepdims=True)).max() < 0.01  # grey
    dark = (image.mean(2) < 0.4).sum()
    assert 1000 < dark < 0.2 * image.shape[0] * image.shape[1]
    # What does not fit a GPU leaves a gap.
    missing = [row | dict.fromkeys(("p50_ms", "p95_ms", "texts_per_s")) if row["batch"] == 3 else row for row in rows]
    plot_profile(missing, "tiny", tmp_path / "gap.png")
    assert (matplotlib.image.imread(tmp_path / "gap.png")[..., :3].mean(2) < 0.4).sum() < dark


def test_a_chart_of_many_batches_is_whole_and_no_two_look_alike(rows, tmp_path):
    device, precision = rows[0]["device"], rows[0]["precision"]
    column = [row for row in rows if (row["device"], row["precision"], row["batch"]) == (device, precision, 1)]
    many = [row | {"batch": 2**power} for power in range(8) for row in column]
    plot_profile(many, "tiny", tmp_path / "chart.png")
    image = matplotlib.image.imread(tmp_path / "chart.png")[..., :3].mean(2)
    edges = np.concatenate([image[:, :4], image[:, -4:]], axis=1)
    assert edges.min() > 0.9  # a legend that is too wide would be cut off here
    looks = {tuple(style[number % len(style)] for style in (GREYS, MARKERS, LINES)) for number in range(28)}
    assert len(looks) == 28
