"""The factors of a convolution: its input and the gradient of its output, never unfolded unless asked to be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from perexfx import kernels
from perexfx.ir.factors import Product, drop_examples, scale_examples
from perexfx.kernels.geometry import ConvolutionGeometry


@dataclass(frozen=True)
class ConvolutionSignature:
    """Sizes of a `Convolution`.

    Attributes:
        n: Examples.
        frames: Images per example (more than one where a batch axis was merged into the examples).
        in_size: Spatial sizes of the input.
        out_size: Spatial sizes of the output.
        shape: `[out channels, in channels / groups, *kernel]`.
        geometry: Stride, padding, dilation, groups.
        channels_last: Whether the images lie with their channels last.
        has_kernels: Whether there are kernels in C++ for it (`perexfx.kernels`).
        weighs_taps: Whether the squares of its taps do not count alike, which a strategy must know of.
    """

    n: int
    frames: int
    in_size: tuple[int, ...]
    out_size: tuple[int, ...]
    shape: tuple[int, ...]
    geometry: ConvolutionGeometry
    channels_last: bool = False
    has_kernels: bool = False
    weighs_taps: bool = False

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self.shape[1] * self.geometry.groups

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.shape[0]

    @property
    def kernel(self) -> tuple[int, ...]:
        """Sizes of the kernel."""
        return self.shape[2:]

    @property
    def padded_size(self) -> tuple[int, ...]:
        """Spatial sizes of the padded input."""
        return tuple(s + 2 * p for s, p in zip(self.in_size, self.geometry.padding, strict=True))

    @property
    def positions(self) -> int:
        """Output positions of one image."""
        return math.prod(self.out_size)

    @property
    def weight_gradient_flops(self) -> int:
        """Of the gradient of the kernel over all examples."""
        return 2 * self.n * self.frames * self.positions * math.prod(self.shape)

    @property
    def is_depthwise(self) -> bool:
        """Whether every channel has a kernel of its own."""
        return self.shape[1] == 1 and self.out_channels == self.geometry.groups > 1

    @property
    def has_thin_groups(self) -> bool:
        """Whether it is in groups that torch has no fast kernel gradient for: of few channels."""
        return self.geometry.groups > 1 and self.shape[1] <= THIN

    @property
    def fills_vectors(self) -> bool:
        """Whether the channels of a group fill whole vectors: elsewhere torch has no fast kernel gradient in groups."""
        inputs, outputs = self.shape[1], self.out_channels // self.geometry.groups
        return inputs % VECTOR == 0 and outputs % VECTOR == 0

    @property
    def is_sum_by_product(self) -> bool:
        """Whether a sum over examples goes through the unfolded input and one matrix product.

        On small maps that is faster than the library's kernel gradient, which copies kernels more than once.
        """
        rows = self.n * self.frames * self.positions
        return self.geometry.groups == 1 and 2 * rows <= 3 * self.out_channels

    @property
    def is_sum_by_kernel(self) -> bool:
        """Whether a sum over examples is the C++ kernel's: on small maps it is up to three times faster.

        For few rows and a large kernel one product is faster still: it writes the sum once, and in place.
        """
        is_fast = self.channels_last and self.positions <= SMALL_MAP
        most = FEW_ROWS if math.prod(self.kernel) == 1 else FEW_ROWS // 2
        is_product = self.n * self.frames * self.positions <= most and math.prod(self.shape) >= LARGE_KERNEL
        is_small = is_fast or self.is_sum_by_product
        return self.has_kernels and self.geometry.groups == 1 and is_small and not is_product

    @property
    def unfolded_elements(self) -> int:
        """Elements of the unfolded input."""
        return self.n * self.frames * self.positions * self.in_channels * math.prod(self.kernel)

    @property
    def input_elements(self) -> int:
        """Elements of the layer input."""
        return self.n * self.frames * self.in_channels * math.prod(self.in_size)

    @property
    def output_elements(self) -> int:
        """Elements of the layer output."""
        return self.n * self.frames * self.out_channels * self.positions

    @property
    def held_elements(self) -> int:
        """Elements of both factors."""
        return self.input_elements + self.output_elements

    def describe(self) -> str:
        """The sizes in words."""
        kernel = "x".join(map(str, self.kernel))
        size = "x".join(map(str, self.in_size))
        stride = f" /{self.geometry.stride[0]}" if max(self.geometry.stride) > 1 else ""
        groups = f" g{self.geometry.groups}" if self.geometry.groups > 1 else ""
        return f"{self.in_channels} -> {self.out_channels}, {kernel}{stride}{groups} on {size}"


THIN = 4
"""Groups of no more channels than this are slow in torch's kernel gradient."""

VECTOR = 8
"""Channels fill vectors of this many. A kernel gradient in groups of 24 is four times as fast as in groups of 25."""

FEW_ROWS, LARGE_KERNEL = 128, 1 << 20
"""Output positions of all examples, and elements of a kernel: with no more and no fewer, its gradient is a product.
Kernels of more than a pixel, whose product is transposed afterwards, need half as many."""

SMALL_MAP = 256
"""Output positions of images whose kernel gradient the C++ kernel takes over from torch's."""


def kernel_gradient(
    layer_input: Tensor, grad_output: Tensor, shape: tuple[int, ...], geometry: ConvolutionGeometry
) -> Tensor:
    """The gradient of a convolution's kernel, by torch's own kernel for it.

    Args:
        layer_input: Shape `[N, C, *size]`.
        grad_output: Shape `[N, O, *out size]`.
        shape: Shape of the kernel, `[O, C / groups, *kernel]`.
        geometry: Stride, padding, dilation, groups.
    """
    if is_copied_for(math.prod(shape), layer_input, grad_output.numel()):
        layer_input, grad_output = layer_input.contiguous(), grad_output.contiguous()
    stand_in = layer_input.new_zeros(()).expand(shape)  # only its shape is read
    return torch.ops.aten.convolution_backward(
        grad_output,
        layer_input,
        stand_in,
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        False,
        [0] * len(geometry.stride),
        geometry.groups,
        [False, True, False],
    )[1]


def is_copied_for(kernel: Tensor | int, layer_input: Tensor, output_elements: int) -> bool:
    """Whether images with their channels last should be copied into torch's default format for one convolution.

    oneDNN's convolutions copy the kernel in either format, once more with channels last, and the images in the default
    format alone: what is smaller should be copied.

    Args:
        kernel: The kernel, or its number of elements.
        layer_input: Shape `[N, C, *size]`.
        output_elements: Of the output.
    """
    elements = kernel if isinstance(kernel, int) else kernel.numel()
    is_last = layer_input.dim() == 4 and not layer_input.is_contiguous()
    return is_last and layer_input.numel() + output_elements < elements


@lru_cache(maxsize=1024)
def _ways_of_sum(
    n: int,
    frames: int,
    in_size: tuple[int, ...],
    out_size: tuple[int, ...],
    shape: tuple[int, ...],
    geometry: ConvolutionGeometry,
    channels_last: bool,
) -> tuple[bool, bool]:
    """Whether a weighted sum is the C++ kernel's where there is one, and whether else it is one product's."""
    sizes = ConvolutionSignature(n, frames, in_size, out_size, shape, geometry, channels_last, has_kernels=True)
    return sizes.is_sum_by_kernel, sizes.is_sum_by_product


@dataclass(frozen=True)
class Convolution:
    """The gradient of a convolution's kernel.

    Attributes:
        layer_input: Shape `[n, frames, C, *size]`.
        grad_output: Shape `[n, frames, O, *out size]`.
        shape: Shape of the kernel, `[O, C / groups, *kernel]`.
        geometry: Stride, padding (symmetric), dilation, groups.
        tap_weights: What squares count, by kernel axis `[size]`, in a norm; None along an axis where they count alike,
            and None where they do along all. The gradients themselves are as they are.
    """

    layer_input: Tensor
    grad_output: Tensor
    shape: tuple[int, ...]
    geometry: ConvolutionGeometry
    tap_weights: tuple[Tensor | None, ...] | None = None

    @property
    def signature(self) -> ConvolutionSignature:
        """The sizes."""
        n, frames, _, *size = self.layer_input.shape
        out_size = tuple(self.grad_output.shape[3:])
        weighs = self.tap_weights is not None
        return ConvolutionSignature(n, frames, tuple(size), out_size, self.shape, self.geometry, weighs_taps=weighs)

    @property
    def weight_of_each_tap(self) -> Tensor | None:
        """What the squares of each tap count, `[*kernel]`; None where they count alike."""
        if self.tap_weights is None:
            return None
        grid = self.layer_input.new_ones(
            self.shape[2:], dtype=torch.promote_types(self.layer_input.dtype, torch.float32)
        )
        for axis, weights in enumerate(self.tap_weights):
            if weights is not None:
                grid = grid * weights.to(grid).reshape(-1, *[1] * (len(self.tap_weights) - 1 - axis))
        return grid

    def weighed(self, gradients: Tensor) -> Tensor:
        """Gradients `[..., *kernel]` as a norm sees them: each tap multiplied by the root of what its squares count."""
        grid = self.weight_of_each_tap
        return gradients if grid is None else gradients * grid.sqrt().to(gradients.dtype)

    def gradients(self) -> Tensor:
        """The batch as groups: one call of the kernel for grouped convolutions gives every example's gradient.

        References: Rochette et al. 2019, arXiv:1912.06015, section 3 (there with one dimension more).
        """
        n, frames, channels, *size = self.layer_input.shape
        if n == 0:
            return self.layer_input.new_zeros(0, *self.shape)
        out_channels, *out_size = self.grad_output.shape[2:]
        stacked = kernel_gradient(
            self.layer_input.transpose(0, 1).reshape(frames, n * channels, *size),
            self.grad_output.transpose(0, 1).reshape(frames, n * out_channels, *out_size),
            (n * out_channels, *self.shape[1:]),
            replace(self.geometry, groups=n * self.geometry.groups),
        )
        return stacked.reshape(n, *self.shape)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """One ordinary kernel gradient, with the smaller of the two factors scaled."""
        layer_input, grad_output = self.layer_input, self.grad_output
        if layer_input.shape[0] == 0:
            return layer_input.new_zeros(self.shape)
        n, frames, _, *size = layer_input.shape
        sizes = (n, frames, tuple(size), tuple(grad_output.shape[3:]), self.shape, self.geometry)
        by_kernel, by_product = _ways_of_sum(*sizes, layer_input.stride(2) == 1)
        if by_kernel:
            found = kernels.kernel_sum(layer_input, grad_output, weights, self.shape, self.geometry)
            if found is not None:
                return found
        if by_product:
            return self.unfolded().weighted_sum(weights)
        if layer_input.numel() < grad_output.numel():
            layer_input = scale_examples(layer_input, weights)
        else:
            grad_output = scale_examples(grad_output, weights)
        return kernel_gradient(layer_input.flatten(0, 1), grad_output.flatten(0, 1), self.shape, self.geometry)

    def without(self, dropped: Tensor) -> Convolution:
        """Zeros in the dropped rows of both factors."""
        return replace(
            self,
            layer_input=drop_examples(self.layer_input, dropped),
            grad_output=drop_examples(self.grad_output, dropped),
        )

    def split(self, size: int) -> Iterator[Convolution]:
        """The same for as many examples at a time; one empty part for an empty batch."""
        for layer_input, grad_output in zip(self.layer_input.split(size), self.grad_output.split(size), strict=True):
            yield replace(self, layer_input=layer_input, grad_output=grad_output)

    def unfolded(self) -> Product:
        """The same gradient as a sum of outer products over output positions, by unfolding the input.

        Returns: `left` of shape `[n, g, t, kernel * (C / groups)]`, channels fastest: whole pixels are copied; and
        `right` of shape `[n, g, t, O / groups]`, where t runs over frames and output positions.
        """
        n, frames, channels = self.layer_input.shape[:3]
        groups, rank = self.geometry.groups, len(self.geometry.stride)
        out_size = self.grad_output.shape[3:]
        windows = self._windows().reshape(n, frames, *out_size, *self.shape[2:], groups, channels // groups)
        left = windows.permute(0, 2 + 2 * rank, *range(1, 2 + 2 * rank), 3 + 2 * rank)
        right = self.grad_output.reshape(n, frames, groups, self.shape[0] // groups, math.prod(out_size))
        t = frames * math.prod(out_size)
        return Product(
            left.reshape(n, groups, t, math.prod(self.shape[1:])),
            right.permute(0, 2, 1, 4, 3).reshape(n, groups, t, self.shape[0] // groups),
            self.shape,
            (0, *range(2, 2 + rank), 1),
        )

    def padded_input(self) -> Tensor:
        """The layer input with its zeros around it. Shape `[n, frames, C, *padded size]`."""
        if not any(self.geometry.padding):
            return self.layer_input
        amounts = [p for padding in reversed(self.geometry.padding) for p in (padding, padding)]
        return F.pad(self.layer_input.flatten(0, 1), amounts).unflatten(0, self.layer_input.shape[:2])

    def _windows(self) -> Tensor:
        """A view of the padded input's pixels, `[n, frames, *out size, *kernel, C]`."""
        pixels = self.padded_input().movedim(2, -1).contiguous()
        lead, steps = pixels.stride()[:2], pixels.stride()[2:-1]
        within = [step * d for step, d in zip(steps, self.geometry.dilation, strict=True)]
        between = [step * s for step, s in zip(steps, self.geometry.stride, strict=True)]
        sizes = (*pixels.shape[:2], *self.grad_output.shape[3:], *self.shape[2:], pixels.shape[-1])
        return pixels.as_strided(sizes, (*lead, *between, *within, 1))
