import numpy as np
import pytest
import torch
from torch import nn

from raylab.base.mistakes import JobError
from raylab.base.world import ALONE
from raylab.job.blocks import Pretrain
from raylab.job.specs import Resources
from raylab.training import projection
from raylab.training.compilation import can_compile, choose_room, pays, round_norms
from raylab.training.dropout import replace_dropout
from raylab.training.encoder import load_encoder
from raylab.training.loop import load_training, prepare_encoder, train
from raylab.training.objectives import Learner
from raylab.training.pretrain import make_units, open_data, start_rung


@pytest.mark.parametrize("capacity", [100, 1000, 23_700, 100_000])
def test_rooms_are_few_and_hold_their_tokens(capacity):
    tokens = np.arange(1, 2 * capacity + 1, max(1, capacity // 500))
    rooms = np.array([choose_room(int(num), capacity) for num in tokens])
    assert (rooms >= tokens).all()
    assert (rooms % 128 == 0).all()
    assert len(set(rooms[tokens <= capacity].tolist())) <= 16
    # A full row takes the least room, and more than it a little more.
    assert choose_room(capacity, capacity) == -(-capacity // 128) * 128
    assert (rooms - tokens < 128 + capacity / 16 + 128).all()


def test_short_trainings_go_without():
    assert not pays(1e15, 10**6)
    assert pays(1e17, 10**6)
    assert pays(1e12, 10**9)


@pytest.mark.skipif(can_compile(torch.device("cuda")) and torch.cuda.is_available(), reason="there is such a GPU")
def test_always_needs_a_gpu(encoder_folders):
    learner = Learner(load_encoder(str(encoder_folders["roberta"]))[0], Pretrain(), 0)
    prepare_encoder(learner, Resources(), ALONE)
    assert learner.dropout is None
    with pytest.raises(JobError, match=r"resources\.compile"):
        prepare_encoder(learner, Resources(compile="always"), ALONE)


def test_norms_are_rounded_in_training_under_autocast_alone(encoder_folders, monkeypatch):
    model = load_encoder(str(encoder_folders["modernbert"]))[0].train()
    round_norms(model)
    norms = {name: m for name, m in model.base_model.named_modules() if isinstance(m, nn.LayerNorm)}
    x = torch.randn(2, 3, next(iter(norms.values())).normalized_shape[0])
    types = {True: {}, False: {}}
    for half in types:
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device, half=half: half)
        types[half] = {name: norm(x).dtype for name, norm in norms.items()}
    assert set(types[False].values()) == {torch.float32}
    # What all layers add to begins with the embeddings' norm.
    assert types[True] == {name: torch.float32 if "embeddings" in name else torch.bfloat16 for name in norms}
    model.eval()
    assert {norm(x).dtype for norm in norms.values()} == {torch.float32}


@pytest.mark.parametrize("objective", ["mlm", "declutr", "supervised_contrastive"])
def test_rows_of_fixed_shape_train_the_same(objective, make_spec, monkeypatch):
    """As where an encoder is compiled, but for the compiling: weights of padded rows and of plain ones, no dropout."""
    targets = set()

    def compare(logits, wanted):
        targets.add(len(wanted))
        return projection._compare_fused(logits, wanted)

    monkeypatch.setattr(projection, "_compare_compiled", compare)
    spec = make_spec(objective, {"encoder.config.dropout": 0.0, "pretrain.batch_tokens": 700})
    data, pretrain, shapes = open_data(spec), spec.settings.pretrain, set()
    found = []
    for compiled in (False, True):
        training = load_training(spec, data, start_rung(spec, data).path, resume=False)
        learner = training.learner
        if compiled:
            learner.dropout = replace_dropout(learner.encoder.base_model)
            learner.encoder.base_model.register_forward_pre_hook(
                lambda module, args, kwargs: shapes.add(kwargs["input_ids"].shape), with_kwargs=True
            )
        train(training, make_units(spec, data), data, pretrain, spec.seed, 3000)
        found.append({name: p.detach().clone() for name, p in learner.named_parameters()})
        assert training.progress.step >= 4
    # Of one length; texts of 64 tokens fill 640 of 700.
    assert shapes == {(1, 768 if objective == "declutr" else 640)}
    assert targets == {256}
    for name, weights in found[0].items():
        torch.testing.assert_close(found[1][name], weights, rtol=1e-4, atol=2e-6)
