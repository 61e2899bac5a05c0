"""Kernels in C++, for what takes torch many small operations or twice the work.

Promises: a kernel finds what the Python code in its place finds, up to rounding. Nothing is compiled unless someone
asks (`using_kernels`, which steps of `perexfx.compile_step` enter), and then by the compiler and with the flags that
`torch.compile` takes. Where that fails, the log says why, and the Python code runs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from ctypes import CDLL, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from perexfx.ir.tracing import is_watched

_logger = logging.getLogger("perexfx")
_used: ContextVar[set[str] | None] = ContextVar("the kernels that ran", default=None)

LANES = 16
"""Hidden sizes must be a multiple: as many float32 as the widest registers hold."""

IN_CACHE = 1 << 18
"""Elements of one example's rows, at most, that a Gram matrix is made of: 1 MB."""


@contextmanager
def using_kernels() -> Iterator[set[str]]:
    """Kernels run inside; the first time they are compiled, for some seconds. Yields: the names of those that ran."""
    ran: set[str] = set()
    token = _used.set(ran)
    try:
        yield ran
    finally:
        _used.reset(token)


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
    gradients of both initial states, `[B, H]` each.

    None where there is no kernel: not asked for, not compiled, or not for these tensors.

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
    if hidden % LANES or not is_one_stride:
        return None
    first_cell = gates.new_zeros(examples, hidden) if c0 is None else c0
    read = (output, first_cell, grad_output, weight_hh)
    if (library := _library_for("lstm", gates, *read, grad_h_n, grad_c_n)) is None:
        return None
    grad_gates, sums = gates.new_empty(steps, examples, 4 * hidden), gates.new_zeros(examples, 4 * hidden)
    grad_hidden, grad_cell = (value.clone(memory_format=torch.contiguous_format) for value in (grad_h_n, grad_c_n))
    memories = [*(value.contiguous() for value in read), grad_gates, sums, grad_hidden, grad_cell]
    sizes = (steps, examples, hidden, reverse, torch.get_num_threads())
    library.lstm_steps_back(gates.data_ptr(), gates.stride(1), *(memory.data_ptr() for memory in memories), *sizes)
    return grad_gates, sums, grad_hidden, grad_cell


def gram(rows: Tensor) -> Tensor | None:
    """`rows[n] @ rows[n].t()` for every n: shape `[n, t, t]`; None where there is no kernel.

    Args:
        rows: Shape `[n, t, i]`.
    """
    n, t, size = rows.shape
    if rows.stride(2) != 1 or t * size > IN_CACHE or (library := _library_for("gram", rows)) is None:
        return None
    found = rows.new_empty(n, t, t)
    threads = torch.get_num_threads()
    library.gram(rows.data_ptr(), rows.stride(0), rows.stride(1), found.data_ptr(), n, t, size, threads)
    return found


def _library_for(name: str, *tensors: Tensor) -> CDLL | None:
    """The kernels of one file; None where they are not asked for, or not for these tensors."""
    used = _used.get()
    if used is None or is_watched():
        return None
    if any(
        type(v) is not Tensor or v.dtype != torch.float32 or v.device.type != "cpu" or not v.numel() for v in tensors
    ):
        return None
    library = _library(name)
    if library is not None:
        used.add(name)
    return library


_POINTER, _SIZE, _INT = c_void_p, c_int64, c_int
_SIGNATURES = {
    "lstm": {
        "lstm_steps_back": (_POINTER, _SIZE, *[_POINTER] * 8, *[_SIZE] * 3, _INT, _INT),
    },
    "gram": {"gram": (_POINTER, _SIZE, _SIZE, _POINTER, *[_SIZE] * 3, _INT)},
}
"""File -> its functions -> their arguments."""


@cache
def _library(name: str) -> CDLL | None:
    """One file, compiled; None where that fails."""
    try:
        from torch._inductor.codecache import CppCodeCache  # noqa: PLC0415 (imports a compiler's worth of modules)

        source = "".join((Path(__file__).parent / file).read_text() for file in ("products.h", f"{name}.cpp"))
        library = CppCodeCache.load(source, extra_flags=("-ffp-contract=fast",))
        for function, arguments in _SIGNATURES[name].items():
            getattr(library, function).argtypes = arguments
            getattr(library, function).restype = None
    except Exception as error:  # a compiler may fail in any way
        _logger.warning("The kernels of `%s.cpp` cannot be compiled, and are not used: %s", name, error)
        return None
    return library


__all__ = ["gram", "lstm_steps_back", "using_kernels"]
