"""Norms from two Gram matrices, without forming the gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from perexfx import kernels
from perexfx.ir.convolution import Convolution, ConvolutionSignature
from perexfx.ir.cost import Cost, Work
from perexfx.ir.factors import Factors, Product, ProductSignature, Rows, RowsSignature, SharedGram, Signature
from perexfx.ir.shared_costs import batched_product, gram_flops, held_factors
from perexfx.kernels.gemm import SMALL_EACH, products

CHUNK_ELEMENTS = 1 << 20
"""Gram matrices are formed for as many examples at a time as fit this many elements, so that they stay in cache."""


@dataclass(frozen=True)
class Gram:
    """`||sum_t x_t g_t^T||^2 = sum_{t,s} <x_t, x_s> <g_t, g_s>`: the ghost norm.

    References: Goodfellow 2015, arXiv:1510.01799; Li et al. 2022, arXiv:2110.05679; Bu et al. 2022, arXiv:2205.10683
    (convolutions).
    """

    name: str = "gram"

    weighs_taps: ClassVar = True

    def refuses(self, signature: Signature) -> str | None:
        """Gradients that are not a product of two factors."""
        if isinstance(signature, ProductSignature | ConvolutionSignature | RowsSignature):
            return None
        return "its gradient is not a product of two factors"

    def cost(self, signature: Signature, itemsize: int) -> Cost:
        """`2 n t^2 (i + o)` flops, half of them by a kernel in C++; one product after the clip node."""
        copies: tuple[Work, ...] = ()
        transient = 0
        has_kernels = False
        if isinstance(signature, RowsSignature):
            grams, t, i, o = signature.n, signature.t, 1, signature.d
        elif isinstance(signature, ProductSignature):
            grams, t, i, o = signature.n * signature.g, signature.t, signature.i, signature.o
            has_kernels = signature.has_kernels
            if grams * t * t <= CHUNK_ELEMENTS:
                i, o = -(-i // signature.left_users), -(-o // signature.right_users)
        else:
            assert isinstance(signature, ConvolutionSignature)
            grams, t = signature.n * signature.geometry.groups, signature.frames * signature.positions
            i, o = math.prod(signature.shape[1:]), signature.out_channels // signature.geometry.groups
            has_kernels = signature.has_kernels
            unfolded = itemsize * grams * t * i
            transient = unfolded
            copies = (Work("memory", bytes=2 * unfolded, calls=2),)
        squares = grams * t * t
        if has_kernels:
            work = (Work("gram", grams * gram_flops(t, i + o), itemsize * grams * t * (i + o)),)
            is_shared = isinstance(signature, ProductSignature) and max(signature.left_users, signature.right_users) > 1
            transient += itemsize * squares if is_shared and squares <= CHUNK_ELEMENTS else 0
            return held_factors(signature, itemsize, (*copies, *work), transient)
        per_chunk = max(1, CHUNK_ELEMENTS // max(1, t * t))
        chunks = -(-grams // per_chunk)
        work = (
            batched_product(2 * grams, 2 * squares * (i + o), itemsize * (grams * t * (i + o) + 2 * squares)),
            Work("cache", bytes=4 * itemsize * squares, calls=2 * chunks),
        )
        transient += 2 * itemsize * min(squares, max(CHUNK_ELEMENTS, t * t))
        return held_factors(signature, itemsize, (*copies, *work), transient)

    def squared_norms(self, factors: Factors) -> tuple[Tensor, Factors]:
        """Exact; two t x t matrices per example at a time."""
        if isinstance(factors, Rows):
            return _rows_squared_norms(factors), factors
        product = _unfolded(factors) if isinstance(factors, Convolution) else factors
        assert isinstance(product, Product)
        n, g, t, i = product.left.shape
        left = product.left.reshape(n * g, t, i)
        right = product.right.reshape(n * g, t, product.right.shape[3])
        size = max(1, CHUNK_ELEMENTS // max(1, t * t))
        is_whole = n * g <= size
        if kernels.are_for(left, right):
            left_gram, right_gram = (product.left_gram, product.right_gram) if is_whole else (None, None)
            return _by_kernel((left, left_gram), (right, right_gram)).reshape(n, g).sum(1), factors
        blocks = 2 if t >= HALVED and 2 * t * t * right.shape[2] < SMALL_EACH else 1
        if is_whole:
            sums = [_sum_of_blocks(*_grams((left, product.left_gram), (right, product.right_gram), blocks))]
        else:
            sums = [
                _sum_of_blocks(_gram(a, blocks), _gram(b, blocks))
                for a, b in zip(left.split(size), right.split(size), strict=True)
            ]
        return torch.cat(sums).reshape(n, g).sum(1), factors


def _unfolded(factors: Convolution) -> Product:
    """With the columns of each tap multiplied by the root of what its squares count."""
    product, taps = factors.unfolded(), factors.weight_of_each_tap
    if taps is None:
        return product
    roots = taps.sqrt().flatten().repeat_interleave(factors.shape[1])
    return replace(product, left=product.left * roots.to(product.left.dtype))


HALVED = 64
"""Gram matrices of at least so many positions are made without one of their two equal quarters, unless oneDNN makes
them: its products of half the size are no faster."""


_Blocks = tuple[Tensor, ...]
_Rows = tuple[Tensor, SharedGram | None]


def _by_kernel(left: _Rows, right: _Rows) -> Tensor:
    """By a kernel in C++, which multiplies the entries of one matrix with those of the other as it makes them."""
    shared, own = (left, right) if left[1] is not None else (right, left)
    if own[1] is not None:
        return _sum_of_blocks(*_grams(left, right, 1))
    if shared[1] is None:
        found = kernels.gram_norms(left[0], None, right[0])
    else:
        found = kernels.gram_norms(None, _taken(shared, 1)[0], own[0])
    assert found is not None
    return found.clamp_(min=0).to(left[0].dtype)


def _grams(left: _Rows, right: _Rows, blocks: int) -> tuple[_Blocks, _Blocks]:
    """Those of both factors, what others share second; the first may be overwritten."""
    shared, own = (left, right) if left[1] is not None else (right, left)
    return _copied(own, blocks) if own[1] is not None else _gram(own[0], blocks), _taken(shared, blocks)


def _taken(rows: _Rows, blocks: int) -> _Blocks:
    value, shared = rows
    return _gram(value, blocks) if shared is None else shared.taken(lambda: _gram(value, blocks), blocks)


def _copied(rows: _Rows, blocks: int) -> _Blocks:
    return tuple(block.clone() for block in _taken(rows, blocks))


def _gram(rows: Tensor, blocks: int) -> tuple[Tensor, ...]:
    """The Gram matrices of `[m, t, i]`, whole or without the block below the diagonal; that one comes last."""
    half = -(-rows.shape[1] // 2)
    whole = kernels.gram(rows)
    if whole is None and blocks == 2:
        first, second = rows.split(half, dim=1)
        return products(first, first), products(second, second), products(first, second)
    if whole is None:
        whole = products(rows, rows)
    return (whole,) if blocks == 1 else (whole[:, :half, :half], whole[:, half:, half:], whole[:, :half, half:])


def _sum_of_blocks(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> Tensor:
    """`sum_{t,s} left[m, t, s] right[m, t, s]`, `[m]`; `left` is overwritten."""
    if len(left) == 1:
        return sum_of_products(left[0], right[0])
    first, second, beside = (_inner_product(a, b) for a, b in zip(left, right, strict=True))
    return first.add_(second).add_(beside, alpha=2).clamp_(min=0)


def sum_of_products(left_gram: Tensor, right_gram: Tensor) -> Tensor:
    """`sum_{t,s} left[m, t, s] right[m, t, s]`, `[m]`; never below zero, accumulated in float32 at least.

    `left_gram` is overwritten.
    """
    return _inner_product(left_gram, right_gram).clamp_(min=0)


def _inner_product(left: Tensor, right: Tensor) -> Tensor:
    dtype = torch.promote_types(left.dtype, torch.float32)
    products = left.mul_(right)
    return products.sum(dim=tuple(range(1, products.dim())), dtype=dtype)


def _rows_squared_norms(factors: Rows) -> Tensor:
    """Pairs of positions that looked up the same row: the Gram of one-hot vectors is their equality."""
    right = factors.trained_right
    n, t, _ = right.shape
    size = max(1, CHUNK_ELEMENTS // max(1, t * t))
    sums = [
        sum_of_products(g @ g.transpose(1, 2), (ids[:, :, None] == ids[:, None, :]).to(g.dtype))
        for g, ids in zip(right.split(size), factors.ids.split(size), strict=True)
    ]
    return torch.cat(sums) if n else right.new_zeros(0)
