"""Tables as text: what the plain table, the terminal's and the notebook's have in common."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cells:
    """A table.

    Attributes:
        title: Above it.
        headings: Of the columns.
        rows: A cell per heading.
        numbers: Headings of the columns that are aligned to the right.
        strategies: Headings of the columns that name strategies.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: tuple[str, ...] = ()
    strategies: tuple[str, ...] = ()


__all__ = ["Cells"]
