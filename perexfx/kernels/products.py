"""Kernels of sums of outer products, and of gradients that are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from ctypes import byref, c_void_p

import torch
from torch import Tensor

from perexfx.kernels.loading import typed
from perexfx.kernels.tensors import library_for, pointer, strides_of


def gram(rows: Tensor) -> Tensor | None:
    """`rows[n] @ rows[n].t()` for every n: shape `[n, t, t]`; None where there is no kernel for it.

    Args:
        rows: Shape `[n, t, i]`.
    """
    n, t, size = rows.shape
    if (library := library_for(rows)) is None:
        return None
    rows = _contiguous_rows(rows)
    found = rows.new_empty(n, t, t)
    make = typed(library, "gram", rows.dtype)
    make(rows.data_ptr(), rows.stride(0), rows.stride(1), found.data_ptr(), n, t, size, torch.get_num_threads())
    return found


def gram_norms(left: Tensor | None, grams: Tensor | None, right: Tensor) -> Tensor | None:
    """`sum_{t,s} <left_t, left_s> <right_t, right_s>` of every n, in float64; None where there is no kernel for it.

    Args:
        left: Shape `[n, t, i]`; None where its Gram matrices are given.
        grams: Shape `[n, t, t]`; None where they are not at hand.
        right: Shape `[n, t, o]`.
    """
    if (library := library_for(*(value for value in (left, grams, right) if value is not None))) is None:
        return None
    left, right = None if left is None else _contiguous_rows(left), _contiguous_rows(right)
    grams = None if grams is None else grams.contiguous()
    n, t, size = right.shape
    threads = torch.get_num_threads()
    squares = right.new_empty(n, library.gram_ranges(n, t, threads), dtype=torch.float64)
    first = (None, 0, 0) if left is None else (left.data_ptr(), left.stride(0), left.stride(1))
    second = (right.data_ptr(), right.stride(0), right.stride(1))
    run = typed(library, "gram_norms", right.dtype)
    sizes = (n, t, 0 if left is None else left.shape[2], size)
    run(*first, pointer(grams), *second, squares.data_ptr(), *sizes, threads)
    return squares.sum(1)


def product_gradients(left: Tensor, right: Tensor, keep: bool) -> tuple[Tensor | None, Tensor] | None:
    """`right[n, g].t() @ left[n, g]` for every n and g: shape `[n, g, o, i]`, or None where it is not kept; and the sum
    of its squares, `[n]`, in float64. None where there is no kernel for these tensors.

    Args:
        left: Shape `[n, g, t, i]`.
        right: Shape `[n, g, t, o]`.
        keep: Whether more than the squares is wanted.
    """
    if (library := library_for(left, right)) is None:
        return None
    (n, groups, positions, columns), rows, threads = left.shape, right.shape[3], torch.get_num_threads()
    blocks = library.product_gradient_blocks(n, groups, rows, columns, left.element_size(), threads)
    found = left.new_empty(n, groups, rows, columns) if keep else None
    squares = left.new_empty(n, blocks, dtype=torch.float64)
    factors = *_rows(left), *_rows(right)
    make = typed(library, "product_gradients", left.dtype)
    sizes = (n, groups, positions, rows, columns)
    make(*factors, pointer(found), squares.data_ptr(), *sizes, threads)
    return found, squares.sum(1)


def weighted_sum(pieces: Sequence[Tensor], weights: Tensor) -> Tensor | None:
    """`sum_i weights[i] * value_i` over the examples of all pieces: shape `[*]`; None where there is no kernel for it.

    Args:
        pieces: Each `[examples, *]`.
        weights: Shape `[n]`.
    """
    weights = weights.to(pieces[0].dtype).contiguous()
    if (library := library_for(*pieces, weights)) is None or not all(piece.is_contiguous() for piece in pieces):
        return None
    shape = pieces[0].shape[1:]
    size, dtype = math.prod(shape), pieces[0].dtype
    by_example = size * pieces[0].element_size()
    rows = [piece.data_ptr() + at * by_example for piece in pieces for at in range(len(piece))]
    if len(rows) != len(weights):
        raise ValueError(f"There are {len(rows)} examples and {len(weights)} weights.")
    found = pieces[0].new_empty(shape)
    run = typed(library, "weighted_sum", dtype)
    run((c_void_p * len(rows))(*rows), weights.data_ptr(), found.data_ptr(), len(rows), size, torch.get_num_threads())
    return found


def _contiguous_rows(value: Tensor) -> Tensor:
    return value if value.stride(-1) == 1 else value.contiguous()


def _rows(value: Tensor) -> tuple[int, object]:
    """Of `[n, g, t, features]`: positions in the place of pixels."""
    n, groups, position, feature = value.stride()
    return value.data_ptr(), byref(strides_of((n, groups, feature, position)))
