"""A refusal is a value: which rule or strategy declined what, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A place in the user's model: graph node, module path and source line."""

    node: str
    module: str = ""
    source: str = ""

    def __str__(self) -> str:
        owner = f" in module `{self.module}`" if self.module else ""
        line = f" ({self.source})" if self.source else ""
        return f"`{self.node}`{owner}{line}"


@dataclass(frozen=True)
class Refusal:
    """What was declined, why, and what the user can do about it."""

    what: str
    why: str
    remedy: str = ""
    place: Place | None = None

    def __str__(self) -> str:
        return " ".join(sentence for sentence in (self.what, self.why, self.remedy) if sentence)
