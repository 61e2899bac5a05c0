"""What the user asked `transform` for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from perexfx.ir.errors import ArgumentError
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


COST_MODELS = ("profile", "measured")


def check_settings(settings: Settings) -> None:
    """Raises: ArgumentError, naming the first setting that is not what it should be."""
    C = settings.clip_norm
    if C is not None and (isinstance(C, bool) or not isinstance(C, int | float) or not C > 0):
        raise ArgumentError(f"`clip_norm` should be a positive number, or None to clip nothing. Found {C!r}.")
    if not callable(settings.clipping) and settings.clipping not in ("flat", "automatic", "per_layer"):
        raise ArgumentError(
            '`clipping` should be "flat", "automatic", "per_layer" or a function from norms to factors. '
            f"Found {settings.clipping!r}."
        )
    if settings.loss_reduction not in ("mean", "sum"):
        raise ArgumentError(f'`loss_reduction` should be "mean" or "sum". Found {settings.loss_reduction!r}.')
    budget = settings.memory_budget
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 0):
        raise ArgumentError(f"`memory_budget` should be a number of bytes, or None. Found {budget!r}.")
    if settings.cost_model not in COST_MODELS:
        raise ArgumentError(f'`cost_model` should be "profile" or "measured". Found {settings.cost_model!r}.')
    if isinstance(settings.batch_dim, bool) or not isinstance(settings.batch_dim, int) or settings.batch_dim < 0:
        raise ArgumentError(f"`batch_dim` should be an axis counted from the front. Found {settings.batch_dim!r}.")


__all__ = ["COST_MODELS", "Clipping", "Settings", "check_settings"]
