"""Does fast training learn the same? Loss curves of packed, compiled bf16 steps beside plain padded float32 ones.

    python benchmarks/quality.py --data DIR     # DIR holds medquad/documents.parquet and passages.parquet

jobs/medquad.yaml with a 6 x 384 encoder from scratch, objective declutr, 500 steps of 16,384 tokens: both sides have
the same documents, spans, masks, first weights and learning rates. raylab's side is its own loop as a trial runs it (on
a GPU compiled, in bf16). The other pads anchors and positives, in two passes, in float32 throughout (no TF32). Without
dropout both compute the same, up to rounding; with it the padded side runs twice, with other draws, which says how far
apart two equal recipes end. Attention has no dropout on either side. The last line is JSON: with and without dropout,
for either loss the mean and largest distance of 50 points, each a mean of ten steps, of raylab from the first padded
run and of the second from it.

Then the job's own budget of 20 million tokens, and of held-out documents the share whose following span is not found
among 256: `retrieval_error_untrained`, `retrieval_error`, and the share that was cut, `error_cut`.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recipes import compute_losses
from torch import nn

from raylab.base.noise import derive_seed
from raylab.base.world import ALONE
from raylab.job.jobs import load_job
from raylab.job.specs import TrialSpec
from raylab.runs.preparation import make_spec, prepare
from raylab.training.encoder import choose_device
from raylab.training.loop import (
    CURVE_POINTS,
    Data,
    Training,
    learning_rate,
    load_learner,
    load_training,
    make_optimizer,
    train,
)
from raylab.training.objectives import loss_weights
from raylab.training.pretrain import make_units, measure_rung, open_data, start_rung
from raylab.training.rungs import list_rungs
from raylab.training.steps import Place, iterate_steps

JOB = Path(__file__).parent.parent / "jobs" / "medquad.yaml"
ENCODER = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
LOSSES = ("mlm", "declutr")


def make_trial(
    data: Path, results: Path, steps: int, batch_tokens: int, compiled: str, dropout: float = 0.1
) -> tuple[TrialSpec, Data, Path]:
    """The trial on either side, its inputs, and the folder of its first weights."""
    documents, passages = (data / "medquad" / f"{name}.parquet" for name in ("documents", "passages"))
    changes = {
        "encoder": {"config": ENCODER | {"dropout": dropout}, "tokenizer": {"vocab_size": 16_000}, "pretrained": None},
        "corpus.documents.path": str(documents),
        "corpus.tasks.question_type.path": str(passages),
        "corpus.tasks.semantic_type.path": str(documents),
        "search": {"space": None, "design": "grid", "seeds": [0]},
        "analysis": None,
        "pretrain.objective": "declutr",
        "pretrain.learning_rate": 5e-4,
        "pretrain.batch_tokens": batch_tokens,
        "pretrain.num_tokens": steps * batch_tokens,
        "resources.compile": compiled,
    }
    job = load_job(JOB, overrides=changes)
    spec = make_spec(prepare(job, results), {}, 0, "fixed")
    data_ = open_data(spec)
    return spec, data_, start_rung(spec, data_).path


def run_ours(spec: TrialSpec, data: Data, folder: Path) -> tuple[dict[str, list[float]], Training]:
    """The points of a trial's curves, and what was trained."""
    training = load_training(spec, data, folder, resume=False)
    pretrain = spec.settings.pretrain
    train(training, make_units(spec, data), data, pretrain, spec.seed, pretrain.num_tokens, ALONE)
    curves = training.progress.curves
    points = {name: [p["value"] for p in curves if p["metric"] == f"train_{name}_loss"] for name in LOSSES}
    return points, training


def measure_error(spec: TrialSpec, data: Data, training: Training | None) -> float:
    """The retrieval error of a training's encoder; of the first weights without one."""
    chain = list_rungs(spec)
    rung = len(chain) - 1 if training else 0
    return 1 - float(measure_rung(spec, data, chain, rung, training).info["heldout_retrieval_accuracy"])


def run_padded(spec: TrialSpec, data: Data, folder: Path, dropout: int) -> dict[str, list[float]]:
    """The same points of plain steps."""
    pretrain, units = spec.settings.pretrain, make_units(spec, data)
    learner, weights = load_learner(spec, data, folder, trained=False).train(), loss_weights(pretrain)
    for layer in learner.encoder.base_model.encoder.layer:  # type: ignore[union-attr, operator]
        layer.attention.self.dropout.p = 0.0  # packed attention has none
    optimizer = make_optimizer(learner, pretrain)
    steps = iterate_steps(units, pretrain.batch_tokens, spec.seed, Place(0, 0))
    points: dict[str, list[float]] = {name: [] for name in LOSSES}
    tokens, number, sums = 0, 0, dict.fromkeys(LOSSES, 0.0)
    point, since = pretrain.num_tokens / CURVE_POINTS, 0
    while tokens < pretrain.num_tokens:
        step = next(steps)
        torch.manual_seed(derive_seed(dropout, number))
        losses = compute_losses(learner, units.build(step.epochs, step.units), data.vocabulary.pad_id)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(pretrain, tokens + step.num_tokens / 2)
        torch.stack([weights[name] * value for name, value in losses.items()]).sum().backward()
        nn.utils.clip_grad_norm_(learner.parameters(), pretrain.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        before, tokens, number, since = tokens, tokens + step.num_tokens, number + 1, since + 1
        for name, value in losses.items():
            sums[name] += float(value.detach())
        if before // point < tokens // point:
            for name in LOSSES:
                points[name].append(sums[name] / since)
            sums, since = dict.fromkeys(LOSSES, 0.0), 0
    return points


def compare(ours: list[float], other: list[float]) -> dict[str, float]:
    """How far apart two curves are, in nats."""
    apart = np.abs(np.array(ours) - np.array(other))
    return {"mean": round(float(apart.mean()), 4), "largest": round(float(apart.max()), 4)}


def describe(title: str, runs: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Prints every fifth point of the runs' curves, and returns how far apart they are."""
    found = {}
    for loss in LOSSES:
        curves = {name: run[loss] for name, run in runs.items()}
        for at in range(0, len(curves["raylab"]), 5):
            values = ", ".join(f"{name} {curve[at]:.4f}" for name, curve in curves.items())
            print(f"{title}, {loss}, point {at}: {values}", flush=True)
        found[loss] = {"first": curves["raylab"][0]} | {f"last_{name}": curve[-1] for name, curve in curves.items()}
        found[loss]["raylab_from_padded"] = compare(curves["raylab"], curves["padded"])
        if "again" in curves:
            found[loss]["padded_from_padded"] = compare(curves["again"], curves["padded"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500, help="default %(default)s")
    parser.add_argument("--tokens", type=int, default=16_384, help="a step (default %(default)s)")
    parser.add_argument("--budget", type=int, default=20_000_000, help="tokens; 0: none (default %(default)s)")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    compiled = "always" if choose_device().type == "cuda" else "auto"
    results: dict[str, Any] = {"steps": options.steps, "device": choose_device().type}
    with tempfile.TemporaryDirectory() as folder:
        for name, dropout in (("without_dropout", 0.0), ("with_dropout", 0.1)):
            trial = make_trial(options.data.resolve(), Path(folder), options.steps, options.tokens, compiled, dropout)
            runs = {"raylab": run_ours(*trial)[0], "padded": run_padded(*trial, 1)}
            if dropout:
                runs["again"] = run_padded(*trial, 2)
            results[name] = describe(name, runs)
        if options.budget:
            trial = make_trial(
                options.data.resolve(), Path(folder), options.budget // options.tokens, options.tokens, compiled
            )
            untrained = measure_error(trial[0], trial[1], None)
            points, training = run_ours(*trial)
            error = measure_error(trial[0], trial[1], training)
            results |= {
                "budget": training.progress.tokens,
                "last_mlm": points["mlm"][-1], "last_declutr": points["declutr"][-1],
                "retrieval_error_untrained": round(untrained, 4), "retrieval_error": round(error, 4),
                "error_cut": round(1 - error / untrained, 4),
            }  # fmt: skip
    print(json.dumps(results))


if __name__ == "__main__":
    main()
