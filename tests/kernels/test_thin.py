"""Products of many short rows with a small matrix, against a matrix product."""

from __future__ import annotations

import pytest
import torch
from torch.func import vmap

from perexfx.kernels.thin import thin_product

SIZES = [(9, 4), (4, 9), (9, 9), (25, 9), (9, 25), (49, 16), (16, 49), (1, 1), (3, 200), (5, 64), (2, 16), (2, 17)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("inner", "outer"), SIZES)
@pytest.mark.parametrize("rows", [1, 2, 17, 4096, 3 * 4096 + 7])
def test_a_product_and_its_gradient(rows: int, inner: int, outer: int, dtype: torch.dtype) -> None:
    a = torch.randn(rows, inner, dtype=dtype, requires_grad=True)
    matrix = torch.randn(inner, outer, dtype=dtype)
    found = thin_product(a, matrix)
    torch.testing.assert_close(found, a @ matrix)
    gradient = torch.randn_like(found)
    (back,) = torch.autograd.grad(found, a, gradient)
    torch.testing.assert_close(back, gradient @ matrix.t())


def test_any_strides_and_leading_axes() -> None:
    a = torch.randn(9, 5, 6).permute(2, 1, 0)
    matrix = torch.randn(4, 9).t()
    torch.testing.assert_close(thin_product(a, matrix), a @ matrix)
    assert thin_product(torch.zeros(0, 9), matrix).shape == (0, 4)
    half = torch.randn(3, 9, dtype=torch.bfloat16)
    assert torch.equal(thin_product(half, matrix.bfloat16()), half @ matrix.bfloat16())


def test_whoever_maps_over_it_gets_the_product() -> None:
    a, matrix = torch.randn(3, 9, requires_grad=True), torch.randn(9, 4)
    found = thin_product(a, matrix)
    gradients = torch.randn(5, 3, 4)
    each = vmap(lambda g: torch.autograd.grad(found, a, g, retain_graph=True)[0])(gradients)
    torch.testing.assert_close(each, gradients @ matrix.t())
    torch.testing.assert_close(vmap(lambda row: thin_product(row, matrix))(a), a @ matrix)
