"""What others remember about a transformed module: one place that knows none of them.

Promises: notes are of one graph: a copy has none, and they are forgotten when the graph is compiled anew.
"""

from __future__ import annotations

from typing import Any, TypeVar

V = TypeVar("V")


class Notes:
    """What others remember, by the class of what they note."""

    def __init__(self) -> None:
        self._of: dict[type[Any], dict[Any, Any]] = {}

    def of(self, kind: type[V]) -> dict[Any, V]:
        """The notes of one kind, to read and to add to; the keys are the asker's own."""
        return self._of.setdefault(kind, {})

    def clear(self) -> None:
        """Forgets all of them."""
        self._of.clear()


__all__ = ["Notes"]
