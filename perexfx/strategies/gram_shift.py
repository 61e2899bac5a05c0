"""The Gram of a convolution's unfolded input from the Gram of its pixels, by shifts and adds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from perexfx import kernels
from perexfx.ir.convolution import Convolution, ConvolutionSignature
from perexfx.ir.cost import Cost, Work
from perexfx.ir.factors import Factors, Signature
from perexfx.ir.shared_costs import batched_product, gram_flops, held_factors
from perexfx.kernels.gemm import products
from perexfx.kernels.geometry import ConvolutionGeometry
from perexfx.strategies.gram import sum_of_products

CHUNK_ELEMENTS = 1 << 19
"""Gram matrices are formed for as many examples at a time as fit this many elements, so that they stay in cache."""


@dataclass(frozen=True)
class _Phase:
    """The kernel taps along one axis that read the same stride phase of the padded input.

    Attributes:
        start: First padded position read.
        length: How many positions, a stride apart, are read.
        taps: Which.
        offsets: Of each tap, counted in strides from `start`.
    """

    start: int
    length: int
    taps: tuple[int, ...]
    offsets: tuple[int, ...]


def _phases(geometry: ConvolutionGeometry, kernel: tuple[int, ...], out_size: tuple[int, ...]) -> list[list[_Phase]]:
    """Per spatial axis, the taps gathered by stride phase."""
    axes = []
    for stride, dilation, taps, out in zip(geometry.stride, geometry.dilation, kernel, out_size, strict=True):
        by_phase: dict[int, list[int]] = {}
        for tap in range(taps):
            by_phase.setdefault(tap * dilation % stride, []).append(tap)
        axes.append([_phase_of(phase, tuple(found), stride, dilation, out) for phase, found in by_phase.items()])
    return axes


def _phase_of(phase: int, taps: tuple[int, ...], stride: int, dilation: int, out: int) -> _Phase:
    first, *_, last = (tap * dilation // stride for tap in (*taps, taps[-1]))
    offsets = tuple(tap * dilation // stride - first for tap in taps)
    return _Phase(phase + stride * first, last - first + out, taps, offsets)


@dataclass(frozen=True)
class GramShift:
    """`sum(A * G)` with `A[t, s] = sum_k P[t + k, s + k]`: P is the Gram of the padded input over channels alone.

    One product over C instead of C k^2, then k - 1 adds along each spatial axis. Strides: the same on each of the
    stride phases of the input, summed.
    """

    name: str = "gram_shift"

    weighs_taps: ClassVar = True

    def refuses(self, signature: Signature) -> str | None:
        """All but convolutions of one image per example."""
        if not isinstance(signature, ConvolutionSignature):
            return "it is not a convolution"
        if signature.frames != 1:
            return f"each example is {signature.frames} images, and pairs of positions in different images count too"
        return None

    def cost(self, signature: Signature, itemsize: int) -> Cost:
        """Two Grams over pixels, box sums, and one product after the clip node."""
        assert isinstance(signature, ConvolutionSignature)
        geometry = signature.geometry
        grams = signature.n * geometry.groups
        t = signature.positions
        channels = signature.in_channels // geometry.groups
        if signature.has_kernels and _fits_kernel(geometry, signature.kernel, signature.out_size):
            outputs = signature.out_channels // geometry.groups
            phases = math.prod(map(len, _phases(geometry, signature.kernel, signature.out_size)))
            pixels = math.ceil(math.prod(signature.in_size) / math.prod(geometry.stride))
            flops = gram_flops(t, outputs) + phases * gram_flops(pixels, channels)
            read = t * t * math.prod(signature.kernel)
            work = (Work("gram", grams * flops), Work("shifted_squares", bytes=itemsize * grams * read, calls=0))
            return held_factors(signature, itemsize, work)
        flops = 2 * t * t * (signature.out_channels // geometry.groups)
        moved = 4 * t * t
        largest, together, calls = t * t, 2 * t * t, 2
        for phases in product(*_phases(geometry, signature.kernel, signature.out_size)):
            sizes = [phase.length for phase in phases]
            pixels = math.prod(sizes)
            flops += 2 * pixels * pixels * channels
            largest, before = max(largest, pixels * pixels), pixels
            for axis, phase in enumerate(phases):
                sizes[axis] = signature.out_size[axis]
                after = math.prod(sizes)
                if len(phase.offsets) > 1:
                    together = max(together, before**2 + after**2)
                moved += 3 * len(phase.offsets) * after**2
                calls += len(phase.offsets)
                before = after
        at_a_time = min(grams, max(1, CHUNK_ELEMENTS // max(1, largest)))
        chunks = -(-grams // max(1, at_a_time))
        read = grams * (t * signature.out_channels + math.prod(signature.padded_size) * channels)
        work = (
            batched_product(2 * grams, grams * flops, itemsize * (read + 2 * grams * largest)),
            Work("cache", bytes=itemsize * grams * moved, calls=chunks * calls),
        )
        padded = grams * math.prod(signature.padded_size) * channels if any(geometry.padding) else 0
        return held_factors(signature, itemsize, work, itemsize * (padded + at_a_time * together))

    def squared_norms(self, factors: Factors) -> tuple[Tensor, Factors]:
        """Exact; neither the unfolded input nor a gradient is formed."""
        assert isinstance(factors, Convolution)
        geometry = factors.geometry
        if _fits_kernel(geometry, factors.shape[2:], tuple(factors.grad_output.shape[3:])):
            images = factors.layer_input, factors.grad_output
            squared = kernels.shifted_squares(*images, factors.shape, geometry, factors.weight_of_each_tap)
            if squared is not None:
                dtype = torch.promote_types(factors.layer_input.dtype, torch.float32)
                return squared.clamp_(min=0).to(dtype), factors
        padded = factors.padded_input().squeeze(1)
        n, channels, *size = padded.shape
        if n == 0:
            return padded.new_zeros(0), factors
        out_size = tuple(factors.grad_output.shape[3:])
        grams = n * geometry.groups
        pixels = padded.reshape(grams, channels // geometry.groups, *size)
        right = factors.grad_output.reshape(grams, -1, math.prod(out_size)).transpose(1, 2)
        phases = _phases(geometry, factors.shape[2:], out_size)
        largest = max(math.prod(phase.length for phase in choice) for choice in product(*phases)) ** 2
        step = max(1, CHUNK_ELEMENTS // max(1, largest))
        sums = [
            sum_of_products(
                _unfolded_gram(x, phases, geometry.stride, out_size, factors.tap_weights),
                products(g, g).reshape(-1, *out_size, *out_size),
            )
            for x, g in zip(pixels.split(step), right.split(step), strict=True)
        ]
        return torch.cat(sums).reshape(n, geometry.groups).sum(1), factors


IN_CACHE = 700
"""Positions of a grid, at most, whose Gram matrix is made by the kernel: two of them fill a core's cache."""


def _fits_kernel(geometry: ConvolutionGeometry, kernel: tuple[int, ...], out_size: tuple[int, ...]) -> bool:
    """Whether all positions that the taps read, of one phase and with the padding, are few enough."""
    longest = (max(phase.length for phase in phases) for phases in _phases(geometry, kernel, out_size))
    return math.prod(longest) <= IN_CACHE


def _unfolded_gram(
    pixels: Tensor,
    phases: list[list[_Phase]],
    stride: tuple[int, ...],
    out_size: tuple[int, ...],
    tap_weights: tuple[Tensor | None, ...] | None,
) -> Tensor:
    """The Gram of the unfolded input. Shape `[m, *out size, *out size]`; `pixels` has shape `[m, C, *size]`."""
    total: Tensor | None = None
    for choice in product(*phases):
        part = pixels
        for axis, phase in enumerate(choice):
            stop = phase.start + stride[axis] * (phase.length - 1) + 1
            part = part[(slice(None),) * (2 + axis) + (slice(phase.start, stop, stride[axis]),)]
        lengths = part.shape[2:]
        flat = part.flatten(2).transpose(1, 2)
        gram = products(flat, flat).reshape(-1, *lengths, *lengths)
        for axis, phase in enumerate(choice):
            weights = None if tap_weights is None else tap_weights[axis]
            own = None if weights is None else [weights[tap].to(gram.dtype) for tap in phase.taps]
            gram = _sum_of_shifts(gram, axis, len(lengths), phase.offsets, out_size[axis], own)
        total = gram if total is None else total.add_(gram)
    assert total is not None
    return total


def _sum_of_shifts(
    gram: Tensor, axis: int, rank: int, offsets: tuple[int, ...], length: int, weights: Sequence[Tensor] | None
) -> Tensor:
    """`sum_offset gram[.., offset : offset + length, .., offset : offset + length, ..]` along both axes of a pair."""
    shifted = [gram.narrow(1 + axis, at, length).narrow(1 + rank + axis, at, length) for at in offsets]
    if weights is not None:
        shifted = [part * weight for part, weight in zip(shifted, weights, strict=True)]
    total = shifted[0]
    if len(shifted) > 1:
        total = total + shifted[1]
        for part in shifted[2:]:
            total.add_(part)
    return total
