"""What recurrent layers share, and the plain one: `rnn_tanh` and `rnn_relu`.

The forward is torch's fused operation. The gradient of a gate is a slope times the gradient of the hidden (or cell)
state. The backward finds the slopes of all times at once, with one product per weight, from the input and the hidden
states; step by step it does no more than to multiply them, in place, and to go on to the time before. The gates'
gradients are then the right factor of every weight, as if the layer were two linear ones.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from perexfx.ir.factors import Factors, Gradient, GradientSignature, Product, ProductSignature, SharedGram, Signature
from perexfx.ir.layout import Layout
from perexfx.ir.recurrent import rnn_layer
from perexfx.ir.rule import Arguments, Backward, Geometry, Rule, Target, sum_positions
from perexfx.kernels.gemm import linear, linear_by


@dataclass(frozen=True)
class GateGradients:
    """What the steps back through time find.

    Attributes:
        of_input: Gradient of what the input adds to each gate. Shape `[T, B, gates]`.
        of_hidden: Gradient of what the hidden state adds to each gate: the same tensor, but for a GRU.
        previous: The hidden state before each time. Shape `[T, B, P]`.
        states: Gradients of the initial states, by name.
        factors: Of parameters that belong to no gate.
        sums: `of_input` summed over all times, where that is at hand. Shape `[B, gates]`.
    """

    of_input: Tensor
    of_hidden: Tensor
    previous: Tensor
    states: Mapping[str, Tensor]
    factors: Mapping[str, Factors] = field(default_factory=dict)
    sums: Tensor | None = None


_SIDES = ("weight_ih", "weight_hh")
_signature = cache(signature)


class Recurrent(Rule):
    """`gates = x W_ih^T + b_ih, h W_hh^T + b_hh`: `n t i, n t o -> n o i` with the gates' gradients on the right."""

    operands = ("weight_hh", "weight_ih", "bias_hh", "bias_ih")
    shares_gates: bool = True
    """Whether what the input and what the hidden state add to a gate have the same gradient."""
    inputs = ("input", "h0")

    def bind(self, target: Target, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """By the signature of the fused layer, which is the one target."""
        assert callable(target)
        bound = _signature(target).bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    @abstractmethod
    def steps_back(self, call: Backward) -> GateGradients:
        """From the gradients of the results to those of the gates."""

    def misfits(self, arguments: Arguments, geometry: Geometry) -> str | None:
        """Inputs that have their examples elsewhere."""
        if geometry.layouts["input"].axis != 1:
            return "its input must be [time, examples, features]"
        return None

    def signatures(self, arguments: Arguments, geometry: Geometry) -> dict[str, Signature]:
        """Products over time; the biases' gradients at hand."""
        t = geometry.shapes["input"][0] * geometry.layouts["input"].repeats
        shapes = {name: geometry.shapes[name] for name in self.operands if name in geometry.shapes}
        return {
            name: ProductSignature(
                geometry.n, 1, t, shape[1], shape[0], shape, 2 if self.shares_gates and name in _SIDES else 1
            )
            if len(shape) == 2
            else GradientSignature(geometry.n, shape)
            for name, shape in shapes.items()
        }

    def forward(self, arguments: Arguments, geometry: Geometry) -> tuple[Any, tuple[Tensor, ...]]:
        """The fused layer. Hidden states are kept as copies: later layers may overwrite the results."""
        (layer,) = self.targets
        assert callable(layer)
        results = layer(**arguments)
        return results, (with_first(results[0], arguments["h0"], arguments["reverse"]),)

    def reads(self, arguments: Arguments, inputs: Collection[str], operands: Collection[str]) -> Collection[str]:
        """All that the gates are made of; `h0` is among the hidden states kept."""
        return arguments.keys() - {"h0"}

    def backward(self, call: Backward) -> tuple[dict[str, Tensor], dict[str, Factors]]:
        """Steps back through time, then everything as of two linear layers."""
        found = self.steps_back(call)
        gradients = {name: found.states[name] for name in call.inputs if name in found.states}
        if "input" in call.inputs:
            gradients["input"] = all_times(found.of_input, call.arguments["weight_ih"].t().contiguous(), None)
        layout, shapes = call.geometry.layouts["input"], call.geometry.shapes
        factors = {name: found.factors[name] for name in call.operands if name in found.factors}
        gram = SharedGram(2) if self.shares_gates else None
        of_bias = None if found.sums is None else _of_bias(layout, found.sums.unsqueeze(0))
        sides = (("ih", found.of_input, call.arguments.get("input")), ("hh", found.of_hidden, found.previous))
        for side, right, left in sides:
            weight, bias = f"weight_{side}", f"bias_{side}"
            if weight in call.operands:
                assert left is not None
                factors[weight] = Product(
                    by_example(layout, left), by_example(layout, right), shapes[weight], right_gram=gram
                )
            if bias in call.operands:
                if of_bias is None or not self.shares_gates:
                    of_bias = _of_bias(layout, right)
                factors[bias] = Gradient(of_bias)
        return gradients, factors


def _of_bias(layout: Layout, gates: Tensor) -> Tensor:
    """`[T, B, gates]` summed over all that belongs to an example. Shape `[n, gates]`."""
    return sum_positions(by_example(layout, gates).squeeze(1))


def by_example(layout: Layout, value: Tensor) -> Tensor:
    """`[T, B, features]` as `[n, 1, t, features]`, where t runs over all that belongs to an example."""
    first = layout.examples_first(value)
    return first.reshape(first.shape[0], 1, first.shape[1] * first.shape[2], first.shape[3])


def with_first(states: Tensor, first: Tensor | None, reverse: bool) -> Tensor:
    """The states after every time, and the initial one before or, in reverse, behind them: `[T + 1, B, features]`.

    Args:
        states: The state after each time.
        first: The initial state; None: zeros.
        reverse: Whether the layer runs from the last time to the first.
    """
    start = torch.zeros_like(states[:1]) if first is None else first.unsqueeze(0)
    return torch.cat([states, start] if reverse else [start, states])


def before(states: Tensor, reverse: bool) -> Tensor:
    """Of what `with_first` returns, the state before each time. Shape `[T, B, features]`."""
    return states[1:] if reverse else states[:-1]


def after(states: Tensor, reverse: bool) -> Tensor:
    """The state after each time."""
    return before(states, not reverse)


def forwards(value: Tensor, reverse: bool) -> Sequence[Tensor]:
    """A view of each time, in the order in which the layer runs."""
    views = value.unbind(0)
    return views[::-1] if reverse else views


def backwards(value: Tensor, reverse: bool) -> Sequence[Tensor]:
    """A view of each time, in the order of the backward."""
    return forwards(value, not reverse)


def arriving(call: Backward) -> tuple[Tensor, list[Tensor]]:
    """The gradients of the hidden states, before what comes back through time is added to them.

    Returns: All of them, `[T, B, P]`, and a view of each in the order of the backward, with the initial state last.
    """
    grads = call.grad_outputs[0].clone(memory_format=torch.contiguous_format)
    rows = [*backwards(grads, call.arguments["reverse"]), torch.zeros_like(call.grad_outputs[1])]
    rows[0].add_(call.grad_outputs[1])
    return grads, rows


def times_back(
    rows: Sequence[Tensor], values: Sequence[Tensor], reverse: bool
) -> Iterator[tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]]:
    """Each time in the order of the backward: two neighbours of `rows`, as of `arriving`, and a view of each value."""
    views = zip(*(backwards(value, reverse) for value in values), strict=True)
    return zip(pairwise(rows), views, strict=True)


def tanh_(value: Tensor) -> Tensor:
    """`tanh` in place, as `2 sigmoid(2 x) - 1`: to a rounding of 1 the same, and on a CPU several times as fast."""
    return value.mul_(2).sigmoid_().mul_(2).sub_(1)


def all_times(value: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`value W^T + b` at all times, by one product. Shape `[T, B, o]`."""
    rows = value.reshape(value.shape[0] * value.shape[1], value.shape[2])
    return linear(rows, weight, bias).view(*value.shape[:2], weight.shape[0])


@dataclass(frozen=True)
class RNN(Recurrent):
    """`h = act(x W_ih^T + b_ih + h' W_hh^T + b_hh)`: the slope of the activation is known from its value."""

    kind = "rnn"
    targets = (rnn_layer,)

    def reads(self, arguments: Arguments, inputs: Collection[str], operands: Collection[str]) -> Collection[str]:
        """`weight_hh` for the steps; each side of the input for the gradient of the other."""
        sides = (("input", "weight_ih" in operands), ("weight_ih", "input" in inputs))
        return ["weight_hh", *(name for name, is_read in sides if is_read)]

    def steps_back(self, call: Backward) -> GateGradients:
        """`g = slope * (gradient of h)`, and `g W_hh` goes to the time before."""
        states, reverse = call.residuals[0], call.arguments["reverse"]
        output = after(states, reverse)
        if call.arguments["nonlinearity"] == "tanh":
            gates = output.square().neg_().add_(1)
        else:
            gates = (output > 0).to(output.dtype)
        _, rows = arriving(call)
        through_time = linear_by(call.arguments["weight_hh"].t().contiguous(), gates)
        for (grad, earlier), (gate,) in times_back(rows, (gates,), reverse):
            earlier.add_(through_time(gate.mul_(grad)))
        return GateGradients(gates, gates, before(states, reverse), {"h0": rows[-1]})
