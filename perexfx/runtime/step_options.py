"""How one step is to run: a value that is handed to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from perexfx.ir.inputs import Inputs
from perexfx.planning import Plan, Rerun


@dataclass(frozen=True)
class StepOptions:
    """How one step is to run. As users' steps do, where nothing is said.

    Attributes:
        plans: Kind of input and batch size -> what it follows instead of the plan for these.
        gradients_to: Given each example's gradients, by the clip node: parameter name -> gradients of each example's
            own loss, `[B, *shape]`. They take B times the memory of the parameters. None: they are not formed.
        one_by_one: Let sites share nothing, so that each can be timed.
        around_rerun: The context that a second run of segments runs in, so that it can be timed.
    """

    plans: Mapping[tuple[Inputs, int], Plan] = field(default_factory=dict)
    gradients_to: Callable[[Mapping[str, Tensor]], None] | None = None
    one_by_one: bool = False
    around_rerun: Callable[[Rerun], AbstractContextManager[Any]] = nullcontext


__all__ = ["StepOptions"]
