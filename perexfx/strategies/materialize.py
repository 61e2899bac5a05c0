"""Form the per-example gradients and keep them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from perexfx.ir.convolution import Convolution, ConvolutionSignature
from perexfx.ir.cost import Cost, Work
from perexfx.ir.factors import (
    Factors,
    Gradient,
    GradientSignature,
    ProductSignature,
    Rows,
    RowsSignature,
    Signature,
    squared_norms_of,
)
from perexfx.strategies.costs import (
    finish_kept,
    finish_product,
    fresh_memory,
    parameter_elements,
    read_for_norm,
)


@dataclass(frozen=True)
class Materialize:
    """Per-example gradients by one batched product, kept until the clip node: their clipped sum is then one
    matrix-vector product, and the batched parameter gradient is never computed.

    Convolutions are unfolded first. Tables of embeddings stay sparse: only looked-up rows are summed.
    """

    name: str = "materialize"

    def refuses(self, signature: Signature) -> str | None:
        """Nothing: every per-example gradient can be formed."""
        return None

    def cost(self, signature: Signature, itemsize: int) -> Cost:
        """Reads the factors, writes and reads `n` gradients."""
        if isinstance(signature, RowsSignature):
            rows = signature.n * signature.t * signature.d
            work = (Work("index", bytes=3 * itemsize * rows, calls=6), read_for_norm(rows, itemsize))
            finish = finish_product(signature, itemsize)
            return Cost((*work, *finish), signature.held_elements * itemsize, bytes_transient=rows * itemsize)
        kept = signature.n * parameter_elements(signature)
        tail = (read_for_norm(kept, itemsize), finish_kept(signature, itemsize))
        if isinstance(signature, GradientSignature):
            return Cost(tail, kept * itemsize)
        if isinstance(signature, ProductSignature):
            flops = 2 * signature.t * kept
            product = Work("batched_gemm", flops, itemsize * (signature.held_elements + kept), calls=signature.n)
            return Cost((product, fresh_memory(kept * itemsize), *tail), kept * itemsize)
        assert isinstance(signature, ConvolutionSignature)
        unfolded = signature.n * signature.frames * signature.positions * signature.in_channels
        unfolded *= math.prod(signature.kernel)
        copy = Work("memory", bytes=2 * itemsize * unfolded, calls=2)
        product = Work(
            "batched_gemm",
            signature.weight_gradient_flops,
            itemsize * (unfolded + signature.output_elements + kept),
            calls=signature.n,
        )
        fresh = fresh_memory(kept * itemsize), fresh_memory(unfolded * itemsize)
        return Cost((copy, product, *fresh, *tail), kept * itemsize, bytes_transient=unfolded * itemsize)

    def squared_norms(self, factors: Factors) -> tuple[Tensor, Factors]:
        """Norms of the formed gradients."""
        if isinstance(factors, Rows):
            return squared_norms_of(_summed_rows(factors)), factors
        if isinstance(factors, Convolution):
            factors = factors.unfolded()
        gradients = factors.gradients()
        return squared_norms_of(gradients), Gradient(gradients)


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
