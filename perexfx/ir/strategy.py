"""What a strategy is: one exact way from factors to squared norms."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from perexfx.ir.cost import Cost
from perexfx.ir.factors import Factors, Signature

REWEIGHT = "reweight"
"""Name of the strategy whose clipped sums come from a second backward."""


class Strategy(Protocol):
    """One exact way to get a site's squared norms, and the factors its clipped sum is made of.

    Strategies are frozen, hashable and stateless: `refuses` and `cost` read sizes alone, so a plan needs no tensors.
    Whatever has these members is one; nothing needs to be inherited.
    """

    @property
    def name(self) -> str:
        """The name users force it by."""
        ...

    def refuses(self, signature: Signature) -> str | None:
        """Why it does not apply to factors of this kind and size; None where it does."""
        ...

    def cost(self, signature: Signature, itemsize: int) -> Cost:
        """Its cost at a size it does not refuse.

        Args:
            signature: Sizes of the factors.
            itemsize: Bytes per element.
        """
        ...

    def squared_norms(self, factors: Factors) -> tuple[Tensor, Factors]:
        """The squared gradient norm of each example, and what to hold for the weighted sum.

        Args:
            factors: Of a signature that it does not refuse.

        Returns:
            Squared norms of shape `[n]`, exact, accumulated in float32 at least; and factors with the same per-example
            gradients: those given (the clipped sum is one ordinary product later), or a `Gradient` (kept).
        """
        ...
