"""Recurrent layers, time step after time step: torch's fused LSTM, and the operation that perexfx has for all kinds.

Promises: each finds what the fused operation finds, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perexfx.ir.recurrent import lstm_layer

_LSTM = 2
"""torch's number for the kind of cell."""


def fused_lstm(
    input: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    hx: Tensor,
    cx: Tensor,
    reverse: bool,
    batch_sizes: Sequence[int],
    mode: int,
    hidden_size: int,
    num_layers: int,
    has_biases: bool,
    bidirectional: bool,
    batch_first: bool,
    train: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, last states, and an empty workspace."""
    if mode != _LSTM or num_layers != 1 or bidirectional or batch_first:
        return NotImplemented
    weights = [weight_ih, weight_hh, *([bias_ih, bias_hh] if has_biases else [])]
    states = [state.reshape(input.shape[1], -1) for state in (hx, cx)]
    output, hidden, cell = recurrent_layer(input, states, weights, "lstm", has_biases, reverse)
    return output, hidden.reshape(hx.shape), cell.reshape(cx.shape), input.new_empty(0, dtype=torch.uint8)


def lstm_in_torch_or_steps(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, ...]:
    """As `lstm_layer`; with a projection, which torch's exporter forgets, step after step."""
    if weight_hr is None:
        return lstm_layer(input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, reverse=reverse)
    hidden = input.new_zeros(input.shape[1], weight_hr.shape[0]) if h0 is None else h0
    cell = input.new_zeros(input.shape[1], weight_hr.shape[1]) if c0 is None else c0
    weights = [value for value in (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr) if value is not None]
    return tuple(recurrent_layer(input, [hidden, cell], weights, "lstm", bias_ih is not None, reverse))


def recurrent_layer(
    input: Tensor, states: list[Tensor], parameters: list[Tensor], kind: str, has_biases: bool, reverse: bool
) -> list[Tensor]:
    """Output and last states of one layer in one direction. Arguments as of `perexfx::recurrent_layer`."""
    weight_ih, weight_hh, *rest = parameters
    bias_ih, bias_hh = rest[:2] if has_biases else (None, None)
    projection = rest[-1] if len(rest) in (1, 3) else None
    given = F.linear(input, weight_ih, bias_ih)
    outputs: list[Tensor] = []
    for row in reversed(given.unbind(0)) if reverse else given.unbind(0):
        recurrent = F.linear(states[0], weight_hh, bias_hh)
        states = _CELLS[kind](row, recurrent, states)
        if projection is not None:
            states = [F.linear(states[0], projection), *states[1:]]
        outputs.append(states[0])
    return [torch.stack(outputs[::-1] if reverse else outputs), *states]


def _lstm(given: Tensor, recurrent: Tensor, states: list[Tensor]) -> list[Tensor]:
    i, f, g, o = (given + recurrent).chunk(4, -1)
    cell = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
    return [o.sigmoid() * cell.tanh(), cell]


def _gru(given: Tensor, recurrent: Tensor, states: list[Tensor]) -> list[Tensor]:
    x_r, x_z, x_n = given.chunk(3, -1)
    h_r, h_z, h_n = recurrent.chunk(3, -1)
    new = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
    return [(states[0] - new) * (x_z + h_z).sigmoid() + new]


_CELLS: Mapping[str, Callable[[Tensor, Tensor, list[Tensor]], list[Tensor]]] = {
    "lstm": _lstm,
    "gru": _gru,
    "tanh": lambda given, recurrent, _: [(given + recurrent).tanh()],
    "relu": lambda given, recurrent, _: [(given + recurrent).relu()],
}

RECURRENT: Mapping[Any, Callable[..., Any]] = {
    torch.ops.aten.mkldnn_rnn_layer.default: fused_lstm,
    torch.ops.perexfx.recurrent_layer.default: recurrent_layer,  # that `perexfx.ir.recurrent` registers
}


__all__ = ["RECURRENT", "lstm_in_torch_or_steps"]
