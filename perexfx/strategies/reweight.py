"""Norms without holding anything: the clipped sum comes from a second backward of the weighted losses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from perexfx.ir.cost import Cost
from perexfx.ir.factors import Factors, Signature
from perexfx.ir.strategy import REWEIGHT, Strategy


@dataclass(frozen=True)
class Reweight:
    """Norms as another strategy has them; nothing is held for the clip node, which runs the segment a second time.

    Lee and Kifer 2021, algorithm 1, for as much of a graph as a plan asks for. What the second forward and backward
    cost belongs to the segment, and is the planner's to add.

    Attributes:
        norms: The strategy that the norms are taken by: one that holds factors. Where somebody watches the step, to
            make a graph of it, its clipped sum stands for the second backward.
    """

    norms: Strategy
    name: str = REWEIGHT

    def refuses(self, signature: Signature) -> str | None:
        """What the other strategy refuses."""
        return self.norms.refuses(signature)

    def cost(self, signature: Signature, itemsize: int) -> Cost:
        """Of the other strategy, with nothing held: its clipped sum is formed in the second backward."""
        found = self.norms.cost(signature, itemsize)
        return Cost(found.work, 0, found.bytes_transient, found.bytes_summing)

    def squared_norms(self, factors: Factors) -> tuple[Tensor, Factors]:
        """As the other strategy has them."""
        return self.norms.squared_norms(factors)
