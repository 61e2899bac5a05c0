"""Recurrent layers as graph nodes: one layer, one direction, one call of torch's fused operation.

Promises: the result is that of torch's own operation, with or without autograd. In a run with fake tensors a layer
shows as one operation (`perexfx::recurrent_layer`), however long the sequence is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_FUSED = {"lstm": torch.lstm, "gru": torch.gru, "tanh": torch.rnn_tanh, "relu": torch.rnn_relu}


def lstm_layer(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[T, B, P]`, last hidden state `[B, P]` and last cell state `[B, H]`; P is H without a projection.

    Args:
        input: Shape `[T, B, I]`.
        h0: Shape `[B, P]`; None: zeros.
        c0: Shape `[B, H]`; None: zeros.
        weight_ih: Shape `[4 H, I]`; gates in torch's order: input, forget, cell, output.
        weight_hh: Shape `[4 H, P]`.
        bias_ih: Shape `[4 H]`, or None.
        bias_hh: Shape `[4 H]`, or None with the other.
        weight_hr: The projection of the hidden state, shape `[P, H]`, or None.
        reverse: From the last time to the first.
    """
    states = [_state(h0, input, weight_hh.shape[1]), _state(c0, input, weight_hh.shape[0] // 4)]
    parameters = (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
    output, h_n, c_n = _layer("lstm", input, states, parameters, reverse)
    return output, h_n, c_n


def gru_layer(
    input: Tensor,
    h0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output `[T, B, H]` and last hidden state `[B, H]`.

    Args:
        input: Shape `[T, B, I]`.
        h0: Shape `[B, H]`; None: zeros.
        weight_ih: Shape `[3 H, I]`; gates in torch's order: reset, update, new.
        weight_hh: Shape `[3 H, H]`.
        bias_ih: Shape `[3 H]`, or None.
        bias_hh: Shape `[3 H]`, or None with the other.
        reverse: From the last time to the first.
    """
    states = [_state(h0, input, weight_hh.shape[1])]
    output, h_n = _layer("gru", input, states, (weight_ih, weight_hh, bias_ih, bias_hh), reverse)
    return output, h_n


def rnn_layer(
    input: Tensor,
    h0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    reverse: bool = False,
    nonlinearity: str = "tanh",
) -> tuple[Tensor, Tensor]:
    """Output `[T, B, H]` and last hidden state `[B, H]`.

    Args:
        input: Shape `[T, B, I]`.
        h0: Shape `[B, H]`; None: zeros.
        weight_ih: Shape `[H, I]`.
        weight_hh: Shape `[H, H]`.
        bias_ih: Shape `[H]`, or None.
        bias_hh: Shape `[H]`, or None with the other.
        reverse: From the last time to the first.
        nonlinearity: "tanh" or "relu".
    """
    states = [_state(h0, input, weight_hh.shape[1])]
    output, h_n = _layer(nonlinearity, input, states, (weight_ih, weight_hh, bias_ih, bias_hh), reverse)
    return output, h_n


def _state(given: Tensor | None, input: Tensor, size: int) -> Tensor:
    return input.new_zeros(input.shape[1], size) if given is None else given


def _layer(
    kind: str, input: Tensor, states: list[Tensor], parameters: Sequence[Tensor | None], reverse: bool
) -> Sequence[Tensor]:
    """Output and last states. For shapes alone by our own operation: torch's show as several calls per time step."""
    given = [parameter for parameter in parameters if parameter is not None]
    has_biases = parameters[2] is not None
    if isinstance(input, FakeTensor) and not torch.is_grad_enabled():
        return _operation(input, states, given, kind, has_biases, reverse)
    return _fused(input, states, given, kind, has_biases, reverse)


def _fused(
    input: Tensor, states: list[Tensor], parameters: list[Tensor], kind: str, has_biases: bool, reverse: bool
) -> list[Tensor]:
    hx = [state.unsqueeze(0) for state in states]
    trains = torch.is_grad_enabled()  # some kernels have no backward otherwise; there is no dropout
    output, *last = _FUSED[kind](
        input.flip(0) if reverse else input,
        hx if kind == "lstm" else hx[0],
        parameters,
        has_biases,
        1,
        0.0,
        trains,
        False,
        False,
    )
    return [output.flip(0) if reverse else output, *(state.squeeze(0) for state in last)]


_operation = torch.library.custom_op(
    "perexfx::recurrent_layer",
    _fused,
    mutates_args=(),
    schema="(Tensor input, Tensor[] states, Tensor[] parameters, str kind, bool has_biases, bool reverse) -> Tensor[]",
)


@_operation.register_fake
def _(input: Tensor, states: list[Tensor], parameters: list[Tensor], *_: object) -> list[Tensor]:
    output = input.new_empty(*input.shape[:2], parameters[1].shape[1])
    return [output, *(torch.empty_like(state) for state in states)]
