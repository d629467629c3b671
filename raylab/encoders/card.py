"""The model card of an exported encoder: what made it, what it scored, where it ends. No document text, no paths."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from raylab.job.settings import SETTINGS
from raylab.measures.definitions import DEFINITIONS
from raylab.results.queries import list_ranked
from raylab.results.ranking import Interval, compute_interval
from raylab.results.tables import read_rows, read_trial
from raylab.store.stages import FOLDER

Rows = list[dict[str, Any]]
# What a cell of the scores is, beside its draw, its metric and its class.
CELL = ("task", "shots", "frozen_layers", "probe")
BASELINE = "tfidf"

USE = """## Use

```python
from sentence_transformers import SentenceTransformer

vectors = SentenceTransformer("DIRECTORY").encode(texts)
```

With `transformers` alone, the vector of a text is the mean of the last hidden states over all its tokens, special ones
included; it is not normalised:

```python
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("DIRECTORY"), AutoModel.from_pretrained("DIRECTORY").eval()
inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
with torch.inference_mode():
    hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"].unsqueeze(-1)
vectors = (hidden * mask).sum(1) / mask.sum(1)
```

A special token that is spelled out in a text is read as plain words; to fill masks, give the tokenizer
`split_special_tokens=False`.
"""


def write_card(results: Path, row: Mapping[str, Any], encoder: Path) -> str:
    """The card as Markdown. `row` is the trial's of `trials`, `encoder` the directory of its encoder."""
    config = json.loads((encoder / "config.json").read_text())
    job, trial_id = row["job"], row["trial_id"]
    scores, geometry = (
        [r for r in read_rows(results, job, table, trial_id) if r["rung"] == row["num_rungs"]]
        for table in ("scores", "geometry")
    )
    family, width = config["model_type"], config.get("hidden_size", config.get("dim"))
    parts = [
        "---\nlibrary_name: sentence-transformers\npipeline_tag: feature-extraction\n"
        f"tags: [sentence-transformers, feature-extraction, raylab]\n---\n# {trial_id}\n",
        f"An encoder of text ({family}, vectors of {width} numbers) from raylab's job `{job}`. "
        "It was made for a study of encoders, not for clinical decisions.\n",
        USE,
        "## What made it\n",
        _table(("", ""), _list_facts(row, encoder)),
        "Settings that decided its weights and how texts are cut:\n",
        _table(("setting", "value"), _list_settings(row)),
        "## Scores on validation\n",
        _describe_scores(results, row, scores),
        "## Embedding space, validation rows\n",
        _table(("task", "metric", "parameter", "value", "points"), _list_geometry(geometry)),
        "## Limits\n",
        "\n".join(f"- {line}" for line in _list_limits(row)),
    ]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts if part)


def _table(names: tuple[str, ...], rows: Iterator[tuple[Any, ...]]) -> str:
    lines = [names, tuple("---" for _ in names), *(tuple(_show(value) for value in row) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _show(value: Any) -> str:
    if isinstance(value, Interval):
        ends = f" [{value.low:.3f}, {value.high:.3f}]" if value.num_seeds > 1 else ""
        return f"{value.mean:.3f}{ends}"
    if value is None:
        return ""
    # A name may hold what Markdown reads as the end of a cell.
    return (f"{value:.4g}" if isinstance(value, float) else str(value)).replace("|", "\\|").replace("\n", " ")


def _start(row: Mapping[str, Any]) -> str:
    if row["encoder.trial"] is not None:
        return f"raylab's trial {row['encoder.trial']}"
    if row["encoder.pretrained"] is None:
        return "from scratch, random weights of its seed; the tokenizer was trained on the training documents"
    name = row["encoder.pretrained"]
    # A directory's place is of one machine: its name must do.
    shown = f"the directory '{Path(name).name}'" if Path(name).is_absolute() else name
    return shown + (f", revision {row['encoder.revision']}" if row["encoder.revision"] else "")


def _list_facts(row: Mapping[str, Any], encoder: Path) -> Iterator[tuple[Any, ...]]:
    objective = row["pretrain.objective"]
    yield "job, arm, seed", f"{row['job']}, {row['arm']}, {row['seed']}"
    yield "start", _start(row)
    yield "objective", "none: the encoder as it started" if objective == "none" else objective
    if objective != "none":
        yield (
            "pre-training",
            (f"{row['num_tokens']:,} tokens, {row['num_steps']:,} steps, {row['num_documents']:,} documents"),
        )
    if row["supervised_by"]:
        yield "supervised by", f"the metadata that it learned to predict are the label of: {row['supervised_by']}"
    yield "data", f"digest {row['data_digest']}"
    yield "weights", f"{encoder.parent.name} of the results folder, copied byte for byte"
    yield "code", row["code_version"]
    yield "trained on", f"{row['device']}, {row['started_at']:%Y-%m-%d}"


def _list_settings(row: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    blocks = ("pretrain.", "encoder.config.", "encoder.tokenizer.", "corpus.max_length", "corpus.long_documents")
    split = ("corpus.split.train", "corpus.split.validation", "corpus.split.test", "corpus.split.seed")
    for name in SETTINGS:
        if name.startswith((*blocks, *split)) and row[name] is not None:
            yield f"`{name}`", row[name]


def _cells(rows: Rows) -> dict[tuple[Any, ...], dict[str, float]]:
    """Cell -> metric -> its mean over draws; with the numbers of draws and of rows."""
    found: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for row in rows:
        if row["split"] != "validation" or row["value"] is None or row.get("class") is not None:
            continue
        cell = found.setdefault(tuple(row[name] for name in CELL), {})
        cell.setdefault(row["metric"], []).append(row["value"])
        if row["metric"] == "f1_macro":
            for name in ("num_train", "num_eval"):
                cell.setdefault(name, []).append(row[name])
    return {
        cell: {name: float(np.mean(values)) for name, values in measures.items()}
        | {"draws": len(measures.get("f1_macro", ()))}
        for cell, measures in found.items()
    }


def _read_arm(results: Path, row: Mapping[str, Any]) -> list[dict[tuple[Any, ...], dict[str, float]]]:
    """The cells of every ranked trial of the same arm in its job, one a seed: on a search's seeds it was chosen."""
    found = []
    for other in list_ranked(results, row["job"]):
        if other["arm"] == row["arm"]:
            trial = read_trial(results, row["job"], other["trial_id"])
            rows = read_rows(results, row["job"], "scores", other["trial_id"])
            found.append(_cells([r for r in rows if trial is not None and r["rung"] == trial["num_rungs"]]))
    return found


def _describe_scores(results: Path, row: Mapping[str, Any], scores: Rows) -> str:
    classes = _read_classes(results, row)
    seeds = _read_arm(results, row)
    baseline = _cells(read_rows(results, row["job"], "scores", f"baseline:{BASELINE}-{row['seed']}"))

    def list_rows() -> Iterator[tuple[Any, ...]]:
        for cell, here in _cells(scores).items():
            over = [seed[cell]["f1_macro"] for seed in seeds if "f1_macro" in seed.get(cell, {})]
            words = next((found for key, found in baseline.items() if key[:2] == cell[:2]), {})
            numbers = [here.get(name) for name in ("f1_macro", "accuracy")]
            counts = [None if name not in here else round(here[name]) for name in ("draws", "num_train", "num_eval")]
            shots = "all" if cell[1] is None else cell[1]
            yield (
                cell[0], shots, *cell[2:], *numbers, compute_interval(over) if over else None, len(over),
                words.get("f1_macro"), *counts,
            )  # fmt: skip

    names = (
        "task", "shots", "frozen layers", "probe", "macro-F1", "accuracy", "macro-F1 of the arm, 95 %", "seeds",
        "macro-F1 of TF-IDF", "draws", "training rows", "rows scored",
    )  # fmt: skip
    told = [f"- `{task}`: {len(found)} classes: {', '.join(map(str, found))}" for task, found in classes.items()]
    text = (
        "Means over draws of the shots (labelled examples a class). The arm's mean and t interval are over the seeds "
        "of this job: they speak of other seeds, given this split, not of other hospitals. The test split has no part "
        "in this page.\n\n"
    )
    if row["phase"] == "search":
        text += (
            "This trial is one of a search, which may have chosen its arm by these very scores: they flatter it.\n\n"
        )
    if row["evaluate.selection"] == "validation":
        text += "C and steps were chosen on these validation rows, which few labels would not have.\n\n"
    return text + _table(names, list_rows()) + ("\n" + "\n".join(told) if told else "")


def _read_classes(results: Path, row: Mapping[str, Any]) -> dict[str, list[str]]:
    """Task -> class names, from the coded corpus that the trial's evaluations name; empty where it is gone."""
    wanted: dict[str, str] = {}
    root = results / FOLDER
    for stage in read_rows(results, row["job"], "stages", row["trial_id"]):
        note = root / stage["stage_id"] / "stage.json"
        if stage["kind"] == "evaluate" and note.is_file():
            key = json.loads(note.read_text())["key"]
            wanted[f"task:{key['task']}"] = key["rows"]
    for path in sorted(root.glob("corpus-*/stage.json")):
        info = json.loads(path.read_text())["info"]
        if wanted and wanted.items() <= info["digests"].items():
            return {task: info["classes"][task] for task in (name.removeprefix("task:") for name in wanted)}
    return {}


def _list_geometry(geometry: Rows) -> Iterator[tuple[Any, ...]]:
    # Those of one value: the graphs' and the histograms' many are for the tables.
    shown = {
        name
        for name, definition in DEFINITIONS.items()
        if definition.parameter is None or (isinstance(definition.parameter, tuple) and len(definition.parameter) == 1)
    }
    for row in geometry:
        if row["metric"] in shown and row["value"] is not None:
            yield row["task"], row["metric"], row["parameter"], row["value"], row["num_points"]


def _list_limits(row: Mapping[str, Any]) -> Iterator[str]:
    longest = row["corpus.max_length"]
    yield "Not for clinical decisions: nothing here was tested on patients, and no threshold was set or validated."
    yield "All numbers are given this split of this corpus; another hospital's text, another time or task may differ."
    if row["corpus.long_documents"] == "windows":
        yield (
            f"The scores above are of averages over windows of {longest} tokens, which sentence-transformers can't do: "
            f"there, and in the code above, what is longer is cut off, and only shorter texts have "
            "raylab's vectors."
        )
    else:
        yield f"Texts are cut to {longest} tokens, special ones included: what stands behind is not seen."
    if row["device"] != "cpu":
        yield "The scores are of vectors computed in bf16 on a GPU; those in float32 differ a little."
    if row["pretrain.objective"] == "none":
        yield "No pre-training of raylab's: the masked-language head is the start's own, or random where it had none."
    else:
        yield (
            "The weights were trained on the corpus and may give parts of it away: where its texts are confidential, "
            "so is this directory."
        )
