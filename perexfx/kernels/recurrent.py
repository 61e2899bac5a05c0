"""The kernel of recurrent layers."""

from __future__ import annotations

import torch
from torch import Tensor

from perexfx.kernels.tensors import are_built, is_for_sizes, library_for

LANES = 16
"""Hidden sizes of an LSTM must be a multiple: as many float32 as the widest registers hold."""


def lstm_steps_back(
    gates: Tensor,
    output: Tensor,
    c0: Tensor | None,
    grad_output: Tensor,
    grad_h_n: Tensor,
    grad_c_n: Tensor,
    weight_hh: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Gradients of the gates before their activations, `[T, B, 4 H]`, their sums over all times, `[B, 4 H]`, and the
    gradients of both initial states, `[B, H]` each; None where there is no kernel for these tensors.

    Args:
        gates: After their activations. Shape `[T, B, 4 H]`, rows contiguous.
        output: The hidden state after each time. Shape `[T, B, H]`.
        c0: The initial cell state, shape `[B, H]`; None: zeros.
        grad_output: Shape `[T, B, H]`.
        grad_h_n: Shape `[B, H]`.
        grad_c_n: Shape `[B, H]`.
        weight_hh: Shape `[4 H, H]`.
        reverse: Whether the layer runs from the last time to the first.
    """
    steps, examples, hidden = grad_output.shape
    is_one_stride = gates.stride(2) == 1 and gates.stride(0) == examples * gates.stride(1)
    if hidden % LANES or gates.dtype != torch.float32:
        return None
    first_cell = gates.new_zeros(examples, hidden) if c0 is None else c0
    read = (output, first_cell, grad_output, weight_hh)
    library = library_for(gates, *read, grad_h_n, grad_c_n) if is_one_stride else None
    if library is None and not (is_for_sizes() and are_built()):
        return None
    grad_gates, sums = gates.new_empty(steps, examples, 4 * hidden), gates.new_zeros(examples, 4 * hidden)
    grad_hidden, grad_cell = (value.clone(memory_format=torch.contiguous_format) for value in (grad_h_n, grad_c_n))
    cells = torch.empty_like(grad_output, memory_format=torch.contiguous_format)
    memories = [*(value.contiguous() for value in read), grad_gates, sums, grad_hidden, grad_cell, cells]
    if library is None:
        return grad_gates, sums, grad_hidden, grad_cell
    sizes = (steps, examples, hidden, reverse, torch.get_num_threads())
    library.lstm_steps_back(gates.data_ptr(), gates.stride(1), *(memory.data_ptr() for memory in memories), *sizes)
    return grad_gates, sums, grad_hidden, grad_cell
