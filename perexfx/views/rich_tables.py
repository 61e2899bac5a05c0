"""Tables for terminals and notebooks, by rich; imported only when rich asks for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table
from rich.text import Text

from perexfx.views.palette import color_of
from perexfx.views.words import named

if TYPE_CHECKING:
    from perexfx.views.report import Report
    from perexfx.views.sweep import Sweep


FIRST = ("site", "strategy", "ms", "MB", "ms measured", "MB measured", "kind", "next best", "shapes", "why not")
"""Columns, those first that a narrow terminal keeps."""

EDGE, GAP = 1, 3
"""What a table takes besides its columns, and between two of them."""

SENTENCE = 28
"""The least width of a column of sentences, which wrap."""


def report_table(report: Report, width: int) -> Group:
    """A strategy report, with strategies in their colours; what has no room in a terminal is left out, and said."""
    widths = {
        heading: max(len(heading), *(len(report.cells(row)[at]) for row in report.rows))
        for at, heading in enumerate(report.headings)
    }
    widths["why not"] = min(widths["why not"], SENTENCE)
    shown, room = [], width - EDGE
    for heading in sorted(report.headings, key=FIRST.index):
        room -= widths[heading] + GAP
        if room < 0 and shown:
            break
        shown.append(heading)
    left_out = [heading for heading in report.headings if heading not in shown]
    notes = [f"no room for: {', '.join(left_out)}"] if left_out else []
    caption = "\n".join([*notes, *report.totals])
    table = Table(title=report.title, title_justify="left", caption=caption, caption_justify="left", box=SIMPLE)
    for heading in report.headings:
        if heading in shown:
            is_number = heading in report.numbers
            table.add_column(
                heading, justify="right" if is_number else "left", no_wrap=heading != "why not", overflow="fold"
            )
    for row in report.rows:
        cells = [(heading, cell) for heading, cell in report.labelled(row) if heading in shown]
        table.add_row(
            *(_strategy(cell) if heading in ("strategy", "next best") else Text(cell) for heading, cell in cells)
        )
    parts: list[Table | Text] = [table]
    if report.flips:
        flips = Table(title="Other batch sizes (powers of two were tried)", title_justify="left", box=SIMPLE)
        flips.add_column("sites")
        flips.add_column("strategy")
        for ranges, sites in report.flips_together.items():
            flips.add_row(Text(named(sites)), Text(ranges))
        parts.append(flips)
    if report.budgets is None:
        parts.append(Text(report.untried))
    elif report.budgets:
        budgets = Table(title="Smaller memory budgets", title_justify="left", box=SIMPLE)
        for heading in ("peak", "time", "changes"):
            budgets.add_column(heading)
        for step in report.budgets:
            budgets.add_row(*map(Text, report.budget_cells(step)))
        parts.append(budgets)
    if report.proof:
        parts.append(Text(report.proof))
    return Group(*parts)


def sweep_table(sweep: Sweep) -> Table:
    """Strategies by batch size, in their colours."""
    headings, *rows = sweep.table
    table = Table(title=sweep.title, title_justify="left", box=SIMPLE)
    for at, heading in enumerate(headings):
        table.add_column(heading, justify="right" if at else "left")
    for at, (name, *cells) in enumerate(rows):
        is_total = at >= len(sweep.sites)
        if at == len(sweep.sites):
            table.add_section()
        table.add_row(Text(name), *(cells if is_total else map(_strategy, cells)))
    return table


def _strategy(name: str) -> Text:
    return Text(name, style="" if name in ("-", "none fits") else f"black on {color_of(name)}")
