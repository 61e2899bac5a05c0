"""Sizes of sites that several files of tests ask about."""

from __future__ import annotations

from perexfx.ir.convolution import ConvolutionSignature
from perexfx.kernels.geometry import ConvolutionGeometry


def convolution(n: int, channels: int, out: int, size: int, kernel: int = 3, frames: int = 1) -> ConvolutionSignature:
    slide = ConvolutionGeometry((1, 1), (kernel // 2, kernel // 2), (1, 1), 1)
    return ConvolutionSignature(n, frames, (size, size), (size, size), (out, channels, kernel, kernel), slide)
