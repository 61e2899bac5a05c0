"""One strategy at one site, with its predicted cost or the reason why it was refused."""

from __future__ import annotations

import math
from dataclasses import dataclass

from perexfx.ir.cost import Cost
from perexfx.ir.strategy import REWEIGHT, Strategy


@dataclass(frozen=True)
class Alternative:
    """One strategy at one site.

    Attributes:
        strategy: The strategy.
        seconds: Predicted time; infinite where it is refused.
        cost: What it was predicted from; None where it is refused.
        refusal: Why it does not apply; "" where it does.
    """

    strategy: Strategy
    seconds: float = math.inf
    cost: Cost | None = None
    refusal: str = ""

    @property
    def is_second_run(self) -> bool:
        """Whether it goes for a whole segment of the graph, or not at all."""
        return self.strategy.name == REWEIGHT

    @property
    def bytes_held(self) -> int:
        """Kept alive until the clip node."""
        return self.cost.bytes_held if self.cost else 0

    @property
    def bytes_transient(self) -> int:
        """Alive for a moment on top of that, while the norms are formed."""
        return self.cost.bytes_transient if self.cost else 0

    @property
    def bytes_summing(self) -> int:
        """The same while the clipped sum is formed."""
        return self.cost.bytes_summing if self.cost else 0
