"""Tables of numbers as heat maps: how badly each pathway of a guided merge does on each class.

Promises: the same table gives the same colours and text in every view; numbers are shown, colours only help to find
the large ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from perexfx.rewrites import Guide
from perexfx.views.palette import heat_of
from perexfx.views.words import aligned

SHOWN = 12
"""Columns that text has room for."""

_UNITS = {"loss": "mean cross-entropy, in nats", "error": "share of errors", "probability": "probability missed"}


@dataclass(frozen=True)
class HeatMap:
    """A table.

    Attributes:
        title: What its numbers are.
        caption: How to read it.
        rows: Their names.
        columns: Their names.
        values: By row and column.
    """

    title: str
    caption: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]

    @property
    def colors(self) -> tuple[tuple[str, ...], ...]:
        """Of each cell: white for nothing, darkest for the largest of all."""
        finite = [value for row in self.values for value in row if math.isfinite(value)]
        most = max(finite, default=0.0) or 1.0
        return tuple(tuple(heat_of(value / most) for value in row) for row in self.values)

    @property
    def cells(self) -> tuple[tuple[str, ...], ...]:
        """The numbers, with as many digits as fit a cell."""
        return tuple(tuple(f"{value:.2f}" for value in row) for row in self.values)

    def __str__(self) -> str:
        more = len(self.columns) - SHOWN
        rows = [("", *self.columns[:SHOWN])]
        rows += [(name, *cells[:SHOWN]) for name, cells in zip(self.rows, self.cells, strict=True)]
        table = aligned(rows, self.columns, is_headed=True)
        return "\n".join([self.title, *table, *([f"and {more} more columns"] if more > 0 else []), self.caption])


def heat_maps_of(module: nn.Module) -> tuple[HeatMap, ...]:
    """The tables of all guides in a module."""
    return tuple(_of_guide(path, child) for path, child in module.named_modules() if isinstance(child, Guide))


def _of_guide(path: str, guide: Guide) -> HeatMap:
    values = tuple(tuple(map(float, row)) for row in guide.weakness.detach().cpu().tolist())
    score = guide.guidance.score
    return HeatMap(
        f"weakness of `{path}`, pathway by class: {_UNITS[score]}",
        "Compare down a column: the same class, across pathways, each by itself. A row that is high everywhere is a "
        "weak pathway; a column that is high in all rows is a hard or rare class, which guidance cannot mend.",
        tuple(f"pathway {at}" for at in range(len(values))),
        tuple(str(at) for at in range(guide.guidance.num_classes)),
        values,
    )


__all__ = ["HeatMap", "heat_maps_of"]
