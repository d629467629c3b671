"""What is wrong with a job file, said in one line each: path, value, rule, nearest valid name."""

import difflib
import json
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from raylab.job.specs import Choices, Job, Range


def explain(error: ValidationError, within: typing.Sequence[Any] = ()) -> list[str]:
    """One line for each mistake that pydantic found; `within` is where in the job the checked value stands."""
    lines: dict[str, str] = {}
    missing: set[str] = set()
    suggested: set[str] = set()
    details = error.errors(include_url=False)
    for detail in details:
        # A list whose items are refused is not said to be short of them too.
        size = len(detail["loc"])
        if detail["type"] == "too_short" and any(d["loc"][:size] == detail["loc"] for d in details if d is not detail):
            continue
        # A value that fits no type of a union has an error for each type, with the type at the end of its place.
        location = [*within, *(part for part in detail["loc"] if not _is_union_type(part))]
        path = ".".join(str(part) for part in location)
        if detail["type"] == "missing":
            missing.add(path)
        if detail["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(location[-1]), valid_names(location[:-1]), n=1)
            suggested |= {".".join(str(part) for part in (*location[:-1], name)) for name in near}
        line = _explain_detail(location, dict(detail))
        lines[path] = f"{lines[path]}, or {line.removeprefix(f'{path}: ')}" if path in lines else line
    # A misspelt key that must be there is one mistake, not an unknown key and a missing one.
    return [line for path, line in lines.items() if path not in missing & suggested]


def _is_union_type(part: Any) -> bool:
    tags = ("Choices", "Range", "Column", "Columns")
    return isinstance(part, str) and (part in tags or part.startswith(("constrained-", "literal[")))


def _explain_detail(location: typing.Sequence[Any], detail: dict[str, Any]) -> str:
    """Path, value, rule and nearest valid name of one error."""
    path = ".".join(str(part) for part in location)
    kind, message = detail["type"], detail["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        names = valid_names(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), names, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"valid names: {', '.join(names)}" if names else "remove it"
        return f"{path}: unknown key; {hint}"
    if kind == "missing":
        return f"{path}: is missing; add it"
    if kind == "json_invalid":
        return f"the job can't be read as plain values: {message}"
    value = detail.get("input")
    shown = f" (is {json.dumps(value)})" if value is None or isinstance(value, str | int | float) else ""
    if kind == "literal_error":
        expected = detail["ctx"]["expected"]
        near = difflib.get_close_matches(str(value), re.findall(r"'([^']+)'", expected), n=1)
        return f"{path}: must be one of {expected}{shown}" + (f"; did you mean '{near[0]}'?" if near else "")
    message = re.sub(r"^\w+ should", "must", message).replace(" after validation", "")
    message = message.replace("be an object", "be a mapping of keys to values").replace("valid array", "list")
    return f"{path}: {message}{shown}" if path else f"{message}{shown}"


def inner_types(annotation: Any) -> Iterator[Any]:
    """The types that an annotation is made of, unions and containers opened."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        for argument in typing.get_args(annotation)[: 1 if origin is typing.Annotated else None]:
            yield from inner_types(argument)
    else:
        yield annotation


def model_of(annotation: Any) -> type[BaseModel] | None:
    return next((t for t in inner_types(annotation) if isinstance(t, type) and issubclass(t, BaseModel)), None)


def valid_names(location: typing.Sequence[Any]) -> list[str]:
    """The keys allowed at a place of the job file; empty where any name is."""
    model: type[BaseModel] | None = Job
    keys = list(location)
    if keys[:2] == ["search", "space"] and len(keys) == 3:
        return list(dict.fromkeys([*Choices.model_fields, *Range.model_fields]))
    while keys and model is not None:
        field = model.model_fields.get(str(keys.pop(0)))
        if field is None:
            return []
        holder = next((t for t in inner_types(field.annotation) if typing.get_origin(t) in (dict, tuple)), None)
        if holder is not None:
            if not keys:
                return []
            keys.pop(0)
            arguments = typing.get_args(holder)
            model = model_of(arguments[1 if typing.get_origin(holder) is dict else 0])
        else:
            model = model_of(field.annotation)
    return [field.alias or name for name, field in model.model_fields.items()] if model else []
