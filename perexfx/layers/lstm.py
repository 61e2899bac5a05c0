"""`lstm`, with or without a projection of its hidden state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perexfx.ir.factors import Factors, Product
from perexfx.ir.recurrent import lstm_layer
from perexfx.ir.rule import Arguments, Backward, Geometry
from perexfx.kernels import lstm_steps_back
from perexfx.kernels.gemm import linear_by
from perexfx.kernels.lstm_workspace import are_equal, gates_in, has_gates, lstm_with_workspace
from perexfx.layers.recurrent import (
    GateGradients,
    Recurrent,
    after,
    all_times,
    arriving,
    before,
    by_example,
    forwards,
    tanh_,
    times_back,
    with_first,
)

COMPARED = 16
"""Of the gates that were kept, those of every so-manieth example are computed again, at the last time."""

_sigmoid_backward = torch.ops.aten.sigmoid_backward
_tanh_backward = torch.ops.aten.tanh_backward


@dataclass(frozen=True)
class LSTM(Recurrent):
    """`c = f c' + i g` and `h = o tanh(c)`, or `h = (o tanh(c)) W_hr^T` with a projection."""

    kind = "lstm"
    targets = (lstm_layer,)
    operands = (*Recurrent.operands, "weight_hr")
    inputs = (*Recurrent.inputs, "c0")

    def forward(self, arguments: Arguments, geometry: Geometry) -> tuple[Any, tuple[Tensor, ...]]:
        """The fused layer, and its workspace where the backward can read the gates from it."""
        x, weight = arguments["input"], arguments["weight_hh"]
        is_plain = arguments["bias_ih"] is not None and arguments["weight_hr"] is None
        if not is_plain or not has_gates(x, weight):
            return super().forward(arguments, geometry)
        reverse = arguments["reverse"]
        zeros = x.new_zeros(x.shape[1], weight.shape[1])
        states = [zeros if arguments[name] is None else arguments[name] for name in ("h0", "c0")]
        parameters = [arguments[name] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        output, h_n, c_n, workspace = lstm_with_workspace(x.flip(0) if reverse else x, *states, *parameters)
        output = output.flip(0) if reverse else output
        return (output, h_n, c_n), (with_first(output, arguments["h0"], reverse), workspace)

    def steps_back(self, call: Backward) -> GateGradients:
        """The slopes of `o` times the gradient of `o tanh(c)`; the slopes of the others times that of `c`."""
        given, reverse = call.arguments, call.arguments["reverse"]
        previous = before(call.residuals[0], reverse)
        kept = _kept_gates(call)
        gates = _computed_gates(given, given["input"], previous) if kept is None else kept
        if found := _by_kernel(call, gates):
            grad_gates, sums, grad_hidden, grad_cell = found
            return GateGradients(grad_gates, grad_gates, previous, {"h0": grad_hidden, "c0": grad_cell}, sums=sums)
        slopes = _slopes(given, gates)
        grads, rows = arriving(call)
        grad_cell = call.grad_outputs[2].clone()
        split = slopes.gates.unflatten(2, (4, -1))
        views = (split[:, :, :3], split[:, :, 3], slopes.gates, slopes.forget, slopes.cell)
        through_time, projection = linear_by(given["weight_hh"].t().contiguous(), slopes.gates), given["weight_hr"]
        for (grad, earlier), (by_cell, by_output, gates, forget, cell) in times_back(rows, views, reverse):
            grad_raw = grad if projection is None else grad @ projection
            grad_cell.addcmul_(grad_raw, cell)
            by_cell.mul_(grad_cell.unsqueeze(1))
            by_output.mul_(grad_raw)
            grad_cell.mul_(forget)
            earlier.add_(through_time(gates))
        factors: dict[str, Factors] = {}
        if "weight_hr" in call.operands:
            layout = call.geometry.layouts["input"]
            left, right = by_example(layout, slopes.raw), by_example(layout, grads)
            factors["weight_hr"] = Product(left, right, call.geometry.shapes["weight_hr"])
        return GateGradients(slopes.gates, slopes.gates, previous, {"h0": rows[-1], "c0": grad_cell}, factors)


def _by_kernel(call: Backward, gates: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Gradients of the gates, their sums, and those of both initial states; None where there is no kernel for them."""
    given = call.arguments
    if given["weight_hr"] is not None:
        return None
    output, h_n, c_n = call.grad_outputs
    reverse = given["reverse"]
    states = after(call.residuals[0], reverse)
    return lstm_steps_back(gates, states, given["c0"], output, h_n, c_n, given["weight_hh"], reverse)


@dataclass(frozen=True)
class _Slopes:
    """What gradients are multiplied with, at every time.

    Attributes:
        gates: Of every gate, by the cell state it leads to; of the output gate, by the hidden state. `[T, B, 4 H]`.
        forget: Of the cell state before, by the cell state: the gate itself. `[T, B, H]`.
        cell: Of the cell state, by the hidden state. `[T, B, H]`.
        raw: The hidden state itself, before a projection. `[T, B, H]`; empty where there is none.
    """

    gates: Tensor
    forget: Tensor
    cell: Tensor
    raw: Tensor


def _kept_gates(call: Backward) -> Tensor | None:
    """The gates of all times from the workspace; None where it has none, or the last ones are not right."""
    given = call.arguments
    if len(call.residuals) < 2:
        return None
    gates = gates_in(call.residuals[1], given["input"], given["weight_hh"].shape[1])
    if gates is None or call.residuals[1].numel() == 0:
        return gates
    at = 0 if given["reverse"] else -1
    previous = before(call.residuals[0], given["reverse"])
    last = (value[at, : gates.shape[1] : COMPARED].unsqueeze(0) for value in (given["input"], previous))
    if not are_equal(gates[-1, ::COMPARED], _computed_gates(given, *last)[0]):
        return None
    return gates.flip(0) if given["reverse"] else gates


def _computed_gates(given: Arguments, inputs: Tensor, previous: Tensor) -> Tensor:
    """The gates of some times at once. All are sigmoids: `tanh(g) = 2 sigmoid(2 g) - 1`."""
    bias = given["bias_ih"]
    gates = all_times(inputs, given["weight_ih"], None if bias is None else bias + given["bias_hh"])
    gates.add_(all_times(previous, given["weight_hh"], None))
    g = gates.unflatten(2, (4, -1))[:, :, 2]
    g.mul_(2)
    gates.sigmoid_()
    g.mul_(2).sub_(1)
    return gates


def _slopes(given: Arguments, gates: Tensor) -> _Slopes:
    """From the gates after their activations, `[T, B, 4 H]`, which are only read."""
    reverse, slopes = given["reverse"], torch.empty_like(gates, memory_format=torch.contiguous_format)
    i, f, g, o = gates.unflatten(2, (4, -1)).unbind(2)
    by_i, by_f, by_g, by_o = slopes.unflatten(2, (4, -1)).unbind(2)
    cells = i * g
    state = torch.zeros_like(cells[0]) if given["c0"] is None else given["c0"]
    for cell, kept in zip(forwards(cells, reverse), forwards(f, reverse), strict=True):
        state = cell.addcmul_(kept, state)
    cells_before = before(with_first(cells, given["c0"], reverse), reverse)
    tanh_(cells)
    _sigmoid_backward.grad_input(g, i, grad_input=by_i)
    _sigmoid_backward.grad_input(cells_before, f, grad_input=by_f)
    _tanh_backward.grad_input(i, g, grad_input=by_g)
    _sigmoid_backward.grad_input(cells, o, grad_input=by_o)
    raw = cells[:0] if given["weight_hr"] is None else o * cells
    return _Slopes(slopes, f, _tanh_backward(o, cells), raw)
