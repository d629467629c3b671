import numpy as np
import pytest
import torch
from torch import nn

from raylab.base.mistakes import JobError
from raylab.base.world import ALONE
from raylab.job.blocks import Pretrain
from raylab.job.specs import Resources
from raylab.training.compilation import can_compile, choose_room, pays, round_norms
from raylab.training.encoder import load_encoder
from raylab.training.loop import prepare_encoder
from raylab.training.objectives import Learner


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


def test_norms_are_rounded_under_autocast_alone(encoder_folders):
    model = load_encoder(str(encoder_folders["bert"]))[0].train()
    round_norms(model)
    norms = [module for module in model.base_model.modules() if isinstance(module, nn.LayerNorm)]
    x = torch.randn(2, 3, norms[0].normalized_shape[0])
    assert norms
    assert all(norm(x).dtype == torch.float32 for norm in norms)
