"""Words and columns that several views share."""

from __future__ import annotations

from collections.abc import Sequence

from perexfx.runtime import Settings


def megabytes(count: float, *, is_signed: bool = False, in_column: bool = False) -> str:
    """Bytes in MB, of which little does not read zero.

    Args:
        count: Bytes.
        is_signed: Begin with a sign.
        in_column: Always three decimals; else two, or three for less than 0.1 MB.
    """
    size = count / 1e6
    if size and abs(size) < 5e-4:
        return f"{'-' if size < 0 else '+' if is_signed else ''}<0.001"
    decimals = 3 if in_column or 0 < abs(size) < 0.1 else 2
    return f"{size:{'+' if is_signed else ''}.{decimals}f}"


def aligned(rows: Sequence[Sequence[str]], right: Sequence[str] = (), *, is_headed: bool = False) -> list[str]:
    """Cells in columns.

    Args:
        rows: All of the same length.
        right: The headings of columns that are aligned to the right.
        is_headed: Whether the first row is headings, and ruled.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    to_right = {at for at, heading in enumerate(rows[0]) if heading in right}

    def line(row: Sequence[str]) -> str:
        cells = (
            cell.rjust(width) if at in to_right else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    lines = [line(row) for row in rows]
    if is_headed:
        lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def indented(lines: Sequence[str]) -> list[str]:
    """Two spaces before each."""
    return [f"  {line}" for line in lines]


NAMED = 3
"""Sites that are named where several have something in common."""


def named(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def clipping_in_words(settings: Settings) -> str:
    """What becomes of the norms."""
    if callable(settings.clipping):
        return "clipping by a function of the user's"
    if settings.clip_norm is None:
        return "nothing is clipped"
    return f"{settings.clipping.replace('_', '-')} clipping, clip_norm {settings.clip_norm:g}"


def counted(count: int, noun: str) -> str:
    """`1 site`, `2 sites`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
