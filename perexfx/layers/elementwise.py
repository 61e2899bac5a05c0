"""A raw parameter that broadcasts into a sum, difference, product or quotient: positions, scales, shifts."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perexfx.ir.factors import Factors, Gradient, GradientSignature, Signature
from perexfx.ir.layout import Layout
from perexfx.ir.rule import Arguments, Backward, Geometry, Rule, Shape, Target

_NAMES = {
    "add": (operator.add, torch.add, "add"),
    "sub": (operator.sub, torch.sub, torch.subtract, "sub", "subtract"),
    "mul": (operator.mul, torch.mul, torch.multiply, "mul", "multiply"),
    "div": (operator.truediv, torch.div, torch.divide, torch.true_divide, "div", "divide", "true_divide"),
}
_OPERATION = {target: name for name, targets in _NAMES.items() for target in targets}


def reduce_to(gradient: Tensor, layout: Layout, shape: Shape) -> Tensor:
    """The per-example gradient of a value that was broadcast: summed over the axes it lacked.

    Args:
        gradient: Gradient of the result, with the result's layout.
        layout: Where its examples are.
        shape: Shape of the broadcast value; sizes may also divide the result's, as after `repeat`.

    Returns: Shape `[n, *shape]`.
    """
    lead = gradient.dim() - len(shape)
    padded = (1,) * lead + tuple(shape)
    value = layout.examples_first(gradient)
    own = padded[layout.axis]  # rows of the value itself along the example axis: each example has copies of all of them
    value = value.unflatten(1, (value.shape[1] // own, own)).sum(1)
    value = value.movedim(1, 1 + layout.axis)
    summed = []
    for axis, size in enumerate(padded):
        at = 1 + axis + len(summed)
        if value.shape[at] != size:
            value = value.unflatten(at, (value.shape[at] // size, size))
            summed.append(at)
    if summed:
        value = value.sum(summed)
    return value.reshape(value.shape[0], *shape)


def sum_to(gradient: Tensor, shape: Sequence[int]) -> Tensor:
    """The ordinary gradient of a value that was broadcast."""
    return gradient if gradient.shape == tuple(shape) else gradient.sum_to_size(*shape)


@dataclass(frozen=True)
class Elementwise(Rule):
    """`x + p`, `x - p`, `x * p`, `x / p` and the same with sides exchanged."""

    kind = "elementwise"
    targets = tuple(_OPERATION)
    operands = ("other", "input")
    inputs = ("input", "other")

    @staticmethod
    def named(
        input: Any,
        other: Any,
        *,
        alpha: Any = 1,
        rounding_mode: Any = None,
    ) -> dict[str, Any]:
        """As `torch.add` and `torch.div`."""
        return dict(locals())

    def bind(self, target: Target, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by name, and which operation it is."""
        return {**self.named(*args, **kwargs), "operation": _OPERATION[target]}

    def refuses(self, arguments: Arguments) -> str | None:
        """Rounded quotients."""
        if arguments["rounding_mode"] is not None:
            return "a rounded quotient has no gradient"
        if isinstance(arguments["alpha"], torch.fx.Node):
            return "its alpha must be constant"
        return None

    def signatures(self, arguments: Arguments, geometry: Geometry) -> dict[str, Signature]:
        """Gradients at hand."""
        return {
            name: GradientSignature(geometry.n, geometry.shapes[name])
            for name in self.operands
            if name in geometry.shapes and name not in geometry.layouts
        }

    def forward(self, arguments: Arguments, geometry: Geometry) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The ordinary operation."""
        x, other, alpha = arguments["input"], arguments["other"], arguments["alpha"]
        match arguments["operation"]:
            case "add":
                return torch.add(x, other, alpha=alpha), ()
            case "sub":
                return torch.sub(x, other, alpha=alpha), ()
            case "mul":
                return torch.mul(x, other), ()
            case _:
                return torch.div(x, other), ()

    def reads(self, arguments: Arguments, inputs: Collection[str], operands: Collection[str]) -> Collection[str]:
        """Nothing for sums; for products each side for the gradient of the other."""
        wanted = {*inputs, *operands}
        match arguments["operation"]:
            case "add" | "sub":
                return ()
            case "mul":
                return [name for name, other in (("input", "other"), ("other", "input")) if other in wanted]
            case _:
                return ("input", "other") if "other" in wanted else ("other",)

    def backward(self, call: Backward) -> tuple[dict[str, Tensor], dict[str, Factors]]:
        """The two partial derivatives, times the gradient of the result."""
        gradients = {
            name: sum_to(self._times_derivative(call, name), call.geometry.shapes[name]) for name in call.inputs
        }
        layout = call.geometry.output_layout
        factors: dict[str, Factors] = {
            name: Gradient(reduce_to(self._times_derivative(call, name), layout, call.geometry.shapes[name]))
            for name in call.operands
        }
        return gradients, factors

    def _times_derivative(self, call: Backward, name: str) -> Tensor:
        """The gradient of the result times the derivative by one argument, not yet summed over broadcast axes."""
        g: Any = call.grad_output
        x: Any = call.arguments.get("input")
        other: Any = call.arguments.get("other")
        match call.arguments["operation"], name:
            case ("add", "input") | ("sub", "input"):
                return g
            case "add", _:
                return g if call.arguments["alpha"] == 1 else g * call.arguments["alpha"]
            case "sub", _:
                return g * -call.arguments["alpha"]
            case "mul", "input":
                return g * other
            case "mul", _:
                return g * x
            case _, "input":
                return g / other
            case _:
                return -g * x / (other * other)
