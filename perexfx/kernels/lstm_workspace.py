"""The gates of torch's fused LSTM on a CPU, from the workspace that oneDNN keeps for its own backward.

Promises: a size where the gates are not found has none. How they lie is not documented, so it is found out by a trial
on random numbers of few time steps, against gates that are computed; who reads them should compare those of the last
time step. Reading them spares the two products that compute them again.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import _disable_current_modes

from perexfx.kernels.watched import is_watched

_LSTM = 2
"""torch's number for the kind of cell."""
TRIED = 4
"""Time steps of a trial."""
PADDING = 64
"""Elements, at most, that a row of gates is padded by."""


def lstm_with_workspace(
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, last hidden state, last cell state, and the workspace. Arguments as of `lstm_layer`."""
    # the operation takes every memory for contiguous, and has no workspace without autograd
    given = [value.detach().contiguous() for value in (input, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0)]
    with torch.enable_grad():
        return torch.ops.aten.mkldnn_rnn_layer.default(
            *given, False, [], _LSTM, h0.shape[1], 1, True, False, False, True
        )


def has_gates(input: Tensor, weight_hh: Tensor) -> bool:
    """Whether the gates of a layer can be read from its workspace.

    Args:
        input: Shape `[T, B, I]`.
        weight_hh: Shape `[4 H, H]`.
    """
    if input.device.type != "cpu" or not input.dtype == weight_hh.dtype == torch.float32 or input.numel() == 0:
        return False
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    return _stride_for(input, weight_hh.shape[1]) is not None


def gates_in(workspace: Tensor, input: Tensor, hidden: int) -> Tensor | None:
    """A view of the gates after their activations, `[T, B, 4 H]`; None while a graph is traced.

    Args:
        workspace: Of a layer that `has_gates`.
        input: Of that layer, shape `[T, B, I]`.
        hidden: H.
    """
    if is_watched():
        if not isinstance(workspace, FakeTensor) or get_proxy_mode() is not None:
            return None
        shape = (*input.shape[:2], 4 * hidden)  # nothing is computed: shapes and memory alone are asked for
        return workspace.new_empty(1, dtype=torch.float32).expand(shape)
    stride = _stride_for(input, hidden)
    return None if stride is None else _view(workspace, input.shape[0], input.shape[1], hidden, stride)


def are_equal(found: Tensor, expected: Tensor) -> bool:
    """Whether two ways to compute gates have found the same, up to rounding."""
    return bool((found - expected).abs_().amax() <= 1e-3)


def _view(workspace: Tensor, steps: int, examples: int, hidden: int, stride: int) -> Tensor | None:
    numbers = workspace.view(-1)[: workspace.numel() // 4 * 4].view(torch.float32)
    if numbers.numel() < steps * examples * stride:
        return None
    return numbers.as_strided((steps, examples, 4 * hidden), (examples * stride, stride, 1))


def _stride_for(input: Tensor, hidden: int) -> int | None:
    steps, examples, features = input.shape
    return _row_stride(min(steps, TRIED), examples, features, hidden, torch.get_num_threads())


@cache
def _row_stride(steps: int, examples: int, features: int, hidden: int, _threads: int) -> int | None:
    """From one row of gates to the next in a workspace; None where the gates are not found."""
    with _disable_current_modes(), torch.no_grad(), torch.device("cpu"):
        random = torch.Generator().manual_seed(0)
        shapes = ((steps, examples, features), (4 * hidden, features), (4 * hidden, hidden))
        x, weight_ih, weight_hh = (torch.rand(s, generator=random, dtype=torch.float32) - 0.5 for s in shapes)
        bias, state = x.new_zeros(4 * hidden), x.new_zeros(examples, hidden)
        output, _, _, workspace = lstm_with_workspace(x, state, state, weight_ih, weight_hh, bias, bias)
        gates = x @ weight_ih.t() + torch.cat([state[None], output[:-1]]) @ weight_hh.t()
        expected = gates.sigmoid()
        expected[:, :, 2 * hidden : 3 * hidden] = gates[:, :, 2 * hidden : 3 * hidden].tanh()
        for stride in range(4 * hidden, 4 * hidden + PADDING + 1):
            found = _view(workspace, steps, examples, hidden, stride)
            if found is not None and are_equal(found[-1], expected[-1]) and are_equal(found, expected):
                return stride
    return None


__all__ = ["are_equal", "gates_in", "has_gates", "lstm_with_workspace"]
