"""What is wrong with a request, said in one line each: path, value, rule, nearest valid name."""

import difflib
import json
import re
import traceback
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from raylab.specs import Job


class JobError(ValueError):
    """A request that can't be run; `problems` holds one line for each mistake."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Interrupted(Exception):  # noqa: N818 - a user's wish, not an error
    """Ctrl-C: what is recorded stays, resume goes on."""


class InfeasibleError(ValueError):
    """An arm that cannot work on this corpus, such as spans that no document is long enough for."""


def describe_error(error: BaseException) -> str:
    """The kind of an error and where it happened, without its message: that could quote a text."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "raylab" in f.filename]
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}; --debug shows more"


def explain(detail: dict[str, Any]) -> str:
    """One line for a pydantic error: path, value, rule, nearest valid name."""
    location = [part for part in detail["loc"] if not (isinstance(part, str) and part in ("Choices", "Range"))]
    path = ".".join(str(part) for part in location if not str(part).startswith(("constrained-", "literal[")))
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
    shown = "" if isinstance(value, dict | list) else f" (is {json.dumps(value)})"
    if kind == "literal_error":
        expected = detail["ctx"]["expected"]
        near = difflib.get_close_matches(str(value), re.findall(r"'([^']+)'", expected), n=1)
        return f"{path}: must be one of {expected}{shown}" + (f"; did you mean '{near[0]}'?" if near else "")
    message = message.replace("Input should", "must").replace("String should", "must")
    return f"{path}: {message}{shown}"


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
    while keys and model is not None:
        field = model.model_fields.get(str(keys.pop(0)))
        if field is None:
            return []
        mapping = next((t for t in inner_types(field.annotation) if typing.get_origin(t) is dict), None)
        if mapping is not None:
            if not keys:
                return []
            keys.pop(0)
            model = model_of(typing.get_args(mapping)[1])
        else:
            model = model_of(field.annotation)
    return list(model.model_fields) if model else []
