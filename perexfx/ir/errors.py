"""What perexfx raises. Every error a user can cause is a `PerexError`."""

from __future__ import annotations

from collections.abc import Sequence

from perexfx.ir.refusal import Refusal


class PerexError(ValueError):
    """Base of everything that perexfx raises because of what it was given."""


class ArgumentError(PerexError):
    """An argument of a public function is not what it should be."""


class CaptureError(PerexError):
    """The model's forward could not be turned into a graph."""


class ModeError(PerexError):
    """A transformed model is used in another way than it was transformed for."""


class ShapeError(PerexError):
    """A value has another shape at run time than the analysis of the graph predicted."""


class BudgetError(PerexError):
    """No plan fits the memory budget."""


class RefusedError(PerexError):
    """The compiler refuses a model, and says why.

    Attributes:
        refusals: Every reason found, in graph order; the message shows them all.
    """

    def __init__(self, refusals: Sequence[Refusal]) -> None:
        self.refusals = tuple(refusals)
        super().__init__("\n".join(str(refusal) for refusal in self.refusals))

    def __reduce__(self) -> tuple[type, tuple[tuple[Refusal, ...]]]:
        return type(self), (self.refusals,)


class MixingError(RefusedError):
    """The value of one example depends on other examples: it has no per-example gradient."""


class CoverageError(RefusedError):
    """A use of a trainable parameter is not covered by any layer rule."""


class StrategyError(RefusedError):
    """A strategy was asked for that does not exist or does not apply."""


class ExportError(RefusedError):
    """A transformed model cannot be exported as asked."""
