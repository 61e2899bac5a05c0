"""Per-example gradients that a strategy formed and keeps for the clipped sum.

Promises: they are held in pieces of the batch, none of which is so large that the system must hand out new pages for
it at every step; their weighted sum is one matrix-vector product per piece, each element read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perexfx import kernels
from perexfx.ir.factors import Gradient, GradientSignature, drop_examples, parameter_of

PIECE_BYTES = 16 << 20
"""C libraries get every block of more than 32 MiB from the system anew; its first touch costs more than a product."""

ALONE_BYTES = 256 << 10
"""Gradients of at least this size that are made one by one are a piece each: to copy them side by side costs more."""


def axes_in_memory(value: Tensor) -> tuple[int, ...]:
    """The axes of a dense tensor in the order in which they lie in memory."""
    return tuple(sorted(range(value.dim()), key=lambda axis: (-value.stride(axis), axis)))


@dataclass(frozen=True)
class Kept:
    """Per-example gradients at hand, in pieces.

    Attributes:
        pieces: Each `[examples, *]`, with the parameter's elements in the order of `axes`.
        shape: Shape of the parameter.
        axes: The parameter's axes in the order of the pieces; empty: in their own.
        turned: Whether the last two axes of the pieces are the other way round.
    """

    pieces: tuple[Tensor, ...]
    shape: tuple[int, ...]
    axes: tuple[int, ...] = ()
    turned: bool = False

    @property
    def signature(self) -> GradientSignature:
        """The sizes."""
        return GradientSignature(sum(piece.shape[0] for piece in self.pieces), self.shape)

    def gradients(self) -> Tensor:
        """All of them. Shape `[n, *shape]`."""
        every = torch.cat(self.pieces)
        return self._parameter(every, every.shape[0])

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Each element is read once."""
        if (found := kernels.weighted_sum(self.pieces, weights)) is not None:
            return self._parameter(found)
        if len(self.pieces) == 1:
            return self._parameter(Gradient(self.pieces[0]).weighted_sum(weights))
        first, *others = zip(self.pieces, weights.split([len(p) for p in self.pieces]), strict=True)
        piece, part = first
        total = Gradient(piece).weighted_sum(part)
        for piece, part in others:
            if len(piece) == 1:
                total.addcmul_(piece[0], part.to(piece.dtype))
            else:
                total.add_(Gradient(piece).weighted_sum(part))
        return self._parameter(total)

    def without(self, dropped: Tensor) -> Kept:
        """Zeros in the dropped rows."""
        parts = dropped.split([len(piece) for piece in self.pieces])
        return replace(self, pieces=tuple(map(drop_examples, self.pieces, parts)))

    def _parameter(self, value: Tensor, *lead: int) -> Tensor:
        turned = value.transpose(-1, -2) if self.turned else value
        return parameter_of(turned, self.shape, self.axes, *lead)


def joined(parts: Sequence[Kept]) -> Kept:
    """The gradients of several parts of a batch, in order."""
    return replace(parts[0], pieces=tuple(piece for part in parts for piece in part.pieces))
