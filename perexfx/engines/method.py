"""What the papers' whole-model methods have in common: how they are called, and what they return.

Promises: a method sees one batch at a time, with every example apart; models that mix examples, and whatever else
`perexfx.transform` refuses, are refused before anything is computed. `.grad` is filled by `step` alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from perexfx.analysis import Analysis
from perexfx.api import transform
from perexfx.ir import Layout, squared_norms_of
from perexfx.ir.errors import ArgumentError
from perexfx.ir.inputs import GivenInputs, Inputs, bind_inputs, by_name, named_leaves
from perexfx.planning import Plan
from perexfx.runtime import Runtime, Transformed, runtime_of
from perexfx.steps import LossFunction, checked_loss


class StepResult(NamedTuple):
    """What one step finds.

    Attributes:
        loss: Of the batch.
        norms: Gradient norm of each example, before clipping. Shape `[B]`.
        grads: Parameter name -> clipped sum, or its mean over examples where the loss is a mean.
    """

    loss: Tensor
    norms: Tensor
    grads: dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """What a method is to do.

    Attributes:
        model: Any that `perexfx.transform` takes.
        loss_fn: `(model(x), y) -> scalar`, joining examples as `loss_reduction` says.
        clip_norm: C.
        loss_reduction: "mean" or "sum".
        batch_dim: The example axis of the inputs.
    """

    model: nn.Module
    loss_fn: LossFunction
    clip_norm: float
    loss_reduction: str
    batch_dim: int

    @cached_property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def joined(self, losses: Sequence[Tensor]) -> Tensor:
        """The batch's loss from those of its examples."""
        each = torch.stack(tuple(losses))
        return each.mean() if self.loss_reduction == "mean" else each.sum()

    def loss_of(self, output: Any, targets: Any) -> Tensor:
        """The loss of an output."""
        return checked_loss(self.loss_fn(output, targets))

    def factors(self, norms: Tensor) -> Tensor:
        """What each example is multiplied with; zero for those that are not finite. Shape `[B]`."""
        return (self.clip_norm / norms).clamp(max=1).masked_fill(~torch.isfinite(norms), 0)

    def share(self, n: int) -> float:
        """What the clipped sum is multiplied with."""
        return 1 / max(1, n) if self.loss_reduction == "mean" else 1.0


@dataclass(frozen=True)
class Batch:
    """One batch, whose examples can be told apart.

    Attributes:
        args: Positional inputs of the forward.
        kwargs: Keyword inputs.
        arguments: The same by name.
        targets: Any pytree of tensors.
        n: Number of examples.
        carrying: Names of the inputs that carry examples.
        batch_dim: The example axis of the inputs.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    arguments: Mapping[str, Any]
    targets: Any
    n: int
    carrying: frozenset[str]
    batch_dim: int

    def targets_of(self, at: int) -> Any:
        """The targets of one example, as a batch of one."""
        return pytree.tree_map_only(Tensor, lambda y: y.narrow(self._axis_of(y), at, 1), self.targets)

    def _axis_of(self, target: Tensor) -> int:
        for axis in dict.fromkeys((0, self.batch_dim)):
            if target.dim() > axis and target.shape[axis] == self.n:
                return axis
        raise ArgumentError(
            f"`y` should have the {self.n} examples of the inputs on axis 0, or on `batch_dim`={self.batch_dim}. Found "
            f"a tensor of shape {list(target.shape)}."
        )

    def leaves_of(self, at: int) -> dict[str, Any]:
        """The inputs of one example by name, as a batch of one; containers are taken apart."""
        return {
            name: value.narrow(self.batch_dim, at, 1) if name in self.carrying else value
            for name, value in self.leaves.items()
        }

    @property
    def leaves(self) -> dict[str, Any]:
        """The inputs by name; containers are taken apart."""
        return named_leaves(self.arguments)

    def call(self, model: Callable[..., Any], at: int) -> Any:
        """A model's output for one example."""
        whole, one = self.leaves, self.leaves_of(at)
        of_one = {id(value): one[name] for name, value in whole.items() if isinstance(value, Tensor)}
        given = pytree.tree_map_only(Tensor, lambda tensor: of_one.get(id(tensor), tensor), (self.args, self.kwargs))
        args, kwargs = given
        return model(*args, **kwargs)


class Method(ABC):
    """One whole-model method, on one model.

    Attributes:
        name: Of the method.
        also: What the papers call it.
        problem: What it is to do.
    """

    name: ClassVar[str]
    also: ClassVar[str]

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._transformed: Transformed | None = None

    @abstractmethod
    def run(self, batch: Batch) -> StepResult:
        """One step on a batch of one example at least."""

    def __call__(self, x: GivenInputs, y: Any) -> StepResult:
        """One step."""
        with torch.enable_grad():
            batch = self._batch(x, y)
            if batch.n == 0:
                return self._of_nothing()
            return self.run(batch)

    def transformed(self, x: GivenInputs | None = None) -> Transformed:
        """The model as `perexfx.transform` has it: its captured graph, and what is known of it."""
        if self._transformed is None:
            problem = self.problem
            self._transformed = transform(
                problem.model,
                x,
                clip_norm=problem.clip_norm,
                loss_reduction=problem.loss_reduction,
                batch_dim=problem.batch_dim,
            )
        return self._transformed

    @property
    def runtime(self) -> Runtime:
        """What is known of the transformed model."""
        return runtime_of(self.transformed())

    def plan_for(self, batch: Batch) -> tuple[Plan, Analysis]:
        """The plan and the analysis for a batch."""
        kind, n = self._kind_of(batch.arguments)
        plan = self.runtime.plans.get((kind, n)) or self.runtime.prepare(kind, n)
        analysis = self.runtime.known(kind)
        assert analysis is not None
        return plan, analysis

    def _kind_of(self, arguments: Mapping[str, Any]) -> tuple[Inputs, int]:
        return self.runtime.kind_of(named_leaves(arguments))

    def _batch(self, x: GivenInputs, y: Any) -> Batch:
        gm = self.transformed(x)
        arguments = by_name(bind_inputs(gm, x, "x"))
        kind, n = self._kind_of(arguments)
        if kind not in {known for known, _ in self.runtime.plans}:
            self.runtime.prepare(kind, n)  # refuses what mixes at these shapes
        args, kwargs = ((), x) if isinstance(x, Mapping) else (x if isinstance(x, tuple) else (x,), {})
        return Batch(args, kwargs, arguments, y, n, kind.carrying, self.problem.batch_dim)

    def _of_nothing(self) -> StepResult:
        """A step without examples, as Poisson sampling makes some."""
        trained = self.problem.trained
        any_of_them = next(iter(trained.values()))
        zeros = {name: torch.zeros_like(p, requires_grad=False) for name, p in trained.items()}
        return StepResult(any_of_them.new_zeros(()).detach(), any_of_them.new_zeros(0).detach(), zeros)


class ClippedSum:
    """Adds up gradients of one example after the other, each clipped as it comes."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.norms: list[Tensor] = []
        self._totals = {name: torch.zeros_like(p, requires_grad=False) for name, p in problem.trained.items()}

    def add(self, gradients: Iterable[Tensor | None]) -> None:
        """The gradients of one example's loss, in the order of the parameters; None where it has none."""
        found = {name: gradient for name, gradient in zip(self._totals, gradients, strict=True) if gradient is not None}
        norm = norm_of(found.values(), like=next(iter(self._totals.values())))
        self.norms.append(norm)
        if bool(torch.isfinite(norm)):
            factor = self.problem.factors(norm)
            for name, gradient in found.items():
                self._totals[name].addcmul_(gradient, factor.to(gradient.dtype))

    def result(self, losses: Sequence[Tensor]) -> StepResult:
        """Of all examples, whose losses these are."""
        share = self.problem.share(len(losses))
        grads = {name: total.mul_(share) for name, total in self._totals.items()}
        return StepResult(self.problem.joined(losses), torch.stack(self.norms), grads)


def norm_of(gradients: Iterable[Tensor], like: Tensor) -> Tensor:
    """The norm of several tensors together, a scalar in float32 at least."""
    squares = [squared_norms_of(gradient[None]) for gradient in gradients]
    if not squares:
        return like.new_zeros((), dtype=torch.promote_types(like.dtype, torch.float32))
    return torch.cat(squares).sum().sqrt()


def all_finite(gradients: Iterable[Tensor | None]) -> bool:
    """Whether there is no infinity and no NaN in some gradients."""
    return all(bool(torch.isfinite(gradient).all()) for gradient in gradients if gradient is not None)


def item(container: Any, key: Any) -> Any:
    """What graphs of methods take from a dict or a list."""
    return container[key]


def slice_of(value: Tensor, layout: Layout | None, at: int) -> Tensor:
    """One example's part of a value, as a batch of one; the value itself where it carries no examples."""
    if layout is None:
        return value
    if layout.repeats == 1:
        return value.narrow(layout.axis, at, 1)
    one = layout.apart(value).narrow(layout.axis + 1, at, 1)
    return one.flatten(layout.axis, layout.axis + 2)


__all__ = [
    "Batch",
    "ClippedSum",
    "Method",
    "Problem",
    "StepResult",
    "all_finite",
    "item",
    "norm_of",
    "slice_of",
]
