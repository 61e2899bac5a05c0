"""The fallback: any operation, by a vmapped vjp of that operation alone.

Exact wherever torch can differentiate the operation on one example. It recomputes the operation once for its inputs'
gradients and once, example by example, for its parameters'.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from perexfx.ir.cost import Work
from perexfx.ir.factors import Factors, Gradient, GradientSignature, Signature
from perexfx.ir.rule import Arguments, Backward, Geometry, Rule, Target

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Fallback(Rule):
    """Any operation; or, with `of`, one that a rule covers, at shapes that it does not.

    Attributes:
        of: The rule whose arguments and forward are used.
    """

    of: Rule | None = None
    targets = ()
    inputs = ()

    @property
    def kind(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride] (it depends on the instance)
        """With the rule that it stands in for."""
        return f"fallback ({self.of.kind})" if self.of else "fallback"

    @property
    def operands(self) -> Sequence[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Those of the rule that it stands in for."""
        return self.of.operands if self.of else ()

    def operands_of(self, arguments: Arguments) -> Sequence[str]:
        """Any argument."""
        return self.of.operands_of(arguments) if self.of else [name for name in arguments if name.isdigit()]

    def bind(self, target: Target, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The leaves of all arguments, by number."""
        if self.of:
            return self.of.bind(target, args, kwargs)
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        return {**{str(at): leaf for at, leaf in enumerate(leaves)}, "target": target, "spec": spec}

    def signatures(self, arguments: Arguments, geometry: Geometry) -> dict[str, Signature]:
        """Gradients at hand."""
        return {
            name: GradientSignature(geometry.n, shape)
            for name, shape in geometry.shapes.items()
            if name not in geometry.layouts
        }

    def own_work(self, geometry: Geometry, itemsize: int) -> tuple[Work, ...]:
        """Reads and writes of the operation, forward and backward, once more; products inside it are not counted."""
        shapes = [*geometry.shapes.values(), *(output.shape for output in geometry.outputs)]
        elements = sum(math.prod(shape) for shape in shapes)
        return (Work("memory", bytes=6 * itemsize * elements, calls=20),)

    def forward(self, arguments: Arguments, geometry: Geometry) -> tuple[Any, tuple[Tensor, ...]]:
        """The operation itself."""
        return self._call(arguments, geometry), ()

    def backward(self, call: Backward) -> tuple[dict[str, Tensor], dict[str, Factors]]:
        """A vjp for the inputs, and one per example for the operands."""
        inputs = {name: call.arguments[name] for name in call.inputs}
        gradients = self._vjp(call.arguments, inputs, call.grad_outputs, call) if inputs else {}
        factors: dict[str, Factors] = {
            name: Gradient(value) for name, value in self._each(call).items() if name in call.operands
        }
        return gradients, factors

    def _call(self, arguments: Arguments, geometry: Geometry) -> Any:
        if self.of:
            return self.of.forward(arguments, geometry)[0]
        spec: pytree.TreeSpec = arguments["spec"]
        leaves = [arguments[str(at)] for at in range(spec.num_leaves)]
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        target: Any = arguments["target"]
        return getattr(args[0], target)(*args[1:], **kwargs) if isinstance(target, str) else target(*args, **kwargs)

    def _floating(self, arguments: Arguments, call: Backward) -> tuple[Tensor, ...]:
        leaves = pytree.tree_leaves(self._call(arguments, call.geometry))
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point())

    def _each(self, call: Backward) -> Tensors:
        """Each example's gradient of the operands."""
        geometry = call.geometry
        operands: Tensors = {name: call.arguments[name] for name in call.operands}
        if geometry.n == 0:
            return {name: value.new_zeros(0, *value.shape) for name, value in operands.items()}
        rows = {name: layout.split(call.arguments[name]) for name, layout in geometry.layouts.items()}
        cotangents = [
            gradient if output.layout is None else output.layout.split(gradient)
            for gradient, output in zip(call.grad_outputs, geometry.outputs, strict=True)
        ]
        axes = tuple(None if output.layout is None else 0 for output in geometry.outputs)

        def mapped(row: Tensors, *gradients: Tensor) -> Tensors:
            given = {**call.arguments, **geometry.for_one, **row}
            _, vjp, *_ = torch.func.vjp(lambda values: self._floating({**given, **values}, call), operands)
            (found,) = vjp(_floating(gradients, geometry))
            return found

        def single(row: Tensors, *gradients: Tensor) -> Tensors:
            return self._vjp({**call.arguments, **geometry.for_one, **row}, operands, gradients, call)

        return _for_each_example(mapped, single, (0, *axes), rows, *cotangents)

    def _vjp(self, arguments: Arguments, values: Tensors, grad_outputs: Sequence[Tensor], call: Backward) -> Tensors:
        """The gradients of some arguments, by autograd."""
        leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
        with torch.enable_grad():
            outputs = self._floating({**arguments, **leaves}, call)
        pairs = [
            (output, gradient)
            for output, gradient in zip(outputs, _floating(grad_outputs, call.geometry), strict=True)
            if output.requires_grad
        ]
        if not pairs:
            return {name: torch.zeros_like(value) for name, value in values.items()}
        given, gradients = zip(*pairs, strict=True)
        found = torch.autograd.grad(given, list(leaves.values()), gradients, materialize_grads=True)
        return dict(zip(leaves, found, strict=True))


def _floating(gradients: Sequence[Tensor], geometry: Geometry) -> tuple[Tensor, ...]:
    """The gradients of those results that have one."""
    return tuple(g for g, output in zip(gradients, geometry.outputs, strict=True) if output.is_floating)


def _for_each_example(
    mapped: Callable[..., Tensors], single: Callable[..., Tensors], axes: tuple[int | None, ...], *arguments: Any
) -> Tensors:
    """A function of every example: vmapped, or one after the other, in the form for that, where vmap cannot."""
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.filterwarnings("ignore", message=".*batching rule")  # slower, not wrong
        try:
            return torch.func.vmap(mapped, in_dims=axes)(*arguments)
        except (RuntimeError, NotImplementedError):
            n = pytree.tree_leaves(arguments[0])[0].shape[0]
            rows = [
                single(*(_row(value, axis, i) for value, axis in zip(arguments, axes, strict=True))) for i in range(n)
            ]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _row(value: Any, axis: int | None, i: int) -> Any:
    return value if axis is None else pytree.tree_map(lambda tensor: tensor[i], value)
