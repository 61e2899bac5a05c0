"""Digests: what tells one value from another without keeping it.

Promises: two runs of the same layers on the same values have the same digest, up to rounding; other random numbers,
modes or parameters have another, also beside outliers and where a layer keeps its sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perexfx.ir.layout import Layout


@dataclass(frozen=True)
class Digest:
    """What tells one value from another.

    Attributes:
        numbers: Some of each example's. Shape `[B, SAMPLES]` at most.
        sums: Of all, with weights that no layer knows: plain sums of softmax and norm layers are always the same.
            Shape `[B]`.
        sizes: The 2-norms: what other numbers would change the sums by. Shape `[B]`.
        dtype: Of the value.
    """

    numbers: Tensor
    sums: Tensor
    sizes: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, value: Tensor, layout: Layout) -> Digest:
        """Of a value whose layout is known."""
        rows = layout.examples_first(value.detach()).flatten(1)
        rows = rows.to(torch.promote_types(value.dtype, torch.float32))
        places = torch.arange(rows.shape[1], dtype=rows.dtype, device=rows.device)
        sums = rows @ (torch.frac(places * GOLDEN) - 0.5)
        step = max(1, rows.shape[1] // SAMPLES)
        return cls(rows[:, ::step].clone(), sums, torch.linalg.vector_norm(rows, 2, 1), value.dtype)

    def differs(self, other: Digest) -> Tensor:
        """Which examples differ by more than rounding. Shape `[B]`."""
        tolerance = torch.finfo(self.dtype).eps ** 0.5
        numbers = self.numbers.abs()
        usual = numbers.nanmedian(1, keepdim=True).values if numbers.shape[1] else numbers
        known, found = (self.numbers, self.sums), (other.numbers, other.sums)
        sizes = numbers + usual, self.sizes
        numbers_differ, sums_differ = (
            ~(((b - a).abs() <= tolerance * size) | (a == b) | (a.isnan() & b.isnan()))
            for a, b, size in zip(known, found, sizes, strict=True)
        )
        return numbers_differ.any(1) | sums_differ


GOLDEN = 0.6180339887498949
"""Multiples of the golden ratio, without their integer parts, are spread evenly and never repeat."""
SAMPLES = 64


__all__ = ["Digest"]
