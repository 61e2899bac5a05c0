"""The tape: what one forward shares with its backward.

Promises: it belongs to one forward; what a backward leaves on it is forgotten when the clip node has run, or when
another backward of the same forward begins.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from perexfx.ir.errors import ModeError
from perexfx.ir.factors import Factors, Gradient, Product, SharedGram
from perexfx.kernels.watched import is_watched
from perexfx.planning.plan import Plan
from perexfx.planning.reruns import Cut

if TYPE_CHECKING:
    from perexfx.runtime.replay import AtCut
    from perexfx.runtime.state import PerExample


class Constants:
    """What parameter expressions read besides parameters, by (site, operand); most read nothing."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, str], tuple[Any, ...]] = {}
        self._versions: dict[tuple[str, str], list[int]] = {}

    def __setitem__(self, key: tuple[str, str], values: tuple[Any, ...]) -> None:
        self._values[key], self._versions[key] = values, _versions(values)

    def __getitem__(self, key: tuple[str, str]) -> tuple[Any, ...]:
        """Raises: ModeError where they have been overwritten since."""
        values = self._values.get(key, ())
        if _versions(values) != self._versions.get(key, []):
            raise ModeError(
                f"A tensor that the parameter expression at site `{key[0]}` reads was changed between the forward and "
                "the backward, which needs its old value. Change it before it is read, or give the expression a clone."
            )
        return values


def _versions(values: tuple[Any, ...]) -> list[int]:
    return [value._version for value in pytree.tree_leaves(values) if isinstance(value, Tensor)]


class Tape:
    """What one forward shares with its backward: the plan, and what sites leave behind for the clip node."""

    def __init__(self, state: PerExample, plan: Plan | None, n: int) -> None:
        self.state, self.plan, self.n = state, plan, n
        self.active: frozenset[str] = frozenset()
        self.operands: Mapping[str, Collection[str]] = {}
        self.parameters: dict[str, Tensor] = {}
        self.versions: dict[str, int] = {}
        self.constants = Constants()
        self.left_alone: set[int] = set()
        # a graph has no second backward: it sums what is held
        self.cuts: Mapping[int, Cut] = {} if plan is None or is_watched() else plan.cuts
        self.owner = state.owner if self.cuts else None  # for a second run, which may be all that is left to use it
        self.at_cuts: dict[int, AtCut] = {}
        self.reweighted: set[tuple[str, str]] = set()
        self._task: int | None = None
        self.observed: dict[tuple[str, str], Factors] = {}
        self.held: dict[tuple[str, str], Factors] = {}
        self.waiting: dict[tuple[str, str], Gradient] = {}
        self.left_grams: dict[str, SharedGram] = {}
        self.squared_norms: dict[str, Tensor] = {}

    def activate(self, parameters: frozenset[str]) -> None:
        """Notes which parameters are trained in this forward, and the operands of each site that depend on them."""
        self.active, self.operands = parameters, self.state.active_operands(parameters)

    def is_trained(self, site: str) -> bool:
        """Whether a site has trained parameters in this forward."""
        return bool(self.operands[site])

    def enter_backward(self) -> None:
        """Forgets what an earlier backward of this forward left behind: it may have stopped before the clip node."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task = task
            self.release()

    def with_shared_left(self, factors: Factors, of: tuple[str, int]) -> Factors:
        """A product that shares the Gram matrices of its left factor with those of other sites.

        Args:
            factors: What a site leaves.
            of: The value that these sites read, and how many they are.
        """
        read, users = of
        if not isinstance(factors, Product):
            return factors
        shared = self.left_grams.get(read)
        if shared is None or not shared.is_of(factors.left):
            shared = self.left_grams[read] = SharedGram(users, factors.left)
        return replace(factors, left_gram=shared)

    def release(self) -> None:
        """Lets go of everything that a backward left behind."""
        self.observed, self.held, self.waiting, self.squared_norms, self.left_grams = {}, {}, {}, {}, {}
        self.at_cuts, self.reweighted = {}, set()

    @property
    def scale(self) -> int:
        """What brings the gradients that arrive to those of each example's own loss."""
        return self.n if self.state.settings.loss_reduction == "mean" else 1
