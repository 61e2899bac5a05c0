"""The report of a rewrite: what each node became, and what that is predicted to save.

Promises: every change has a line; the prediction is of an ordinary step, by the machine profile, and of nothing else.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from perexfx.capture import modes_kept
from perexfx.machine import current
from perexfx.rewrites import Rewritten
from perexfx.views.cells import Cells
from perexfx.views.heat_maps import HeatMap, heat_maps_of
from perexfx.views.pages import Viewed
from perexfx.views.step_time import step_seconds
from perexfx.views.words import aligned, counted

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, Group


@dataclass(frozen=True)
class ChangedNode:
    """One node.

    Attributes:
        node: Its name, in both graphs.
        module: Path of the module that it is in.
        source: `file.py:line` of the user's code, where that is known.
        before: What it did.
        after: What is done in its place.
    """

    node: str
    module: str
    source: str
    before: str
    after: str


@dataclass(frozen=True)
class RewriteReport(Viewed):
    """What a rewrite did to a model.

    `str(report)` is a table; `rich.print(report)` one for terminals; a notebook shows the page that `to_html` writes.

    Attributes:
        name: Of the rewrite.
        summary: What it did, in a sentence or two.
        rows: One for each node that does other work than before, in graph order.
        batch_size: Number of examples that the seconds are for; None where nothing is predicted.
        machine: The machine profile.
        seconds: Predicted, of an ordinary step of the rewritten model.
        seconds_before: Predicted, of an ordinary step of the model.
        heat_maps: The tables of a guided merge, as they are now.
    """

    schema = "perexfx.rewrite/1"
    template = "rewrite"

    name: str
    summary: str
    rows: tuple[ChangedNode, ...]
    batch_size: int | None = None
    machine: str = ""
    seconds: float | None = None
    seconds_before: float | None = None
    heat_maps: tuple[HeatMap, ...] = ()

    @property
    def title(self) -> str:
        """Rewrite and number of changes."""
        return f"perexfx.{self.name}: {counted(len(self.rows), 'change')}"

    @property
    def ratio(self) -> float | None:
        """Predicted time of a step / that of a step of the model: r."""
        if self.seconds is None or not self.seconds_before:
            return None
        return self.seconds / self.seconds_before

    @property
    def totals(self) -> tuple[str, ...]:
        """What was done, and what that is predicted to take; a sentence each."""
        if self.ratio is None or self.seconds is None or self.seconds_before is None:
            return (self.summary,)
        predicted = (
            f"Predicted by the {self.machine} for a batch of {self.batch_size}: an ordinary step takes "
            f"{self.seconds * 1e3:.1f} ms, that of the model {self.seconds_before * 1e3:.1f} ms: r = {self.ratio:.2f}."
        )
        if self.ratio < 1:
            predicted += f" A training with a share f of such batches saves f (1 - {self.ratio:.2f}) of its time."
        return self.summary, predicted

    @property
    def table(self) -> Cells:
        """A row for each change."""
        rows = tuple((row.module or row.node, row.before, row.after, row.source) for row in self.rows)
        return Cells(self.title, ("module", "before", "after", "source"), rows)

    def __str__(self) -> str:
        table = self.table
        lines = [self.title, *self.totals, "", *aligned([table.headings, *table.rows], is_headed=True)]
        for heat_map in self.heat_maps:
            lines += ["", str(heat_map)]
        return "\n".join(lines)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Group]:
        from perexfx.views.rich_tables import plain_table  # noqa: PLC0415 (rich itself is what calls this)

        yield plain_table(self.table, self.totals, list(map(str, self.heat_maps)))


def report_of_rewrite(module: Rewritten) -> RewriteReport:
    """What was done to a model, and what that is predicted to save where its sizes are known."""
    rewriting = module.rewriting
    rows = tuple(
        ChangedNode(change.place.node, change.place.module, change.place.source, change.before, change.after)
        for change in rewriting.changes
    )
    found = RewriteReport(rewriting.name, rewriting.summary, rows, heat_maps=heat_maps_of(module))
    if rewriting.sizes is None:
        return found
    kind, n = rewriting.sizes
    machine = current()
    with modes_kept(module), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        after = step_seconds(module.graph, module, kind, n, machine)
        before = step_seconds(rewriting.before, module, kind, n, machine)
    return replace(found, batch_size=n, machine=machine.name, seconds=after, seconds_before=before)


__all__ = ["ChangedNode", "RewriteReport", "report_of_rewrite"]
