"""What perexfx raises. Every error a user can cause is a `PerexError`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx, nn

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


class ProofError(PerexError):
    """What a proof claims does not hold; the message has the path that breaks it."""


class RefusedError(PerexError):
    """The compiler refuses a model, and says why.

    Attributes:
        refusals: Every reason found, in graph order; the message shows them all.
        graph: What was captured of the model, for `perexfx.visualize(error, path)`; None where it came to nothing.
        module: Holds what the graph names.
    """

    def __init__(self, refusals: Sequence[Refusal]) -> None:
        self.refusals = tuple(refusals)
        self.graph: fx.Graph | None = None
        self.module: nn.Module | None = None
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
