"""`lstm`, with or without a projection of its hidden state."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from perexfx.ir.factors import Factors, Product
from perexfx.ir.gemm import linear
from perexfx.ir.recurrent import lstm_layer
from perexfx.ir.rule import Arguments, Backward
from perexfx.layers.recurrent import (
    GateGradients,
    Recurrent,
    all_times,
    arriving,
    backwards,
    by_example,
    forwards,
    shifted,
    tanh_,
)

_sigmoid_backward = torch.ops.aten.sigmoid_backward
_tanh_backward = torch.ops.aten.tanh_backward


@dataclass(frozen=True)
class LSTM(Recurrent):
    """`c = f c' + i g` and `h = o tanh(c)`, or `h = (o tanh(c)) W_hr^T` with a projection."""

    kind = "lstm"
    targets = (lstm_layer,)
    operands = (*Recurrent.operands, "weight_hr")
    inputs = (*Recurrent.inputs, "c0")

    @staticmethod
    def named(
        input: Any,
        h0: Any,
        c0: Any,
        weight_ih: Any,
        weight_hh: Any,
        bias_ih: Any = None,
        bias_hh: Any = None,
        weight_hr: Any = None,
        reverse: Any = False,
    ) -> dict[str, Any]:
        """As `lstm_layer`."""
        return dict(locals())

    def run(self, arguments: Arguments) -> tuple[Tensor, ...]:
        """The fused layer."""
        return lstm_layer(**arguments)

    def steps_back(self, call: Backward) -> GateGradients:
        """The slopes of `o` times the gradient of `o tanh(c)`; the slopes of the others times that of `c`."""
        given, reverse = call.arguments, call.arguments["reverse"]
        previous = call.residuals[0]
        slopes = _slopes(given, previous)
        grads, rows = arriving(call)
        grad_cell = call.grad_outputs[2].clone()
        split = slopes.gates.unflatten(2, (4, -1))
        views = (split[:, :, :3], split[:, :, 3], slopes.gates, slopes.forget, slopes.cell)
        steps = zip(*(backwards(value, reverse) for value in views), strict=True)
        weight, projection = given["weight_hh"].t().contiguous(), given["weight_hr"]
        for (grad, before), (by_cell, by_output, gates, forget, cell) in zip(pairwise(rows), steps, strict=True):
            grad_raw = grad if projection is None else grad @ projection
            grad_cell.addcmul_(grad_raw, cell)
            by_cell.mul_(grad_cell.unsqueeze(1))
            by_output.mul_(grad_raw)
            grad_cell.mul_(forget)
            before.add_(linear(gates, weight))
        factors: dict[str, Factors] = {}
        if "weight_hr" in call.operands:
            layout = call.geometry.layouts["input"]
            left, right = by_example(layout, slopes.raw), by_example(layout, grads)
            factors["weight_hr"] = Product(left, right, call.geometry.shapes["weight_hr"])
        return GateGradients(slopes.gates, slopes.gates, previous, {"h0": rows[-1], "c0": grad_cell}, factors)


@dataclass(frozen=True)
class _Slopes:
    """What gradients are multiplied with, at every time.

    Attributes:
        gates: Of every gate, by the cell state it leads to; of the output gate, by the hidden state. `[T, B, 4 H]`.
        forget: Of the cell state before, by the cell state. `[T, B, H]`.
        cell: Of the cell state, by the hidden state. `[T, B, H]`.
        raw: The hidden state itself, before a projection. `[T, B, H]`; empty where there is none.
    """

    gates: Tensor
    forget: Tensor
    cell: Tensor
    raw: Tensor


def _slopes(given: Arguments, previous: Tensor) -> _Slopes:
    """The gates of all times at once, overwritten by their slopes. All are sigmoids: `tanh(g) = 2 sigmoid(2 g) - 1`."""
    reverse, bias = given["reverse"], given["bias_ih"]
    gates = all_times(given["input"], given["weight_ih"], None if bias is None else bias + given["bias_hh"])
    gates.add_(all_times(previous, given["weight_hh"], None))
    i, f, g, o = gates.unflatten(2, (4, -1)).unbind(2)
    g.mul_(2)
    gates.sigmoid_()
    g.mul_(2).sub_(1)
    cells = i * g
    state = torch.zeros_like(cells[0]) if given["c0"] is None else given["c0"]
    for cell, kept in zip(forwards(cells, reverse), forwards(f, reverse), strict=True):
        state = cell.addcmul_(kept, state)
    forget, cells_before = f.clone(), shifted(cells, given["c0"], reverse)
    tanh_(cells)
    slope_i = _sigmoid_backward(g, i)
    _sigmoid_backward.grad_input(cells_before, f, grad_input=f)
    _tanh_backward.grad_input(i, g, grad_input=g)
    i.copy_(slope_i)
    slope_cell = _tanh_backward(o, cells)
    raw = cells[:0] if given["weight_hr"] is None else o * cells
    _sigmoid_backward.grad_input(cells, o, grad_input=o)
    return _Slopes(gates, forget, slope_cell, raw)
