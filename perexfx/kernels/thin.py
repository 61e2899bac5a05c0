"""Products of many short rows with one small matrix, many times as fast as a matrix product of such sizes is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from perexfx.kernels.loading import typed
from perexfx.kernels.tensors import library_for


def thin_product(rows: Tensor, matrix: Tensor) -> Tensor:
    """`rows @ matrix`, of shapes `[..., k]` and `[k, m]`, as a step of autograd in the rows.

    By a kernel in C++ where there is one for these tensors; whoever traces, or maps over it, sees a matrix product.
    """
    if library_for(rows, matrix) is None or not 0 < matrix.shape[1] <= _most(rows):
        return rows @ matrix
    return _ThinProduct.apply(rows, matrix)


def _most(rows: Tensor) -> int:
    library = library_for(rows)
    return 0 if library is None else library.thin_product_most(rows.element_size())


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    library = library_for(rows, matrix)
    if library is None or not 0 < matrix.shape[1] <= _most(rows):
        return rows @ matrix
    rows, matrix = rows.contiguous(), matrix.contiguous()
    *lead, inner = rows.shape
    found = rows.new_empty(*lead, matrix.shape[1])
    multiply = typed(library, "thin_product", rows.dtype)
    count = rows.numel() // inner
    multiply(
        rows.data_ptr(), matrix.data_ptr(), found.data_ptr(), count, inner, matrix.shape[1], torch.get_num_threads()
    )
    return found


class _ThinProduct(Function):
    """The product; its backward is one with the transposed matrix."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrix: Tensor) -> Tensor:
        ctx.matrix = matrix
        return _product(rows, matrix)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides names)
        return _product(grad_outputs[0], ctx.matrix.t()), None


__all__ = ["thin_product"]
