"""The worker processes of one trial, as much as code without Ray has to know of them."""

from collections.abc import Callable
from typing import Any, NamedTuple


class World(NamedTuple):
    """`rank` of `size` workers; `broadcast(value)` gives every worker the value of rank 0."""

    rank: int
    size: int
    broadcast: Callable[[Any], Any]


ALONE = World(rank=0, size=1, broadcast=lambda value: value)
