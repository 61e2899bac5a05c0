"""Tables for terminals and notebooks, by rich; imported only when rich asks for them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table
from rich.text import Text

from perexfx.views.cells import Cells
from perexfx.views.palette import color_of

FIRST = ("site", "strategy", "ms", "MB", "ms measured", "MB measured", "kind", "next best", "shapes", "why not")
"""Columns, those first that a narrow terminal keeps."""

EDGE, GAP = 1, 3
"""What a table takes besides its columns, and between two of them."""

SENTENCE = 28
"""The least width of a column of sentences, which wrap."""


def report_table(table: Cells, notes: Sequence[str], below: Sequence[Cells | str], width: int) -> Group:
    """A strategy report, with strategies in their colours; what has no room in a terminal is left out, and said.

    Args:
        table: A row per site.
        notes: A sentence each, under it.
        below: What follows.
        width: Of the terminal, in characters.
    """
    shown = _with_room(table, width)
    left_out = [heading for heading in table.headings if heading not in shown]
    notes = [f"no room for: {', '.join(left_out)}", *notes] if left_out else list(notes)
    found = Table(title=table.title, title_justify="left", caption="\n".join(notes), caption_justify="left", box=SIMPLE)
    for heading in table.headings:
        if heading in shown:
            is_number = heading in table.numbers
            found.add_column(
                heading, justify="right" if is_number else "left", no_wrap=heading != "why not", overflow="fold"
            )
    for row in table.rows:
        cells = zip(table.headings, row, strict=True)
        found.add_row(
            *(
                _strategy(cell) if heading in table.strategies else Text(cell)
                for heading, cell in cells
                if heading in shown
            )
        )
    return Group(found, *(_plain(part) if isinstance(part, Cells) else Text(part) for part in below))


def _with_room(table: Cells, width: int) -> list[str]:
    """The headings for which there is room, in the order in which they are kept."""
    widths = {
        heading: max(len(heading), *(len(row[at]) for row in table.rows)) for at, heading in enumerate(table.headings)
    }
    widths["why not"] = min(widths["why not"], SENTENCE)
    shown, room = [], width - EDGE
    for heading in sorted(table.headings, key=FIRST.index):
        room -= widths[heading] + GAP
        if room < 0 and shown:
            break
        shown.append(heading)
    return shown


def plain_table(table: Cells, notes: Sequence[str], below: Sequence[str] = ()) -> Group:
    """A table of words, with sentences above it, and what follows."""
    found = _plain(table)
    found.title = None
    return Group(Text(table.title, style="italic"), *map(Text, notes), found, *map(Text, below))


def _plain(table: Cells) -> Table:
    found = Table(title=table.title, title_justify="left", box=SIMPLE)
    for heading in table.headings:
        found.add_column(heading)
    for row in table.rows:
        found.add_row(*map(Text, row))
    return found


def sweep_table(table: Cells, totals: Sequence[tuple[str, ...]]) -> Table:
    """Strategies by batch size, in their colours.

    Args:
        table: A row per site.
        totals: Rows below.
    """
    found = Table(title=table.title, title_justify="left", box=SIMPLE)
    for heading in table.headings:
        found.add_column(heading, justify="right" if heading in table.numbers else "left")
    for name, *cells in table.rows:
        found.add_row(Text(name), *map(_strategy, cells))
    found.add_section()
    for name, *cells in totals:
        found.add_row(Text(name), *cells)
    return found


def _strategy(name: str) -> Text:
    return Text(name, style="" if name in ("-", "none fits") else f"black on {color_of(name)}")


__all__ = ["plain_table", "report_table", "sweep_table"]
