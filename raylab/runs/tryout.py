"""A few real training steps on this machine, to tell the time before any trial has run."""

import time

import numpy as np
import torch
from torch import nn

from raylab.base.mistakes import InfeasibleError
from raylab.base.world import ALONE
from raylab.job.specs import TrialSpec
from raylab.training.dropout import quicken
from raylab.training.encoder import build_encoder, choose_device
from raylab.training.loop import (
    Data,
    NotFiniteError,
    Progress,
    Training,
    make_optimizer,
    prepare_encoder,
    train,
)
from raylab.training.objectives import Learner
from raylab.training.pretrain import make_units, open_data
from raylab.training.speed import flop_counter, measure_peak

# The share of a matrix peak that a first step is expected to reach at least.
LEAST_SHARE = 0.15


def try_out(spec: TrialSpec, seconds: float) -> float | None:
    """Tokens a second of real steps, uncompiled, with a trial's own documents and random weights; nothing is kept.

    On the GPU where the trial would take one, else on the CPU. A step is as large as some of them fit into `seconds`,
    up to the trial's own; None where even one of a single document would not, and where the arm can't work.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(spec.settings.resources.cpus_per_worker)
    try:
        return _try_out(spec, seconds)
    except (InfeasibleError, NotFiniteError, torch.OutOfMemoryError):
        return None
    finally:
        torch.set_num_threads(before)


def _try_out(spec: TrialSpec, seconds: float) -> float | None:
    data, pretrain, resources = open_data(spec), spec.settings.pretrain, spec.settings.resources
    device = choose_device() if resources.gpus_per_worker != 0 else torch.device("cpu")
    units = make_units(spec, data)
    with torch.device("meta"):
        count = flop_counter(Learner(_build_encoder(spec, data), pretrain, data.num_categories))
    single = units.build(np.zeros(1, dtype=np.int64), np.arange(1))
    if count(single) > LEAST_SHARE * measure_peak(device) * seconds / 3:
        return None
    learner = Learner(_build_encoder(spec, data), pretrain, data.num_categories).to(device)
    quicken(learner.encoder)
    prepare_encoder(learner, resources.model_copy(update={"compile": "never"}), ALONE)
    # Of so many tokens no point of a curve is reached: what is spent is summed to the end.
    pretrain = pretrain.model_copy(update={"batch_tokens": 1, "num_tokens": 2**60})
    training = Training(learner, make_optimizer(learner, pretrain), Progress())
    progress, threads = training.progress, torch.get_num_threads()

    def step() -> tuple[int, float]:
        """Tokens, and seconds; on a CPU those of each thread: what else the machine does meanwhile counts little."""
        before, began, progress.spent = progress.tokens, time.process_time(), {}
        until, chunk_tokens = progress.tokens + 1, resources.chunk_tokens
        train(training, units, data, pretrain, spec.seed, until, chunk_tokens=chunk_tokens)
        took = (time.process_time() - began) / threads if device.type == "cpu" else progress.spent["seconds"]
        return progress.tokens - before, took

    step()  # makes the optimiser's state
    tokens, took = step()
    size = max(1, min(spec.settings.pretrain.batch_tokens, int(tokens / took * seconds / 4)))
    pretrain = pretrain.model_copy(update={"batch_tokens": size})
    steps, began = [step()], time.perf_counter()
    while time.perf_counter() - began < seconds / 4:
        steps.append(step())
    return sum(tokens for tokens, _ in steps) / sum(took for _, took in steps)


def _build_encoder(spec: TrialSpec, data: Data) -> nn.Module:
    """As the trial's, but for its weights."""
    start = spec.settings.encoder
    if start.config is not None:
        return build_encoder(start.config, data.vocabulary, spec.settings.corpus.max_length, spec.seed)
    from transformers import AutoConfig, AutoModelForMaskedLM

    assert spec.encoder_path is not None
    config = AutoConfig.from_pretrained(spec.encoder_path, revision=start.revision or "main")
    encoder: nn.Module = AutoModelForMaskedLM.from_config(config)
    return encoder
