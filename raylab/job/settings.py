"""The settings of a job by dotted name: which exist, which are read, which can be searched, and their values."""

import json
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from raylab.base.mistakes import JobError
from raylab.job.explanations import explain, inner_types, model_of
from raylab.job.specs import Choices, Job, Target, TrialSpec
from raylab.measures.definitions import DEFINITIONS

# Settings that a search space may vary. The corpus is shared by all arms, so only its cutting may differ.
ARM_BLOCKS = ("corpus.max_length", "corpus.long_documents", "encoder.", "pretrain.", "evaluate.")

# Which blocks of pretrain each objective reads; a block not read is null in tables and outside the arm's hash.
OBJECTIVE_BLOCKS: dict[str, tuple[str, ...]] = {
    "none": (),
    "mlm": ("mlm",),
    "declutr": ("mlm", "declutr"),
    "metadata": ("mlm", "metadata"),
}
ENCODER_STARTS = ("encoder.pretrained", "encoder.trial")
LOSS_BLOCKS = ("mlm", "declutr", "metadata")

# Every supported family puts one token before and one behind a text.
SPECIAL_TOKENS = 2


# Named here, not imported, so that a job file is checked without scikit-learn; a test holds them equal.
SCORE_METRICS = (
    "f1_macro",
    "f1_micro",
    "f1_weighted",
    "accuracy",
    "balanced_accuracy",
    "precision_macro",
    "recall_macro",
    "roc_auc",
    "average_precision",
    "calibration_error",
    "f1_class",
    "precision_class",
    "recall_class",
    "roc_auc_class",
    "average_precision_class",
)


def _walk(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        inner = model_of(field.annotation)
        mapping = any(typing.get_origin(t) is dict for t in inner_types(field.annotation))
        if inner is not None and not mapping:
            yield from _walk(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


# Every setting of a job by its dotted name, in the order of the models; values are pydantic's field descriptions.
SETTINGS: dict[str, Any] = {
    name: field for name, field in _walk(Job) if name.split(".")[0] in ("corpus", "encoder", "pretrain", "evaluate")
}


def list_settings(job: Job) -> dict[str, Any]:
    """Dotted setting -> plain value, null where the chosen objective (or start, or loss) does not read it."""
    dumped = job.model_dump(mode="json")
    values: dict[str, Any] = {}
    for name in SETTINGS:
        value: Any = dumped
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        values[name] = value if is_read(job, name) else None
    if job.corpus.split.column is not None:
        for field in ("train", "validation", "test", "seed", "vary"):
            values[f"corpus.split.{field}"] = None
    return values


def list_measures(job: Job) -> dict[str, Any]:
    """The settings and, with them, the search's targets: what a row of `trials` was measured by."""
    return list_settings(job) | {"search.targets": [t.model_dump(mode="json") for t in job.search.targets]}


def label_values(values: Mapping[str, Any]) -> str:
    """Some settings for people: their last names and values; null ones left out."""
    return ", ".join(
        f"{name.rsplit('.', 1)[-1]}={value:.4g}" if isinstance(value, float) else f"{name.rsplit('.', 1)[-1]}={value}"
        for name, value in values.items()
        if value is not None
    )


def dump_job(job: Job) -> dict[str, Any]:
    """The job as plain values that `Job` takes back."""
    raw = job.model_dump(mode="json")
    if job.corpus.split.column is not None:
        raw["corpus"]["split"] = {key: raw["corpus"]["split"][key] for key in ("column", "values")}
    for target in raw["search"]["targets"]:
        if target["table"] == "geometry":
            for key in ("shots", "probe", "frozen_layers", "class"):
                del target[key]
    return raw


def dump_spec(spec: TrialSpec) -> str:
    """A trial's spec as JSON: what travels to workers."""
    return json.dumps(spec.model_dump(mode="json", exclude={"settings"}) | {"settings": dump_job(spec.settings)})


def is_read(job: Job, name: str) -> bool:
    """Whether the objective, the loss and, where it is searched, the freeze depth that a job has set read a setting."""
    if name.startswith("evaluate.fine_tune.") and "evaluate.frozen_layers" in job.search.space:
        fine_tuned = any(depth != "all" for depth in job.evaluate.frozen_layers)
        if name == "evaluate.fine_tune.learning_rate":
            return fine_tuned
        return fine_tuned or "mlp" in job.evaluate.probes or name == "evaluate.fine_tune.class_weights"
    if not name.startswith("pretrain.") or name == "pretrain.objective":
        return True
    block = name.split(".")[1]
    if job.pretrain.objective == "none" or (
        block in LOSS_BLOCKS and block not in OBJECTIVE_BLOCKS[job.pretrain.objective]
    ):
        return False
    return name != "pretrain.metadata.temperature" or job.pretrain.metadata.loss == "supervised_contrastive"


def possible_values(job: Job, name: str) -> set[Any]:
    """All values that a setting can take in this job."""
    base: Any = job
    for part in name.split("."):
        base = getattr(base, part, None)
    values = set(base) if isinstance(base, tuple) else {base}
    entry = job.search.space.get(name)
    if isinstance(entry, Choices):
        values |= {v for choice in entry.choices for v in (choice if isinstance(choice, list) else [choice])}
    return values


def list_boundaries(job: Job) -> list[str]:
    """The freeze depths whose hidden states are kept, over all arms of the job: they share one pass."""
    depths = possible_values(job, "evaluate.frozen_layers") - {"all", "none"}
    return sorted(depths, key=lambda depth: int(depth) if depth.isdigit() else 0)


def list_unread(job: Job) -> list[str]:
    """The settings of pretrain that no arm of this job reads."""
    arms = [
        job.model_copy(
            update={
                "pretrain": job.pretrain.model_copy(
                    update={"objective": objective, "metadata": job.pretrain.metadata.model_copy(update={"loss": loss})}
                )
            }
        )
        for objective in possible_values(job, "pretrain.objective") & set(OBJECTIVE_BLOCKS)
        for loss in possible_values(job, "pretrain.metadata.loss")
    ]
    return [n for n in SETTINGS if n.startswith("pretrain.") and not any(is_read(arm, n) for arm in arms)]


def with_settings(job: Job, values: Mapping[str, Any]) -> Job:
    """The job with some settings changed; raises JobError with the rules that the result breaks.

    A setting that holds a list takes a single value as a list of one: a freeze depth is searched as one value.
    """
    raw = dump_job(job)
    for name, value in values.items():
        *path, last = name.split(".")
        block = raw
        for part in path:
            if block.get(part) is None:
                block[part] = {}
            block = block[part]
        block[last] = [value] if is_list(name) and not isinstance(value, list) else value
        if name in ENCODER_STARTS:  # one start takes the place of the others
            block.update({key: None for key in ("pretrained", "trial", "config", "tokenizer") if key != last})
    try:
        changed = Job.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise JobError(explain(error)) from None
    if problems := check_settings(changed):
        raise JobError(problems)
    return changed


def check_settings(job: Job) -> list[str]:
    """Rules across blocks, one line for each that is broken. A searched arm that breaks one is infeasible."""
    problems: list[str] = []
    pretrain, longest = job.pretrain, job.corpus.max_length - SPECIAL_TOKENS
    if pretrain.objective == "declutr" and pretrain.declutr.max_span > longest:
        problems.append(
            f"pretrain.declutr.max_span: {pretrain.declutr.max_span} tokens and {SPECIAL_TOKENS} special ones exceed "
            f"corpus.max_length ({job.corpus.max_length}); at most {longest}"
        )
    if job.evaluate.retrieval.span > longest:
        problems.append(f"evaluate.retrieval.span: at most {longest} with corpus.max_length {job.corpus.max_length}")
    if pretrain.objective == "mlm" and pretrain.mlm.weight == 0:
        problems.append("pretrain.mlm.weight: 0 leaves objective mlm nothing to learn; use objective none, or raise it")
    if pretrain.objective != "none":
        if job.resources.compile == "always" and pretrain.precision == "float32":
            problems.append("resources.compile: 'always' needs bf16; set it to auto, or pretrain.precision to auto")
        if pretrain.num_tokens < pretrain.rungs * pretrain.batch_tokens:
            problems.append(
                f"pretrain.num_tokens: {pretrain.num_tokens} is under rungs x batch_tokens "
                f"({pretrain.rungs} x {pretrain.batch_tokens}); raise it or lower those"
            )
        # No step holds more: a larger text, or the spans of a document, would fit in none.
        largest = job.corpus.max_length
        if pretrain.objective == "declutr":
            spans = pretrain.declutr.num_anchors * (1 + pretrain.declutr.num_positives)
            largest = spans * (pretrain.declutr.max_span + SPECIAL_TOKENS)
        if pretrain.batch_tokens < largest:
            problems.append(
                f"pretrain.batch_tokens: {pretrain.batch_tokens} must be {largest} or more: the largest text or a "
                "document's spans"
            )
    if job.encoder.config is not None:
        layers = job.encoder.config.num_hidden_layers
        for depth in job.evaluate.frozen_layers:
            if depth.isdigit() and int(depth) > layers:
                problems.append(f"evaluate.frozen_layers: '{depth}' exceeds the encoder's {layers} layers")
    return problems


def is_list(name: str) -> bool:
    """Whether a setting holds a list."""
    return any(typing.get_origin(t) is tuple for t in inner_types(SETTINGS[name].annotation))


def is_integer(name: str) -> bool:
    """Whether a setting holds a whole number."""
    return any(t is int for t in inner_types(SETTINGS[name].annotation))


def list_parameters(job: Job, metric: str) -> tuple[float | None, ...]:
    """The parameters at which a geometry metric is measured; None for a metric without one."""
    parameter = DEFINITIONS[metric].parameter
    if isinstance(parameter, str):
        return tuple(float(value) for value in getattr(job.evaluate.geometry, parameter))
    return parameter or (None,)


def resolve_target(job: Job, target: Target) -> dict[str, Any]:
    """Which rows of the table a target averages for an arm: column -> value."""
    if target.table == "geometry":
        measured = list_parameters(job, target.metric) if target.metric in DEFINITIONS else ()
        parameter = measured[0] if target.parameter is None and measured else target.parameter
        return {"task": target.task, "metric": target.metric, "parameter": parameter}
    shots = target.shots if target.shots is not None and target.shots in job.evaluate.shots else job.evaluate.shots[0]
    depths = job.evaluate.frozen_layers
    depth = target.frozen_layers if target.frozen_layers in depths else depths[0]
    # Above a frozen boundary the head is trained with the layers: there is one classifier, whatever the probes are.
    probe = (target.probe or job.evaluate.probes[0]) if depth == "all" else "mlp"
    return {
        "task": target.task,
        "metric": target.metric,
        "class": target.class_name,
        "shots": None if shots == "full" else shots,
        "frozen_layers": depth,
        "probe": probe,
    }
