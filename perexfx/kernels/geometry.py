"""How the kernel of a convolution slides over its input."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ConvolutionGeometry:
    """How a kernel slides: one number per spatial axis, in torch's order of arguments."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
