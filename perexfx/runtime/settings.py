"""What the user asked `transform` for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from perexfx.ir.strategy import REWEIGHT

Clipping = str | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Settings:
    """What the user asked `transform` for; see there."""

    clip_norm: float | None
    clipping: Clipping
    loss_reduction: str
    strategy: str | Mapping[str, str]
    memory_budget: int | None
    batch_dim: int
    cost_model: str

    @property
    def may_reweight(self) -> bool:
        """Whether a plan may run parts of the graph a second time: under a memory budget, or where it is asked for."""
        asked = self.strategy.values() if isinstance(self.strategy, Mapping) else (self.strategy,)
        return self.memory_budget is not None or REWEIGHT in asked


__all__ = ["Clipping", "Settings"]
