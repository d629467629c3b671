"""How fast training runs: needed FLOPs against torch's own count, the matrix peak, and what the curves tell of it."""

import json
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from raylab.base.memory import read_lap, read_peak, reset_peak, start_lap
from raylab.job.blocks import EncoderConfig, Pretrain
from raylab.training.batches import Inputs
from raylab.training.encoder import build_encoder, encode, load_encoder, precision, predict_tokens
from raylab.training.loop import load_training, train
from raylab.training.objectives import Learner
from raylab.training.pretrain import make_units, open_data, start_rung
from raylab.training.speed import describe_speed, flop_counter, list_windows, measure_peak

CPU = torch.device("cpu")


def make_inputs(num_texts, length, num_masked):
    """Texts of one length: a padded batch of them has no padding."""
    ids = np.random.default_rng(0).integers(5, 400, num_texts * length)
    selected = np.arange(0, len(ids), len(ids) // num_masked)[:num_masked]
    positions = np.tile(np.arange(length), num_texts)
    offsets = np.arange(0, len(ids) + 1, length)
    return Inputs(ids, positions, offsets, selected, ids[selected], np.arange(num_texts))


def count_by_torch(encoder, inputs, num_texts):
    """FLOPs, forward and backward, of the transformers model on a padded batch with plain attention and logits."""
    ids = torch.from_numpy(inputs.input_ids).view(num_texts, -1)
    # Torch's counter leaves the fused attention out on CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        hidden = encode(encoder, ids, torch.ones_like(ids)).flatten(0, 1)
        logits = predict_tokens(encoder, hidden[torch.from_numpy(inputs.selected)])
        F.cross_entropy(logits, torch.from_numpy(inputs.targets)).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_agree_with_torch_in_every_family(family, encoder_folders):
    encoder, _ = load_encoder(str(encoder_folders[family]))
    encoder.train()
    inputs = make_inputs(6, 40, 36)
    counted = flop_counter(Learner(encoder, Pretrain(), 0))(inputs)
    # Torch's masked attention computes all pairs, also those out of a window.
    windows = list_windows(encoder.config)
    if family == "modernbert":
        assert windows == {None: 1, 4: 1}
        pairs = sum(abs(i - j) > 4 for i in range(40) for j in range(40))
        counted += 3 * 4 * encoder.config.hidden_size * 6 * pairs
    else:
        assert windows == {None: 2}
    assert counted == pytest.approx(count_by_torch(encoder, inputs, 6), rel=0.005)


@pytest.mark.parametrize("length", [8, 128])
def test_flops_agree_with_torch_at_a_width_that_is_used(length, vocabulary):
    config = EncoderConfig(hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=512)
    encoder = build_encoder(config, vocabulary, 128, 0)
    inputs = make_inputs(4, length, 8)
    counted = flop_counter(Learner(encoder, Pretrain(), 0))(inputs)
    assert counted == pytest.approx(count_by_torch(encoder, inputs, 4), rel=0.005)


def test_flops_of_texts_add_up(vocabulary):
    """Packed with others, a text costs what it costs alone: nothing is counted for padding."""
    config = EncoderConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    count = flop_counter(Learner(build_encoder(config, vocabulary, 64, 0), Pretrain(), 0))
    ids = np.arange(5, 75)

    def cut(offsets, selected):
        selected = np.array(selected, dtype=int)
        return Inputs(ids[: offsets[-1]], ids[: offsets[-1]], np.array(offsets), selected, ids[selected], np.arange(1))

    both = count(cut([0, 60, 70], [3, 61]))
    assert both == pytest.approx(count(cut([0, 60], [3])) + count(cut([0, 10], [1])))
    assert both < count(cut([0, 70], [3, 61]))  # one text: each token sees them all


def test_what_the_curves_tell(make_spec, tmp_path):
    """Rates of a real training: tokens over the seconds in its loop, and the share of a peak that was measured."""
    changes = {"pretrain.num_tokens": 20_000, "pretrain.batch_tokens": 500, "pretrain.rungs": 1}
    spec = make_spec("declutr", changes, folder=tmp_path)
    data = open_data(spec)
    training = load_training(spec, data, start_rung(spec, data).path, resume=False)
    units = make_units(spec, data)
    with precision(CPU, False):
        peak = measure_peak(CPU)  # known from here on: the training need not measure it
    began = time.perf_counter()
    train(training, units, data, spec.settings.pretrain, 0, 10_000)
    time.sleep(0.3)  # as an evaluation between two rungs
    train(training, units, data, spec.settings.pretrain, 0, 20_000)
    seconds = time.perf_counter() - began
    progress = json.loads(json.dumps(training.progress.__dict__))
    curves = {}
    for point in progress["curves"]:
        curves.setdefault(point["metric"], {})[point["step"]] = point
    rates = curves["train_tokens_per_second"]
    before, spent = 0, 0.0
    for point in rates.values():
        spent += (point["tokens"] - before) / point["value"]
        before = point["tokens"]
    # Every second is in one point, but what lies outside the loop.
    assert 0 < spent + progress["spent"].get("seconds", 0.0) < seconds - 0.3
    flops = sum(point["value"] * peak * (point["tokens"] - at) / rates[step]["value"]
                for (step, point), at in zip(curves["train_mfu"].items(),
                                             [0, *(p["tokens"] for p in rates.values())], strict=False))  # fmt: skip
    assert flops + progress["spent"].get("needed", 0.0) == pytest.approx(progress["flops"])
    assert all(0 < point["value"] < 1 for point in curves["train_mfu"].values())
    # On a CPU the packed row has no padding, its attention has some.
    assert {point["value"] for point in curves["train_padding"].values()} == {0.0}
    assert all(0 < point["value"] < 0.3 for point in curves["train_attention_padding"].values())
    memory = [point["value"] for point in curves["train_peak_memory_gb"].values()]
    assert all(0.01 < value < read_peak(CPU) / 1e9 + 1e-6 for value in memory)


def test_shares_of_a_point():
    spent = {"seconds": 2.0, "tokens": 600.0, "needed": 5e9, "slots": 800.0, "attended": 1000.0, "peak": 1e10,
             "memory": 3e9}  # fmt: skip
    found = describe_speed(spent)
    assert found == pytest.approx(
        {"tokens_per_second": 300.0, "mfu": 0.25, "padding": 0.25, "attention_padding": 0.4, "peak_memory_gb": 3.0}
    )


def test_the_peak_is_measured_once_in_a_precision():
    first = measure_peak(CPU)
    assert first > 1e8
    assert measure_peak(CPU) == first
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert measure_peak(CPU) != first


def test_laps_have_peaks_of_their_own():
    """Of some pages the system's count lags."""
    reset_peak(CPU)
    before = read_peak(CPU)
    taken = np.ones(100 * 2**17)
    high = read_lap(CPU)
    assert high - before > 50 * 2**20
    del taken
    start_lap(CPU)
    assert read_lap(CPU) < high - 50 * 2**20
    assert read_peak(CPU) == pytest.approx(high, abs=2**20)
    taken = np.ones(200 * 2**17)
    assert read_peak(CPU) == pytest.approx(read_lap(CPU), abs=2**20)
    assert read_lap(CPU) > high + 50 * 2**20
    del taken
    start_lap(CPU, counted=False)
    assert read_peak(CPU) == pytest.approx(high, abs=2**20)
    reset_peak(CPU)
    assert read_peak(CPU) < high - 50 * 2**20
