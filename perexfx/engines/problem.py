"""What a method is to do, one batch of it, and what it finds.

Promises: every example of a batch can be told apart, inputs, targets and outputs; a loss that a method would take for
another than it is, is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from perexfx.ir import Layout, squared_norms_of
from perexfx.ir.errors import ArgumentError
from perexfx.ir.inputs import named_leaves
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

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def joined(self, losses: Sequence[Tensor]) -> Tensor:
        """The batch's loss from those of its examples."""
        each = torch.stack(tuple(losses))
        return each.mean() if self.loss_reduction == "mean" else each.sum()

    def loss_of(self, output: Any, targets: Any) -> Tensor:
        """The loss of an output, a scalar."""
        return checked_loss(self.loss_fn(output, targets)).reshape(())

    def refuse_own_gradients(self, output: Any, targets: Any) -> None:
        """Raises: ArgumentError, where the loss reads parameters itself: those gradients would pass by the method."""
        detached = pytree.tree_map_only(Tensor, Tensor.detach, output)
        loss = self.loss_fn(detached, targets)
        if isinstance(loss, Tensor) and loss.requires_grad:
            raise ArgumentError(
                "`loss_fn` has a gradient that does not come from the model's output: it reads parameters itself. Give "
                "it the output alone, or use `perexfx.engines.one_by_one`."
            )

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

        def one(leaf: Any) -> Tensor:
            axis = self._axis_of(leaf)
            return leaf.narrow(axis, at, 1)

        return pytree.tree_map(one, self.targets)

    def _axis_of(self, target: Any) -> int:
        if not isinstance(target, Tensor):
            raise ArgumentError(f"`y` should be a tensor, or a pytree of tensors. Found {type(target).__name__} in it.")
        axes = [
            axis for axis in dict.fromkeys((0, self.batch_dim)) if target.dim() > axis and target.shape[axis] == self.n
        ]
        if len(axes) != 1:
            found = "their number on both" if axes else f"shape {list(target.shape)}"
            raise ArgumentError(
                f"`y` should have the {self.n} examples of the inputs on axis 0, or on `batch_dim`={self.batch_dim}. "
                f"Found a tensor with {found}."
            )
        return axes[0]

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


def refuse_other_joins(problem: Problem, output: Any, layouts: Sequence[Layout | None], batch: Batch) -> None:
    """Methods that weight outputs take example i's loss to be its share of the batch's: that must be so.

    Raises:
        ArgumentError: The batch's loss is not the sum or mean of what it is for each example by itself.
    """
    detached = pytree.tree_map_only(Tensor, Tensor.detach, output)
    whole = problem.loss_fn(detached, batch.targets)
    each = [problem.loss_fn(one_of(detached, layouts, at), batch.targets_of(at)).reshape(()) for at in range(batch.n)]
    joined = problem.joined(each)
    tolerance = 1e3 * torch.finfo(joined.dtype).eps
    if bool(torch.isfinite(whole).all()) and not torch.allclose(
        whole.reshape(()), joined, rtol=tolerance, atol=tolerance
    ):
        raise ArgumentError(
            f"`loss_fn` gives {float(whole):.6g} for the batch, and {float(joined):.6g} is the "
            f"{problem.loss_reduction} of what it gives for each example by itself: it does not join them so (class "
            "weights, ignored targets, or another `loss_reduction`?). Use a loss that does, or "
            "`perexfx.engines.one_by_one`."
        )


class ClippedSum:
    """Adds up gradients of one example after the other, each clipped as it comes."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.norms: list[Tensor] = []
        self._totals = {name: torch.zeros_like(p, requires_grad=False) for name, p in problem.trained.items()}

    def add(self, gradients: Sequence[Tensor | None], *, is_alone: bool = True) -> bool:
        """The gradients of one example's loss, in the order of the parameters; None where it has none.

        Args:
            gradients: Its own.
            is_alone: Whether it counts, as an example that is not finite, where they are not.

        Returns:
            Whether it was counted.
        """
        found = {name: gradient for name, gradient in zip(self._totals, gradients, strict=True) if gradient is not None}
        norm = norm_of(found.values(), like=next(iter(self._totals.values())))
        is_finite = bool(torch.isfinite(norm))
        if not is_finite and not is_alone:
            return False
        self.norms.append(norm)
        if is_finite:
            factor = self.problem.factors(norm)
            for name, gradient in found.items():
                self._totals[name].addcmul_(gradient, factor.to(gradient.dtype))
        return True

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


def parts_of(output: Any, layouts: Sequence[Layout | None]) -> list[tuple[Tensor, Layout | None]]:
    """The tensors of an output, each with where it carries examples.

    Raises:
        ArgumentError: The output is an object that cannot be taken apart.
    """
    tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    if len(tensors) != len(layouts):
        raise ArgumentError(
            f"The model returns {type(output).__name__}, which holds {len(layouts)} tensors and cannot be taken apart. "
            "Return tensors in a tuple or dict, or use `perexfx.engines.one_by_one`."
        )
    return list(zip(tensors, layouts, strict=True))


def one_of(output: Any, layouts: Sequence[Layout | None], at: int) -> Any:
    """One example's part of an output, as a batch of one. Raises: as `parts_of`."""
    parts = iter(slice_of(value, layout, at) for value, layout in parts_of(output, layouts))
    return pytree.tree_map_only(Tensor, lambda _: next(parts), output)


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
    "Problem",
    "StepResult",
    "norm_of",
    "one_of",
    "parts_of",
    "refuse_other_joins",
    "slice_of",
]
