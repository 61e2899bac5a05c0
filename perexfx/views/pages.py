"""Pages: templates filled in.

Promises: a page is one file that needs no network; the same values give the same text.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from perexfx.views.files import write_file
from perexfx.views.palette import color_of
from perexfx.views.words import megabytes

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
    environment.filters["mb"] = megabytes
    environment.filters["mb_in_column"] = partial(megabytes, in_column=True)
    environment.filters["signed_mb"] = partial(megabytes, is_signed=True)
    environment.filters["color"] = color_of
    return environment


class Viewed:
    """A frozen dataclass that can be read as a dict, as JSON and as a page, whose template has its name.

    Attributes:
        schema: Version of what `to_dict` returns; a change that readers must know of has another number.
        template: Name of the template, and of the value in it.
    """

    schema: ClassVar[str]
    template: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON takes it: seconds, bytes, and names; `schema` says which version."""
        found: Any = self
        return {"schema": self.schema, **asdict(found)}

    def to_json(self, path: str | Path | None = None) -> str:
        """`to_dict` as text; with a path, also written there.

        Raises:
            ArgumentError: The file cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        if path is not None:
            write_file(path, text)
        return text

    def to_html(self, path: str | Path | None = None) -> str:
        """A page of its own that needs no network; with a path, also written there.

        Raises:
            ArgumentError: The file cannot be written.
        """
        text = page(f"{self.template}.html", **{self.template: self}, in_notebook=False)
        if path is not None:
            write_file(path, text)
        return text

    def _repr_html_(self) -> str:
        return page(f"{self.template}.html", **{self.template: self}, in_notebook=True)
