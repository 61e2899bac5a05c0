"""The tape: what one forward shares with its backward.

Promises: it belongs to one forward; what a backward leaves on it is forgotten when the clip node has run, or when
another backward of the same forward begins. What a backward finds for the user it leaves in `Results`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from perexfx.ir.errors import ModeError
from perexfx.ir.factors import Factors, Gradient, Product, SharedGram
from perexfx.kernels.watched import is_watched
from perexfx.planning import Cut, Plan
from perexfx.runtime.digests import Digest
from perexfx.runtime.settings import Settings
from perexfx.runtime.step_options import StepOptions
from perexfx.sites import SiteTable


@dataclass
class Results:
    """What the last backward found.

    Attributes:
        norms: Gradient norm of each example, before clipping. Shape `[B]`.
        clip_factors: What each example's gradient was multiplied with. Shape `[B]` or `[groups, B]`.
    """

    norms: Tensor | None = None
    clip_factors: Tensor | None = None

    def leave(self, norms: Tensor | None, clip_factors: Tensor | None) -> None:
        """What a backward has found. A module has one such object, whose tapes may outlive what is set aside."""
        self.norms, self.clip_factors = norms, clip_factors


class LastBackward:
    """Which backward has reached a clip node of the transformed module last."""

    def __init__(self) -> None:
        self._task = -1

    def claim(self) -> None:
        """Notes that this backward reached the clip node of one forward.

        Raises:
            ModeError: It has reached that of another forward already.
        """
        task = torch._C._current_graph_task_id()
        if task == self._task:
            raise ModeError(
                "One backward reached two forwards of the transformed model. Which of their rows are the same example "
                "is not known, so their gradients cannot be clipped together. Call `backward()` once per forward "
                "(gradients accumulate), or make both calls inside one module and transform that."
            )
        self._task = task


@dataclass(frozen=True)
class AtCut:
    """What a backward finds at a cut.

    Attributes:
        gradient: Of the value there, and what tells it from others, where a rerun ends; None where it has none.
        values: What the segment after it reads, by name, where it is to run again.
        digest: What tells the value from others, where a rerun ends.
        states: Of the random number generators of CPU and device, where a rerun begins.
        settings: Of the modules that it calls, where a rerun begins.
    """

    gradient: tuple[Tensor, Digest] | None
    values: Mapping[str, Any]
    digest: Digest | None
    states: tuple[Tensor, ...]
    settings: Mapping[str, Mapping[str, Any]]


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
    """What one forward shares with its backward: the plan, and what sites leave behind for the clip node.

    Attributes:
        sites: Of the graph.
        settings: What `transform` was asked for.
        options: How this step is to run.
        plan: What it follows; None: nothing has a gradient.
        n: Number of examples.
        results: Where the backward leaves what it finds.
        last: Which backward came last.
        cuts: Number of a segment -> the cut before it, where that is anything to a rerun of this step.
        owner: The transformed module, where there are cuts: a second run may be all that is left to use it.
    """

    def __init__(
        self,
        sites: SiteTable,
        settings: Settings,
        options: StepOptions,
        plan: Plan | None,
        n: int,
        *,
        results: Results,
        last: LastBackward,
    ) -> None:
        self.sites, self.settings, self.options, self.plan, self.n = sites, settings, options, plan, n
        self.results, self.last = results, last
        # a graph has no second backward: it sums what is held
        self.cuts: Mapping[int, Cut] = {} if plan is None or is_watched() else plan.cuts
        self.owner: nn.Module | None = None
        self.active: frozenset[str] = frozenset()
        self.operands: Mapping[str, Collection[str]] = {}
        self.parameters: dict[str, Tensor] = {}
        self.versions: dict[str, int] = {}
        self.constants = Constants()
        self.left_alone: set[int] = set()
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
        self.active, self.operands = parameters, self.sites.active_operands(parameters)

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
        return self.n if self.settings.loss_reduction == "mean" else 1

    @property
    def takes_together(self) -> bool:
        """Whether small gradients may wait for the clip node: nothing asks for them, or for norms, one by one."""
        asks_for_each = self.options.gradients_to is not None or self.options.one_by_one
        return self.settings.clipping != "per_layer" and not asks_for_each


class ReceivingTape(Tape, ABC):
    """A tape that takes what sites leave as it comes: no norm node follows, and no clip node."""

    @abstractmethod
    def add(self, site: str, factors: Mapping[str, Factors]) -> None:
        """What one site leaves, by operand."""


__all__ = ["AtCut", "Constants", "LastBackward", "ReceivingTape", "Results", "Tape"]
