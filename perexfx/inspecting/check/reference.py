"""The reference: one example at a time, by plain autograd, without any of the transform's own operations.

Promises: neither `.grad` nor buffers of a module change, and hooks of its parameters do not run: it is called with
tensors of its own in their place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from perexfx.ir.errors import ArgumentError
from perexfx.ir.inputs import named_leaves
from perexfx.ir.layout import Layout
from perexfx.steps import LossFunction


def named_tensors(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among some arguments, by name; those inside of a container as `batch['image']`."""
    return {name: leaf for name, leaf in named_leaves(arguments).items() if isinstance(leaf, Tensor)}


def _name_of(path: Sequence[Any]) -> str:
    return f"{path[0].key}{pytree.keystr(tuple(path[1:]))}"


@dataclass(frozen=True)
class Call:
    """The inputs of one forward and its targets.

    Attributes:
        bound: The arguments of the forward.
        axes: Name of a tensor that carries examples -> their axis.
        targets: Any pytree; each tensor in it carries examples.
        target_axes: On which axis, in pytree order.
    """

    bound: inspect.BoundArguments
    axes: Mapping[str, int]
    targets: Any
    target_axes: tuple[int, ...]

    def with_tensors(self, function: Callable[[Tensor, int], Tensor]) -> Call:
        """With a function of each tensor that carries examples, and its axis, in place of it."""
        flat, spec = pytree.tree_flatten_with_path(dict(self.bound.arguments))
        leaves = [
            function(leaf.detach(), self.axes[name]) if (name := _name_of(path)) in self.axes else _detached(leaf)
            for path, leaf in flat
        ]
        arguments = pytree.tree_unflatten(leaves, spec)
        return replace(self, bound=inspect.BoundArguments(self.bound.signature, arguments))

    def take(self, examples: Sequence[int]) -> Call:
        """Some of its examples."""

        def rows(value: Tensor, axis: int) -> Tensor:
            return value.index_select(axis, torch.tensor(examples, device=value.device))

        left = iter(self.target_axes)
        targets = pytree.tree_map_only(Tensor, lambda value: rows(value.detach(), next(left)), self.targets)
        return replace(self.with_tensors(rows), targets=targets)


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


class Stateless:
    """A module over given parameters, with copies of its buffers."""

    def __init__(self, module: nn.Module, parameters: Mapping[int, Tensor], names: Mapping[str, Tensor]) -> None:
        """Parameters are looked up by the `id` of the module's own, and by name where it has others."""
        self.module = module
        self.tensors = {
            name: parameters[id(own)] if id(own) in parameters else names[name]
            for name, own in module.named_parameters()
        }
        self.buffers = {name: names.get(name, own) for name, own in module.named_buffers()}

    def __call__(self, call: Call) -> Any:
        """The module's output."""
        tensors = {**self.tensors, **{name: value.detach().clone() for name, value in self.buffers.items()}}
        return functional_call(self.module, tensors, *self._arguments(call.bound))

    def _arguments(self, bound: inspect.BoundArguments) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the transformed module as this one takes them, which may want some of them by keyword."""
        own = inspect.signature(self.module.forward).parameters
        names = [name for name, p in bound.signature.parameters.items() if p.kind is not p.KEYWORD_ONLY]
        given = list(zip(names, bound.args, strict=False))
        by_keyword = {n: v for n, v in given if n in own and own[n].kind is inspect.Parameter.KEYWORD_ONLY}
        by_place = [value for name, value in given if name not in by_keyword]
        return (*by_place, *bound.args[len(given) :]), {**bound.kwargs, **by_keyword}


def output_tensors(output: Any) -> dict[str, Tensor]:
    """The tensors of an output, by name, in pytree order."""
    flat, _ = pytree.tree_flatten_with_path(output)
    return {f"output{pytree.keystr(path)}": leaf for path, leaf in flat if isinstance(leaf, Tensor)}


def rows_of(value: Tensor, layout: Layout) -> Tensor:
    """A tensor as `[n, everything that belongs to an example]`."""
    return layout.examples_first(value).flatten(1)


@dataclass(frozen=True)
class BuiltInLoss:
    """A curved function of all that an example's outputs hold, joined over examples.

    Curved, so that a wrong output changes the gradients too; with other weights for every entry, so that no two are
    taken for one another.

    Attributes:
        layouts: Where each tensor of the output carries examples.
        reduction: "mean" or "sum".
    """

    layouts: Sequence[Layout | None]
    reduction: str

    def __call__(self, output: Any, targets: Any) -> Tensor:
        """`sum(w * y + sin(y))`, in float32 at least."""
        parts = []
        for at, (value, layout) in enumerate(zip(output_tensors(output).values(), self.layouts, strict=True)):
            if layout is None or not value.is_floating_point():
                continue
            rows = rows_of(value, layout)
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            weights = torch.arange(rows.shape[1], device=rows.device).to(rows.dtype).add(at).cos()
            parts.append((weights * rows + rows.sin()).sum(1))
        each = torch.stack(parts).sum(0)
        return each.mean() if self.reduction == "mean" else each.sum()


@dataclass(frozen=True)
class Alone:
    """What each example gives by itself.

    Attributes:
        gradients: Parameter name -> gradient of each example's own loss, `[n, *shape]`; zeros where it reaches none.
        outputs: Output of each example.
        losses: Loss of each example, `[n]`.
    """

    gradients: dict[str, Tensor]
    outputs: tuple[dict[str, Tensor], ...]
    losses: Tensor


def one_at_a_time(module: Stateless, call: Call, n: int, loss: LossFunction, trained: Mapping[str, Tensor]) -> Alone:
    """Every example alone.

    Args:
        module: The untransformed forward.
        call: For n examples.
        n: Their number.
        loss: Of an output and targets.
        trained: The parameters whose gradients are wanted, as `module` holds them.

    Raises:
        ArgumentError: The model does not run on a single example.
    """
    rows, outputs, losses = [], [], []
    for i in range(n):
        single = call.take([i])
        try:
            output = module(single)
        except Exception as error:
            raise ArgumentError(
                f"The model does not run on example {i} alone: {error}. What each example gives by itself is what "
                "clipping is about, so it has to."
            ) from error
        value = loss(output, single.targets)
        rows.append(gradients_of(value, trained))
        outputs.append({name: tensor.detach() for name, tensor in output_tensors(output).items()})
        losses.append(value.detach())
    gradients = {name: torch.stack([row[name] for row in rows]) for name in trained}
    return Alone(gradients, tuple(outputs), torch.stack(losses))


def gradients_of(loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a backward would add to each parameter's `.grad`; zeros where that is nothing."""
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ArgumentError(f"`loss_fn` should return a tensor of shape []. Found {found}.")
    found = [None] * len(parameters)
    if loss.requires_grad:
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient.detach()
        for (name, parameter), gradient in zip(parameters.items(), found, strict=True)
    }
