"""Kernels of convolutions."""

from __future__ import annotations

import math
from ctypes import CDLL, byref
from functools import lru_cache

import torch
from torch import Tensor

from perexfx.kernels.geometry import ConvolutionGeometry
from perexfx.kernels.loading import Slide, typed
from perexfx.kernels.tensors import library_for, pointer, strides_of

MOST_AXES = 4
"""Of a convolution's kernel: one or two are spatial."""


def kernel_gradients(
    layer_input: Tensor,
    grad_output: Tensor,
    shape: tuple[int, ...],
    geometry: ConvolutionGeometry,
    tap_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Every example's gradient of a convolution's kernel, `[n, *kernel, C / groups, O]`, and its square, `[n]`, in
    float64; None where there is no kernel for these tensors.

    Args:
        layer_input: Shape `[n, frames, C, *size]`, one or two spatial axes, any strides.
        grad_output: Shape `[n, frames, O, *out size]`.
        shape: Shape of the kernel, `[O, C / groups, *kernel]`.
        geometry: How the kernel slides.
        tap_weights: What the squares of each tap count, `[*kernel]`; None: all alike.
    """
    return _sums(layer_input, grad_output, None, shape, geometry, tap_weights)


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
    library, taps = library_for(kernel), math.prod(shape[2:])
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
    tap_weights: Tensor | None = None,
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
    counted = _doubles(tap_weights)
    make(*images, pointer(weights), pointer(counted), found.data_ptr(), squares.data_ptr(), byref(slide), threads)
    return found, squares.sum(1)


def shifted_squares(
    layer_input: Tensor,
    grad_output: Tensor,
    shape: tuple[int, ...],
    geometry: ConvolutionGeometry,
    tap_weights: Tensor | None = None,
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
    counted = _doubles(tap_weights)
    make(*images, pointer(counted), squares.data_ptr(), byref(slide), torch.get_num_threads())
    return squares.sum(1)


def _doubles(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.to(torch.float64).contiguous()


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
    return value.data_ptr(), byref(strides_of(value.stride()))


def _library_for_convolution(layer_input: Tensor, grad_output: Tensor, shape: tuple[int, ...]) -> CDLL | None:
    is_for_kernels = math.prod(shape) > 0 and len(shape) <= MOST_AXES
    return library_for(layer_input, grad_output) if is_for_kernels else None
