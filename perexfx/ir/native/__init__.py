"""Kernels in C++, for what takes torch many small operations or twice the work.

Promises: a kernel finds what the Python code in its place finds, up to rounding. They are built with the package, where
there is a compiler for them; without them, for tensors that they are not made for, and under whoever traces, that
Python code runs. `PEREXFX_KERNELS=0` leaves them out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from ctypes import CDLL, byref, c_void_p
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from perexfx.ir.geometry import ConvolutionGeometry
from perexfx.ir.native.loading import DTYPES, Slide, Strides, loaded, typed
from perexfx.ir.tracing import is_watched

LANES = 16
"""Hidden sizes of an LSTM must be a multiple: as many float32 as the widest registers hold."""

MOST_AXES = 4
"""Of a convolution's kernel: one or two are spatial."""

_for_sizes: ContextVar[bool] = ContextVar("whether sizes are all that is asked for", default=False)


@contextmanager
def for_sizes() -> Iterator[None]:
    """Fake tensors inside: what kernels allocate is allocated, and nothing is computed."""
    token = _for_sizes.set(True)
    try:
        yield
    finally:
        _for_sizes.reset(token)


def are_built() -> bool:
    """Whether there are kernels, and they are wanted."""
    return loaded() is not None


def are_for(*tensors: Tensor) -> bool:
    """Whether there are kernels for tensors like these: of their dtypes, on their device, with nobody tracing."""
    return _library_for(*tensors) is not None


def level() -> str:
    """Which kernels are used: "avx512", "avx2" or "none"."""
    library = loaded()
    return "none" if library is None else Path(library._name).stem


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
    library = _library_for(gates, *read, grad_h_n, grad_c_n) if is_one_stride else None
    if library is None and not (_for_sizes.get() and are_built()):
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


def gram(rows: Tensor) -> Tensor | None:
    """`rows[n] @ rows[n].t()` for every n: shape `[n, t, t]`; None where there is no kernel for it.

    Args:
        rows: Shape `[n, t, i]`.
    """
    n, t, size = rows.shape
    if (library := _library_for(rows)) is None:
        return None
    rows = _contiguous_rows(rows)
    found = rows.new_empty(n, t, t)
    make = typed(library, "gram", rows.dtype)
    make(rows.data_ptr(), rows.stride(0), rows.stride(1), found.data_ptr(), n, t, size, torch.get_num_threads())
    return found


def gram_norms(left: Tensor | None, grams: Tensor | None, right: Tensor) -> Tensor | None:
    """`sum_{t,s} <left_t, left_s> <right_t, right_s>` of every n, in float64; None where there is no kernel for it.

    Args:
        left: Shape `[n, t, i]`; None where its Gram matrices are given.
        grams: Shape `[n, t, t]`, contiguous; None where they are not at hand.
        right: Shape `[n, t, o]`.
    """
    if (library := _library_for(*(value for value in (left, grams, right) if value is not None))) is None:
        return None
    left, right = None if left is None else _contiguous_rows(left), _contiguous_rows(right)
    n, t, size = right.shape
    threads = torch.get_num_threads()
    squares = right.new_empty(n, library.gram_ranges(n, t, threads), dtype=torch.float64)
    first = (None, 0, 0) if left is None else (left.data_ptr(), left.stride(0), left.stride(1))
    second = (right.data_ptr(), right.stride(0), right.stride(1))
    run = typed(library, "gram_norms", right.dtype)
    sizes = (n, t, 0 if left is None else left.shape[2], size)
    run(*first, _pointer(grams), *second, squares.data_ptr(), *sizes, threads)
    return squares.sum(1)


def kernel_gradients(
    layer_input: Tensor,
    grad_output: Tensor,
    shape: tuple[int, ...],
    geometry: ConvolutionGeometry,
) -> tuple[Tensor, Tensor] | None:
    """Every example's gradient of a convolution's kernel, `[n, *kernel, C / groups, O]`, and its square, `[n]`, in
    float64; None where there is no kernel for these tensors.

    Args:
        layer_input: Shape `[n, frames, C, *size]`, one or two spatial axes, any strides.
        grad_output: Shape `[n, frames, O, *out size]`.
        shape: Shape of the kernel, `[O, C / groups, *kernel]`.
        geometry: How the kernel slides.
    """
    return _sums(layer_input, grad_output, None, shape, geometry)


def kernel_sum(
    layer_input: Tensor,
    grad_output: Tensor,
    weights: Tensor,
    shape: tuple[int, ...],
    geometry: ConvolutionGeometry,
) -> Tensor | None:
    """The weighted sum of every example's gradient of a convolution's kernel, of its shape; None where there is no
    kernel for these tensors. Arguments as `kernel_gradients`; the weights are of shape `[n]`.
    """
    n, frames = layer_input.shape[:2]
    x, g = (value.reshape(1, n * frames, *value.shape[2:]) for value in (layer_input, grad_output))
    each = weights.to(layer_input.dtype).repeat_interleave(frames) if frames > 1 else weights.to(layer_input.dtype)
    if (found := _sums(x, g, each.contiguous(), shape, geometry)) is None:
        return None
    sums, kernel = found[0], layer_input.new_empty(shape)
    library, taps = loaded(), math.prod(shape[2:])
    assert library is not None
    move = typed(library, "as_kernel", kernel.dtype)
    move(sums.data_ptr(), kernel.data_ptr(), taps, shape[1], shape[0], torch.get_num_threads())
    return kernel


def _sums(
    layer_input: Tensor,
    grad_output: Tensor,
    weights: Tensor | None,
    shape: tuple[int, ...],
    geometry: ConvolutionGeometry,
) -> tuple[Tensor, Tensor] | None:
    if (library := _library_for_convolution(layer_input, grad_output, shape)) is None:
        return None
    slide = _slide(layer_input.shape, grad_output.shape, shape, geometry)
    n, threads = layer_input.shape[0], torch.get_num_threads()
    pieces = library.kernel_gradient_pieces(byref(slide), layer_input.element_size(), threads)
    found = layer_input.new_empty(n, *shape[2:], shape[1], shape[0])
    squares = layer_input.new_empty(n, pieces, dtype=torch.float64)
    images = *_image(layer_input), *_image(grad_output)
    make = typed(library, "kernel_gradients", found.dtype)
    make(*images, _pointer(weights), found.data_ptr(), squares.data_ptr(), byref(slide), threads)
    return found, squares.sum(1)


def product_gradients(left: Tensor, right: Tensor, keep: bool) -> tuple[Tensor | None, Tensor] | None:
    """`right[n, g].t() @ left[n, g]` for every n and g: shape `[n, g, o, i]`, or None where it is not kept; and the sum
    of its squares, `[n]`, in float64. None where there is no kernel for these tensors.

    Args:
        left: Shape `[n, g, t, i]`.
        right: Shape `[n, g, t, o]`.
        keep: Whether more than the squares is wanted.
    """
    if (library := _library_for(left, right)) is None:
        return None
    (n, groups, positions, columns), rows, threads = left.shape, right.shape[3], torch.get_num_threads()
    blocks = library.product_gradient_blocks(n, groups, rows, columns, left.element_size(), threads)
    found = left.new_empty(n, groups, rows, columns) if keep else None
    squares = left.new_empty(n, blocks, dtype=torch.float64)
    factors = *_rows(left), *_rows(right)
    make = typed(library, "product_gradients", left.dtype)
    sizes = (n, groups, positions, rows, columns)
    make(*factors, _pointer(found), squares.data_ptr(), *sizes, threads)
    return found, squares.sum(1)


def shifted_squares(
    layer_input: Tensor,
    grad_output: Tensor,
    shape: tuple[int, ...],
    geometry: ConvolutionGeometry,
) -> Tensor | None:
    """The square of every example's gradient of a convolution's kernel, `[n]`, in float64, from Gram matrices of
    pixels; None where there is no kernel for these tensors. Arguments as `kernel_gradients`; one frame.
    """
    if (library := _library_for_convolution(layer_input, grad_output, shape)) is None:
        return None
    slide = _slide(layer_input.shape, grad_output.shape, shape, geometry)
    squares = layer_input.new_empty(slide.n, geometry.groups, dtype=torch.float64)
    images = *_image(layer_input), *_image(grad_output)
    make = typed(library, "shifted_squares", layer_input.dtype)
    make(*images, squares.data_ptr(), byref(slide), torch.get_num_threads())
    return squares.sum(1)


def group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Group normalisation of images with their channels last: the result, and mean and inverse deviation of each
    example's groups; None where there is no kernel for these tensors.

    Args:
        x: Shape `[n, C, H, W]`, channels last.
        weight: Shape `[C]`, contiguous, or None.
        bias: The same.
        groups: Of channels.
        eps: Added to the variance.
    """
    n, channels, height, width = x.shape
    if (library := _library_for(*(v for v in (x, weight, bias) if v is not None))) is None:
        return None
    found, mean, rstd = torch.empty_like(x), x.new_empty(n, groups), x.new_empty(n, groups)
    memories = (_pointer(value) for value in (x, weight, bias, found, mean, rstd))
    run = typed(library, "group_norm", x.dtype)
    run(*memories, n, height * width, channels, groups, eps, torch.get_num_threads())
    return found, mean, rstd


def group_norm_back(
    grad_output: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Gradients of the input of `group_norm`, and of its weight and bias for each example, `[n, C]`; None where there
    is no kernel for these tensors.

    Args:
        grad_output: Shape `[n, C, H, W]`, channels last.
        x: The same.
        weight: Shape `[C]`, contiguous, or None.
        mean: Shape `[n, groups]`, contiguous.
        rstd: The same.
    """
    n, channels, height, width = x.shape
    given = (grad_output, x, weight, mean, rstd)
    if (library := _library_for(*(v for v in given if v is not None))) is None:
        return None
    found = torch.empty_like(x), x.new_empty(n, channels), x.new_empty(n, channels)
    memories = (_pointer(value) for value in (*given, *found))
    run = typed(library, "group_norm_back", x.dtype)
    run(*memories, n, height * width, channels, mean.shape[1], torch.get_num_threads())
    return found


def weighted_sum(pieces: Sequence[Tensor], weights: Tensor) -> Tensor | None:
    """`sum_i weights[i] * value_i` over the examples of all pieces: shape `[*]`; None where there is no kernel for it.

    Args:
        pieces: Each `[examples, *]`.
        weights: Shape `[n]`.
    """
    if (library := _library_for(*pieces)) is None or not all(piece.is_contiguous() for piece in pieces):
        return None
    shape = pieces[0].shape[1:]
    size, dtype = math.prod(shape), pieces[0].dtype
    by_example = size * pieces[0].element_size()
    rows = [piece.data_ptr() + at * by_example for piece in pieces for at in range(len(piece))]
    weights, found = weights.to(dtype).contiguous(), pieces[0].new_empty(shape)
    run = typed(library, "weighted_sum", dtype)
    run((c_void_p * len(rows))(*rows), weights.data_ptr(), found.data_ptr(), len(rows), size, torch.get_num_threads())
    return found


def _contiguous_rows(value: Tensor) -> Tensor:
    return value if value.stride(-1) == 1 else value.contiguous()


def _pointer(value: Tensor | None) -> int | None:
    return None if value is None else value.data_ptr()


@lru_cache(maxsize=1024)
def _slide(in_shape: torch.Size, out_shape: torch.Size, shape: tuple[int, ...], geometry: ConvolutionGeometry) -> Slide:
    """How a kernel slides over images `[n, frames, channels, *size]`: not to be changed."""
    n, frames = in_shape[:2]

    def two(sizes: tuple[int, ...], missing: int) -> tuple[int, ...]:
        return sizes if len(sizes) == 2 else (missing, *sizes)

    of_input, of_output = two(in_shape[3:], 1), two(out_shape[3:], 1)
    groups = geometry.groups
    sizes = (n, frames, groups, shape[1], *of_input, shape[0] // groups, *of_output, *two(shape[2:], 1))
    return Slide(*sizes, *two(geometry.stride, 1), *two(geometry.padding, 0), *two(geometry.dilation, 1))


def _image(value: Tensor) -> tuple[int, object]:
    return value.data_ptr(), byref(_strides(value.stride()))


def _rows(value: Tensor) -> tuple[int, object]:
    """Of `[n, g, t, features]`: positions in the place of pixels."""
    n, groups, position, feature = value.stride()
    return value.data_ptr(), byref(_strides((n, groups, feature, position)))


@lru_cache(maxsize=1024)
def _strides(strides: tuple[int, ...]) -> Strides:
    """Of images `[n, frames, channels, *size]`: not to be changed."""
    return Strides(*strides[:3], *(strides[3:] if len(strides) == 5 else (0, *strides[3:])))


def _library_for(*tensors: Tensor) -> CDLL | None:
    """The kernels; None where there are none for these tensors."""
    dtype = tensors[0].dtype
    is_for_kernels = dtype in DTYPES and all(v.dtype == dtype and _is_plain(v) for v in tensors)
    return loaded() if is_for_kernels and not is_watched() else None


def _library_for_convolution(layer_input: Tensor, grad_output: Tensor, shape: tuple[int, ...]) -> CDLL | None:
    is_for_kernels = math.prod(shape) > 0 and len(shape) <= MOST_AXES
    return _library_for(layer_input, grad_output) if is_for_kernels else None


def _is_plain(value: Tensor) -> bool:
    """Whether what a pointer and strides say of it is all there is to know."""
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and value.device.type == "cpu"
        and value.layout is torch.strided
        and value.numel() > 0
        and not value.is_neg()
        and not value._is_zerotensor()
    )


__all__ = [
    "are_built",
    "are_for",
    "for_sizes",
    "gram",
    "gram_norms",
    "group_norm",
    "group_norm_back",
    "kernel_gradients",
    "kernel_sum",
    "level",
    "lstm_steps_back",
    "product_gradients",
    "shifted_squares",
    "weighted_sum",
]
