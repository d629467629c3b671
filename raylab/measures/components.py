"""Connected components that grow as edges come in: a name for each point, on the device of the points."""

import torch
from torch import Tensor


def join_tile(components: Tensor, joined: Tensor, rows: slice, columns: slice) -> Tensor:
    """Components [n] after the edges of a tile [R, C] (above 0: joined). Those inside the largest are not looked at."""
    while True:
        here, there = components[rows], components[columns]
        giant = torch.cat([here, there]).mode().values
        found: list[tuple[Tensor, Tensor]] = []
        outside = (here != giant).nonzero().view(-1)
        if len(outside):
            apart = (joined[outside] > 0) & (here[outside][:, None] != there)
            any_, first = apart.to(torch.uint8).max(1)
            found.append((outside[any_ > 0] + rows.start, first[any_ > 0] + columns.start))
        outside = (there != giant).nonzero().view(-1)
        if len(outside):
            apart = (joined[:, outside] > 0) & (here[:, None] != there[outside])
            any_, first = apart.to(torch.uint8).max(0)
            found.append((first[any_ > 0] + rows.start, outside[any_ > 0] + columns.start))
        found = [pair for pair in found if len(pair[0])]
        if not found:
            return components
        for start, end in found:
            components = join(components, start, end)


def join(components: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Components [n] after edges from rows [E] to columns [E].

    The larger name of two hooks on to the smaller, so that no ring can form; then names are followed to the end.
    """
    while True:
        start, end = components[rows], components[columns]
        apart = start != end
        if not bool(apart.any()):
            return components
        rows, columns, start, end = rows[apart], columns[apart], start[apart], end[apart]
        roots = torch.arange(len(components), device=components.device)
        roots.scatter_reduce_(0, torch.maximum(start, end), torch.minimum(start, end), "amin")
        while True:
            further = roots[roots]
            if torch.equal(further, roots):
                break
            roots = further
        components = roots[components]
