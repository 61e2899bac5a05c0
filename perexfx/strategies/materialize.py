"""Form the per-example gradients and keep them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from perexfx.ir.convolution import Convolution, ConvolutionSignature
from perexfx.ir.cost import Cost, Work
from perexfx.ir.factors import (
    Factors,
    Gradient,
    GradientSignature,
    Product,
    ProductSignature,
    Rows,
    RowsSignature,
    Signature,
)
from perexfx.ir.kept import ALONE_BYTES, PIECE_BYTES, Kept, joined
from perexfx.ir.norms import block_norms, squared_norms_of
from perexfx.ir.ordinary_gradient import parameter_elements
from perexfx.ir.shared_costs import (
    batched_product,
    finish_kept,
    held_factors,
    kept_gradients,
    read_for_norm,
)
from perexfx.kernels.gemm import are_one_by_one, transposed_products, transposed_products_one_by_one


@dataclass(frozen=True)
class Materialize:
    """Per-example gradients by batched products.

    Convolutions are unfolded first. Tables of embeddings stay sparse: only looked-up rows are summed.

    Attributes:
        keep: Keep the gradients until the clip node (`materialize`): their clipped sum is then one matrix-vector
            product, and the batched parameter gradient is never computed. Or only their norms
            (`materialize_norms`), a piece of the batch at a time, and compute the clipped sum by one product later.
    """

    keep: bool

    weighs_taps: ClassVar = True

    @property
    def name(self) -> str:
        """`materialize` or `materialize_norms`."""
        return "materialize" if self.keep else "materialize_norms"

    def refuses(self, signature: Signature) -> str | None:
        """Nothing: every per-example gradient can be formed. Without keeping them, all that are formed already."""
        if self.keep or isinstance(signature, ProductSignature | ConvolutionSignature):
            return None
        return "its gradient is not a product of two factors"

    def cost(self, signature: Signature, itemsize: int) -> Cost:
        """Reads the factors, writes and reads `n` gradients."""
        if isinstance(signature, RowsSignature):
            rows = signature.n * signature.t * signature.d
            work = (Work("index", bytes=3 * itemsize * rows, calls=6), read_for_norm(rows, itemsize))
            return held_factors(signature, itemsize, work, bytes_transient=rows * itemsize)
        kept = signature.n * parameter_elements(signature)
        norms = read_for_norm(kept, itemsize)
        if isinstance(signature, GradientSignature):
            return Cost((norms, finish_kept(signature, itemsize)), kept * itemsize, holds_factors=True)
        if isinstance(signature, ProductSignature):
            flops, read = 2 * signature.t * kept, signature.held_elements
            copies: tuple[Work, ...] = ()
            transient = 0
        else:
            assert isinstance(signature, ConvolutionSignature)
            unfolded = signature.unfolded_elements
            flops, read = signature.weight_gradient_flops, unfolded + signature.output_elements
            copies = (Work("unfold", bytes=2 * itemsize * unfolded, calls=signature.n),)
            transient = itemsize * examples_at_a_time(signature, itemsize) * _elements_at_work(signature)
            if not signature.channels_last:
                moved = 2 * itemsize * signature.held_elements
                copies = (*copies, Work("memory", bytes=moved, calls=signature.n))
        product = batched_product(signature.n, flops, itemsize * (read + kept))
        if self.keep:
            return kept_gradients(signature, itemsize, (*copies, product, norms), transient)
        transient += max(min(kept * itemsize, PIECE_BYTES), parameter_elements(signature) * itemsize)
        return held_factors(signature, itemsize, (*copies, product, norms), transient)

    def squared_norms(self, factors: Factors) -> tuple[Tensor, Factors]:
        """Norms of the formed gradients."""
        if isinstance(factors, Rows):
            return squared_norms_of(_summed_rows(factors)), factors
        if isinstance(factors, Convolution):
            return self._of_convolution(factors)
        if not isinstance(factors, Product):
            gradients = factors.gradients()
            return squared_norms_of(gradients), Gradient(gradients)
        return self._of_product(factors, None)

    def _of_product(self, factors: Product, weights: Tensor | None) -> tuple[Tensor, Factors]:
        """With what the squares of each input feature count, `[i]`."""
        turned = factors.left.shape[3] < factors.right.shape[3]  # the narrower factor is cheaper to transpose
        roots = None if weights is None else weights.sqrt().to(factors.left.dtype)
        norms, pieces = [], []
        for piece in _pieces(factors, turned):
            seen = piece if roots is None else piece * (roots[:, None] if turned else roots)
            norms.append(block_norms(seen))
            if self.keep:
                pieces.append(piece)
        squared = torch.cat(norms).square_().sum(1)
        return squared, Kept(tuple(pieces), factors.shape, factors.axes, turned) if self.keep else factors

    def _of_convolution(self, factors: Convolution) -> tuple[Tensor, Factors]:
        """A few examples at a time, so that what is unfolded stays in the cache."""
        step = examples_at_a_time(factors.signature, factors.layer_input.element_size())
        norms, kept = [], []
        taps = factors.weight_of_each_tap
        weights = None if taps is None else taps.flatten().repeat_interleave(factors.shape[1])
        for part in factors.split(step):
            squared, held = self._of_product(part.unfolded(), weights)
            norms.append(squared)
            if isinstance(held, Kept):
                kept.append(held)
        return torch.cat(norms), joined(kept) if kept else factors


UNFOLDED_BYTES = 4 << 20
"""Inputs are unfolded for as many examples at a time as fit."""


def examples_at_a_time(signature: ConvolutionSignature, itemsize: int) -> int:
    """For how many examples the input is unfolded at once."""
    each = signature.unfolded_elements // max(1, signature.n) * itemsize
    return max(1, min(signature.n, UNFOLDED_BYTES // max(1, each)))


def _elements_at_work(signature: ConvolutionSignature) -> int:
    """Of one example: its input unfolded, that in channels last and padded, and its output gradient likewise."""
    copied = 0
    if any(signature.geometry.padding) or not signature.channels_last:
        copied = math.prod(signature.padded_size) * signature.in_channels * signature.frames
    reordered = 0 if signature.channels_last else signature.output_elements
    return copied + (signature.unfolded_elements + reordered) // max(1, signature.n)


def _pieces(product: Product, turned: bool) -> Iterator[Tensor]:
    """Per-example gradients, a piece of the batch at a time: `[examples, groups, outputs, inputs]`, or turned."""
    first, second = (product.left, product.right) if turned else (product.right, product.left)
    n, g, a, b = *first.shape[:2], first.shape[3], second.shape[3]
    bytes_each = g * a * b * first.element_size()
    if g == 1 and bytes_each >= ALONE_BYTES and are_one_by_one(first[:, 0], second[:, 0]):
        for each in transposed_products_one_by_one(first[:, 0], second[:, 0]):
            yield each.view(1, 1, a, b)
        return
    step = max(1, PIECE_BYTES // max(1, bytes_each))
    for start in range(0, max(n, 1), step):
        left, right = (value[start : start + step].flatten(0, 1) for value in (first, second))
        yield transposed_products(left, right).reshape(min(step, n - start), g, a, b)


def _summed_rows(factors: Rows) -> Tensor:
    """Gradient rows with those of equal ids added up, the rest zero: `[n, t, d]`, whatever the table's size."""
    n, t, d = factors.right.shape
    if n * t == 0:
        return factors.right
    ordered, order = factors.ids.sort(dim=1)
    starts = torch.ones_like(ordered)
    starts[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).to(ordered.dtype)
    segments = torch.empty_like(order).scatter(1, order, starts.cumsum(1) - 1)
    rows = torch.arange(n, device=order.device)[:, None] * t + segments
    right = factors.trained_right.reshape(n * t, d)
    return torch.zeros_like(right).index_add(0, rows.reshape(n * t), right).reshape(n, t, d)
