"""Job files: YAML to a checked `Job`, with every mistake in one go."""

import contextlib
import difflib
import json
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from raylab.base.mistakes import JobError
from raylab.base.paths import resolve_encoder, resolve_paths
from raylab.job.designs import check_design
from raylab.job.explanations import explain, inner_types
from raylab.job.primary import read_cell_target, read_primary, split_pairs, split_sides
from raylab.job.settings import (
    ARM_BLOCKS,
    LOSS_BLOCKS,
    OBJECTIVE_BLOCKS,
    SCORE_METRICS,
    SETTINGS,
    check_settings,
    dump_job,
    is_integer,
    is_list,
    list_parameters,
    list_settings,
    list_unread,
    possible_values,
    resolve_target,
)
from raylab.job.specs import ADAPTIVE, Choices, Job, Range, Target
from raylab.measures.definitions import DEFINITIONS


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers (5e-5 is a number, 2e6 a whole one), and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float):
                raise JobError([f"line {key_node.start_mark.line + 1}: a key must be a name; put it in quotes"])
            if key in seen:
                raise JobError([f"line {key_node.start_mark.line + 1}: key '{key}' stands twice; keep one"])
            seen.add(key)
        return super().construct_mapping(node, deep)


def _construct_exponent(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float | int:
    text = loader.construct_scalar(node).replace("_", "")
    value = float(text)
    return int(value) if "." not in text and "-" not in text[1:] and value.is_integer() else value


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_Loader` would read as numbers."""


for _resolver in (_Loader, _Dumper):
    _resolver.add_implicit_resolver(
        "!exponent", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
_Loader.add_constructor("!exponent", _construct_exponent)


def _describe_yaml_error(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or str(error).splitlines()[0])


def read_value(text: str) -> Any:
    """A value written on the command line, read as in a job file. Raises JobError."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise JobError([f"the value is not YAML ({_describe_yaml_error(error)}); check brackets and quotes"]) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises JobError naming the file and line."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise JobError([f"{path}: {error.strerror or error}; check the path"]) from None
    except UnicodeDecodeError:
        raise JobError([f"{path}: not UTF-8 text; save it as UTF-8"]) from None
    except JobError as error:
        raise JobError([f"{path}: {problem}" for problem in error.problems]) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise JobError(
            [f"{path}:{line} is not YAML ({_describe_yaml_error(error)}); check indents and quotes"]
        ) from None
    if not isinstance(content, dict):
        raise JobError([f"{path}: must be a mapping of keys to values, not {type(content).__name__}"])
    return content


def merge(base: dict[str, Any], variant: dict[str, Any]) -> dict[str, Any]:
    """`base` changed by `variant`: mappings merge, anything else replaces, null deletes."""
    merged = dict(base)
    for key, value in variant.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            inherited = merged.get(key)
            merged[key] = merge(inherited if isinstance(inherited, dict) else {}, value)
        else:
            merged[key] = value
    return merged


def _read_space(path: Path) -> dict[str, Any]:
    space = read_yaml(path)
    encoder = space.get("encoder.pretrained")
    names = encoder if isinstance(encoder, list) else encoder.get("choices") if isinstance(encoder, dict) else None
    if isinstance(names, list):
        names[:] = [resolve_encoder(name, path.parent) if isinstance(name, str) else name for name in names]
    return space


def _read_chain(path: Path, data: Path | None, seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """The merged mapping of a job file and its bases, and what the file itself wrote."""
    if path.resolve() in seen:
        raise JobError([f"base: {path} leads back to itself; remove one 'base'"])
    own = read_yaml(path)
    base_name = own.pop("base", None)
    if base_name is not None and not isinstance(base_name, str):
        raise JobError([f"base: must be the path of one job file, not {base_name!r}"])
    resolve_paths(own, path.parent, data)
    if base_name is None:
        return own, own
    base_path = path.parent / base_name
    if not base_path.exists():
        raise JobError([f"base: {base_path} is not there; correct the path, which starts at the folder of {path.name}"])
    base, _ = _read_chain(base_path, data, (*seen, path.resolve()))
    return merge(base, own), own


def load_job(path: Path, *, overrides: Mapping[str, Any] | None = None, data: Path | None = None) -> Job:
    """Reads, merges and checks a job file.

    `overrides` maps dotted settings to values that replace the file's; `data` is a folder that holds the corpus files.
    Raises JobError with every mistake.
    """
    raw, own = _read_chain(Path(path), data)
    own = own | {"analysis": {}} if overrides else own
    if overrides and "pretrain.objective" in overrides:
        own = own | {"pretrain": {}}  # of another objective, the file's blocks are inherited ones
    for key, value in (overrides or {}).items():
        parts = key.split(".")
        if parts[:2] == ["search", "space"] and len(parts) > 2:
            parts[2:] = [".".join(parts[2:])]
            raw = _fill_space(raw)
        block: Any = value
        for part in reversed(parts):
            block = {part: block}
        resolve_paths(block, Path.cwd(), data)
        raw, own = merge(raw, block), merge(own, block)
    return check_job(_fill_space(raw), own)


def _fill_space(raw: dict[str, Any]) -> dict[str, Any]:
    """The mapping with the search space read from its file."""
    search = raw.get("search")
    if not isinstance(search, dict) or not isinstance(search.get("space"), str):
        return raw
    path = Path(search["space"])
    if not path.exists():
        raise JobError([f"search.space: {path} is not there; correct the path"])
    return {**raw, "search": {**search, "space": _read_space(path)}}


def check_job(raw: dict[str, Any], own: dict[str, Any] | None = None) -> Job:
    """A `Job` from a merged mapping; `own` is what the job file itself wrote (blocks in it must be read)."""
    try:
        raw = json.loads(json.dumps(raw, default=str))
    except ValueError:
        raise JobError(["the job holds itself: a YAML alias (*name) stands within its own anchor; remove it"]) from None
    space = raw.get("search", {}).get("space") if isinstance(raw.get("search"), dict) else None
    if isinstance(space, dict):
        raw["search"]["space"] = {k: {"choices": v} if isinstance(v, list) else v for k, v in space.items()}
    try:
        job = Job.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise JobError(explain(error)) from None
    wrong = _check_space(job) or check_design(job)
    problems = [
        *wrong,
        *_check_references(job),
        *([] if wrong else _check_primary(job, inherited=own is not None and not own.get("analysis"))),
        *_check_blocks(job, own or {}),
        *check_settings(job),
    ]
    if problems:
        raise JobError(list(dict.fromkeys(problems)))
    return job


def dump_yaml(job: Job) -> str:
    """The resolved job as YAML: what is kept beside its results, and reads back as the same job.

    Settings that none of its arms reads are left out: written, they would be refused.
    """
    raw = dump_job(job)
    for name in list_unread(job):
        *path, last = name.split(".")
        block = raw
        for part in path:
            block = block[part]
        del block[last]
    raw["pretrain"] = {key: value for key, value in raw["pretrain"].items() if value != {}}
    return str(yaml.dump(raw, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def _check_space(job: Job) -> list[str]:
    problems: list[str] = []
    earlier: list[str] = []
    for name, entry in job.search.space.items():
        where = f"search.space.{name}"
        if name not in SETTINGS or not name.startswith(ARM_BLOCKS):
            searchable = [s for s in SETTINGS if s.startswith(ARM_BLOCKS)]
            near = difflib.get_close_matches(name, searchable, n=1)
            problems.append(
                f"{where}: not a setting that can be searched" + (f"; did you mean '{near[0]}'?" if near else "")
            )
            continue
        values: tuple[Any, ...]
        if isinstance(entry, Choices):
            values = entry.choices
            if len({json.dumps(v, sort_keys=True) for v in values}) < len(values):
                problems.append(f"{where}: names a value twice")
        else:
            values = (entry.low, entry.high)
            if is_integer(name):
                if any(v != int(v) for v in (*values, entry.step or 1)):
                    problems.append(f"{where}: low, high and step must be whole numbers for this setting")
                values = tuple(int(v) for v in values)
            elif not any(t is float for t in inner_types(SETTINGS[name].annotation)):
                problems.append(f"{where}: is not a number; list its 'choices'")
                continue
            if job.search.design not in ADAPTIVE and (entry.log or (entry.step is None and not is_integer(name))):
                problems.append(f"{where}: design {job.search.design} needs 'choices', or a range with a 'step'")
        field = SETTINGS[name]
        annotation: Any = typing.Annotated[field.annotation, field] if field.metadata else field.annotation
        adapter: TypeAdapter[Any] = TypeAdapter(annotation)
        for value in values:
            listed = [value] if is_list(name) and not isinstance(value, list) else value
            try:
                adapter.validate_json(json.dumps(listed), strict=True)
            except ValidationError as error:
                problems += explain(error, ("search", "space", name))
        for condition, wanted in (entry.when or {}).items():
            options = wanted if isinstance(wanted, list) else [wanted]
            if condition not in SETTINGS:
                near = difflib.get_close_matches(condition, list(SETTINGS), n=1)
                problems.append(
                    f"{where}.when: '{condition}' is not a setting" + (f"; did you mean '{near[0]}'?" if near else "")
                )
            elif condition in job.search.space and condition not in earlier:
                problems.append(f"{where}.when: '{condition}' must stand before it in the space")
            elif isinstance(other := job.search.space.get(condition), Range):
                if missing := [v for v in options if not _lies_within(v, other)]:
                    problems.append(
                        f"{where}.when: '{condition}' is never {missing[0]!r}; use a number from {other.low:g} to "
                        f"{other.high:g}"
                    )
            else:
                possible = list(other.choices) if other else [list_settings(job)[condition]]
                if missing := [v for v in options if v not in possible]:
                    valid = f"use one of {possible}" if other else f"it is always {possible[0]!r} here: search it too"
                    problems.append(f"{where}.when: '{condition}' is never {missing[0]!r}; {valid}")
        earlier.append(name)
    return problems


def _lies_within(value: Any, entry: Range) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and entry.low <= value <= entry.high


def _check_references(job: Job) -> list[str]:
    problems: list[str] = []
    tasks = list(job.corpus.tasks)

    for task in sorted(possible_values(job, "evaluate.tasks") - {None}):
        if task not in tasks:
            problems.append(f"evaluate.tasks: '{task}' is not in corpus.tasks; {_near(task, tasks)}")
    if "documents" in tasks:
        problems.append("corpus.tasks.documents: this name is taken by the documents; rename the task")
    for index, target in enumerate(job.search.targets):
        problems += check_target(job, target, f"search.targets.{index}")
    measured = [(target.table, resolve_target(job, target)) for target in job.search.targets]
    for index, cell in enumerate(measured):
        if cell in measured[:index]:
            problems.append(f"search.targets.{index}: is the same value as target {measured.index(cell)}; remove one")
    return problems


def _near(value: str, names: typing.Sequence[str]) -> str:
    match = [] if value.isdigit() else difflib.get_close_matches(value, names, n=1)
    return f"did you mean '{match[0]}'?" if match else f"valid: {', '.join(map(str, names))}"


def check_target(job: Job, target: Target, where: str) -> list[str]:
    """One line for each part of a target that the job does not measure, with the nearest that it does."""
    problems: list[str] = []
    evaluated = list(job.evaluate.tasks or job.corpus.tasks)
    possible = {name: possible_values(job, f"evaluate.{name}") for name in ("shots", "frozen_layers", "probes")}
    if target.task not in evaluated:
        problems.append(f"{where}.task: '{target.task}' is not evaluated; {_near(target.task, evaluated)}")
    if target.table == "geometry":
        if {"shots", "probe", "frozen_layers", "class_name"} & target.model_fields_set:
            problems.append(f"{where}: geometry has no shots, probe, frozen_layers or class; leave them out")
        if target.metric not in DEFINITIONS:
            problems.append(
                f"{where}.metric: '{target.metric}' is not measured; {_near(target.metric, list(DEFINITIONS))}"
            )
        elif not list_parameters(job, target.metric):
            setting = f"evaluate.geometry.{DEFINITIONS[target.metric].parameter}"
            problems.append(f"{where}.metric: '{target.metric}' is not measured; {setting} is empty, add to it")
        elif (at := list_parameters(job, target.metric)) and target.parameter not in (None, *at):
            listed = ", ".join(f"{value:g}" for value in at if value is not None)
            fix = f"measured at: {listed}" if listed else f"{target.metric} has none; leave it out"
            problems.append(f"{where}.parameter: {target.parameter:g} is not measured; {fix}")
        return problems
    if target.metric not in SCORE_METRICS:
        problems.append(f"{where}.metric: '{target.metric}' is not measured; {_near(target.metric, SCORE_METRICS)}")
    elif target.metric.endswith("_class") != (target.class_name is not None):
        fix = "is of one class: name it" if target.class_name is None else "is of all classes: leave it out"
        problems.append(f"{where}.class: '{target.metric}' {fix}")
    if target.metric == "calibration_error" and target.mode == "max":
        problems.append(f"{where}.mode: lower is better for calibration_error; set it to min")
    if target.parameter is not None:
        problems.append(f"{where}.parameter: belongs to geometry; leave it out")
    for name, value in (("shots", target.shots), ("frozen_layers", target.frozen_layers), ("probes", target.probe)):
        searched = f"evaluate.{name}" in job.search.space
        # A searched depth is scored at whatever depth the arm has: the target follows it.
        if name == "probes" and value == "mlp" and target.frozen_layers != "all":
            continue  # the only one there, whatever the probes of depth all are
        if value is not None and not searched and value not in possible[name]:
            valid = [str(v) for v in possible[name]]
            key = "probe" if name == "probes" else name
            problems.append(f"{where}.{key}: {value!r} is not evaluated; {_near(str(value), valid)}")
    return problems


def _check_primary(job: Job, *, inherited: bool) -> list[str]:
    """What is wrong with the comparison that the job declares, has from its base, or had before it was overridden."""
    if job.analysis.primary is None:
        return []
    where, problems = "analysis.primary", []
    try:
        read_primary(job, job.analysis.primary)
    except JobError as error:
        problems = [f"{where}: {problem}" for problem in error.problems]
    with contextlib.suppress(JobError):  # told above
        _, _, at = split_sides(job.analysis.primary)
        problems += check_target(job, read_cell_target(job, split_pairs(at) if at else {}), where)
    if problems and inherited:
        problems.append(f"{where}: is of the job without these changes; name what it has, or write 'analysis: null'")
    return problems


def _check_blocks(job: Job, own: dict[str, Any]) -> list[str]:
    """A block that no arm of this job reads is refused where the file itself wrote it, or its space varies it."""
    objectives = possible_values(job, "pretrain.objective")
    read = {block for objective in objectives for block in OBJECTIVE_BLOCKS.get(objective, ())}
    named = ", ".join(sorted(map(str, objectives)))
    pretrain = own.get("pretrain")
    written = {k: v for k, v in pretrain.items() if v is not None} if isinstance(pretrain, dict) else {}
    problems = [
        f"pretrain.{block}: objective {named} does not read it; remove the block"
        for block in LOSS_BLOCKS
        if block in written and block not in read
    ]
    unread = list_unread(job)
    for name in job.search.space:
        if name in unread:
            problems.append(f"search.space.{name}: no arm of this job reads it; remove it")
        if name == "pretrain.rungs":
            problems.append("search.space.pretrain.rungs: rungs change no result; they can't be searched")
        if name.startswith(("encoder.config.", "encoder.tokenizer.")) and job.encoder.config is None:
            problems.append(f"search.space.{name}: the encoder is not from scratch; remove it or set encoder.config")
    if objectives == {"none"}:
        extra = sorted(set(written) - {"objective"} - set(LOSS_BLOCKS))
        problems += [f"pretrain.{key}: objective none does not read it; remove it" for key in extra]
    temperature = "pretrain.metadata.temperature"
    if "metadata" in read and temperature in unread and written.get("metadata", {}).get("temperature") is not None:
        problems.append(f"{temperature}: loss cross_entropy does not read it; remove it")
    if "metadata" in objectives and possible_values(job, "pretrain.metadata.field") == {None}:
        problems.append("pretrain.metadata.field: is missing; name a column of corpus.documents")
    return problems
