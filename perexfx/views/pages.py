"""Pages: templates filled in, and files written.

Promises: a page is one file that needs no network; the same values give the same text; a file that cannot be written is
an error that names it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perexfx.ir.errors import ArgumentError
from perexfx.views.palette import color_of

if TYPE_CHECKING:
    from jinja2 import Environment

FOLDER = Path(__file__).parent / "templates"


def page(template: str, **values: Any) -> str:
    """A template of this folder, filled in."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # noqa: PLC0415 (torch brings it; only here)

    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["ms"] = lambda seconds: f"{seconds * 1e3:.3f}"
    environment.filters["mb"] = lambda count: f"{count / 1e6:.2f}"
    environment.filters["signed_mb"] = lambda count: f"{count / 1e6:+.2f}"
    environment.filters["color"] = color_of
    return environment


def write_page(path: str | Path, text: str) -> Path:
    """Writes a file. Returns: its path.

    Raises:
        ArgumentError: It cannot be written.
    """
    found = Path(path)
    try:
        found.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ArgumentError(f"`path` should be a file that can be written. Found {str(path)!r}: {error}.") from None
    return found
