"""How a merge is guided: the choices, checked.

Promises: a guidance that exists is one that can be followed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from perexfx.ir.errors import ArgumentError

SCORES = ("loss", "error", "probability")
CHOICES = ("soft", "weakest")
GRANULARITIES = ("class", "target")
SOURCES = ("batch", "given")
SMALLEST_TEMPERATURE = 1e-3
"""Below, the logarithm over the temperature leaves float32; `choose="weakest"` is the limit."""


@dataclass(frozen=True)
class Guidance:
    """How a merge is guided.

    Attributes:
        num_classes: C, at least 2.
        score: "loss", "error" or "probability".
        choose: "soft" or "weakest".
        per: "class" or "target".
        temperature: Of the soft choice, at least 0.001.
        momentum: Of the table, in [0, 1).
        table_from: "batch" or "given".

    Raises:
        ArgumentError: One of these is something else.
    """

    num_classes: int
    score: str = "loss"
    choose: str = "soft"
    per: str = "class"
    temperature: float = 1.0
    momentum: float = 0.9
    table_from: str = "batch"

    def __post_init__(self) -> None:
        if isinstance(self.num_classes, bool) or not isinstance(self.num_classes, int) or self.num_classes < 2:
            raise ArgumentError(f"`num_classes` should be a number of classes, at least 2. Found {self.num_classes!r}.")
        for name, known in (("score", SCORES), ("choose", CHOICES), ("per", GRANULARITIES), ("table_from", SOURCES)):
            if getattr(self, name) not in known:
                allowed = " or ".join(f'"{value}"' for value in known)
                raise ArgumentError(f"`{name}` should be {allowed}. Found {getattr(self, name)!r}.")
        if not (_is_number(self.temperature) and SMALLEST_TEMPERATURE <= self.temperature < math.inf):
            raise ArgumentError(
                f"`temperature` should be a finite number, at least {SMALLEST_TEMPERATURE}. "
                f'Found {self.temperature!r}. Colder than that is `choose="weakest"`.'
            )
        if not (_is_number(self.momentum) and 0 <= self.momentum < 1):
            raise ArgumentError(
                f"`momentum` should be a number from 0 up to, not including, 1. Found {self.momentum!r}."
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


__all__ = ["Guidance"]
