"""The draw of a reduced model: on which side of its coarse pixel every convolution takes its sample."""

from __future__ import annotations

import torch
from torch import Tensor

from perexfx.capture import LeafModule


class Sides(LeafModule):
    """A side for each convolution and axis, `[convolutions, axes]`, 0 or 1: one node, which carries no example.

    In training they are drawn anew at every forward, from torch's default generator, on the CPU: a side that stayed the
    same would shift the image by half a coarse pixel in every layer. In evaluation they alternate.
    """

    def __init__(self, count: int, axes: int) -> None:
        super().__init__()
        self.count, self.axes = count, axes

    def forward(self) -> Tensor:
        """The sides."""
        if self.training:
            return torch.randint(0, 2, (self.count, self.axes), device="cpu")
        return (torch.arange(self.count, device="cpu") % 2)[:, None].expand(self.count, self.axes)

    def extra_repr(self) -> str:
        """For `print`."""
        return f"{self.count} convolutions, {self.axes} axes"


__all__ = ["Sides"]
