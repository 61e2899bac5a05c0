"""Recurrence without control flow on values: the forwards of nn.RNN, nn.LSTM, nn.GRU and of their cells.

Promises: a recurrent layer becomes one call of torch's function for it, with its parameters in torch's order; a cell
becomes linear layers and elementwise operations. Inputs are batched; packed sequences are an error.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import rnn

from perexfx.capture.traceable.node import Forward

PACKED = (
    "packed sequences spread the examples over rows by their lengths, so that no axis holds them. Pass the padded "
    "tensor to the recurrent layer, and leave padded positions out of the loss"
)


def packs_sequences(trace: TracebackType | None) -> bool:
    """Whether an error comes out of a function for packed sequences, torch's or the one here."""
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_filename in (rnn.__file__, __file__) and "pack" in code.co_name:
            return True
        trace = trace.tb_next
    return False


def _refuse_packed(input: Any) -> None:
    if isinstance(input, rnn.PackedSequence):
        raise TypeError("a packed sequence")


def lstm(module: nn.LSTM) -> Forward:
    """`nn.LSTM.forward` for batched inputs."""

    def forward(input: Any, hx: Any = None) -> tuple[Any, tuple[Any, Any]]:
        _refuse_packed(input)
        hidden = module.proj_size or module.hidden_size
        state = [hx[0], hx[1]] if hx is not None else [_zeros(module, input, n) for n in (hidden, module.hidden_size)]
        result = torch.lstm(*_arguments(module, input, state))
        return result[0], (result[1], result[2])

    return forward


def gru(module: nn.GRU) -> Forward:
    """`nn.GRU.forward` for batched inputs."""
    return _one_state(module, torch.gru)


def rnn_layer(module: nn.RNN) -> Forward:
    """`nn.RNN.forward` for batched inputs."""
    return _one_state(module, torch.rnn_relu if module.mode == "RNN_RELU" else torch.rnn_tanh)


def _one_state(module: nn.RNNBase, function: Callable[..., Any]) -> Forward:
    def forward(input: Any, hx: Any = None) -> tuple[Any, Any]:
        _refuse_packed(input)
        state = _zeros(module, input, module.hidden_size) if hx is None else hx
        result = function(*_arguments(module, input, state))
        return result[0], result[1]

    return forward


def _arguments(module: nn.RNNBase, input: Any, state: Any) -> tuple[Any, ...]:
    """Of torch.lstm and its like."""
    return (
        input,
        state,
        [getattr(module, name) for name in module._flat_weights_names],
        module.bias,
        module.num_layers,
        module.dropout,
        module.training,
        module.bidirectional,
        module.batch_first,
    )


def _zeros(module: nn.RNNBase, input: Any, size: int) -> Any:
    """The state before the first step, where none is given."""
    layers = module.num_layers * (2 if module.bidirectional else 1)
    return input.new_zeros((layers, input.shape[0 if module.batch_first else 1], size))


def lstm_cell(module: nn.LSTMCell) -> Forward:
    """`nn.LSTMCell.forward` for batched inputs."""

    def forward(input: Any, hx: Any = None) -> tuple[Any, Any]:
        hidden, cell = (_cell_zeros(module, input),) * 2 if hx is None else (hx[0], hx[1])
        given, recurrent = _gates(module, input, hidden)
        i, f, g, o = (given + recurrent).chunk(4, dim=1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        return o.sigmoid() * cell.tanh(), cell

    return forward


def gru_cell(module: nn.GRUCell) -> Forward:
    """`nn.GRUCell.forward` for batched inputs."""

    def forward(input: Any, hx: Any = None) -> Any:
        hidden = _cell_zeros(module, input) if hx is None else hx
        given, recurrent = _gates(module, input, hidden)
        r, z, n = given.chunk(3, dim=1)
        hidden_r, hidden_z, hidden_n = recurrent.chunk(3, dim=1)
        n = (n + (r + hidden_r).sigmoid() * hidden_n).tanh()
        return (hidden - n) * (z + hidden_z).sigmoid() + n

    return forward


def rnn_cell(module: nn.RNNCell) -> Forward:
    """`nn.RNNCell.forward` for batched inputs."""

    def forward(input: Any, hx: Any = None) -> Any:
        hidden = _cell_zeros(module, input) if hx is None else hx
        given, recurrent = _gates(module, input, hidden)
        return getattr(given + recurrent, module.nonlinearity)()

    return forward


def _gates(module: nn.RNNCellBase, input: Any, hidden: Any) -> tuple[Any, Any]:
    """What the input and the state contribute to the gates."""
    given = F.linear(input, module.weight_ih, module.bias_ih)
    return given, F.linear(hidden, module.weight_hh, module.bias_hh)


def _cell_zeros(module: nn.RNNCellBase, input: Any) -> Any:
    return input.new_zeros((input.shape[-2], module.hidden_size))  # fails for a single example without an axis
