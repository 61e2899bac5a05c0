"""Pooled kernels: on images that are constant on blocks they are the fine layer, on a side or in the mean."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from perexfx.kernels.coarse import at_side, at_side_of, cut, half
from perexfx.kernels.pooled import (
    averaged_kernel,
    coarse_axes,
    coarse_axis,
    mean_axis,
    mean_of_sides,
    pooled_kernel,
    spread_kernel,
    spread_mean,
    taps_of_each,
)

GRID = [
    (taps, stride, padding, dilation)
    for taps, stride, padding, dilation in itertools.product((1, 2, 3, 4, 5, 7), (1, 2, 3), (0, 1, 2, 3), (1, 2, 3, 4))
    if dilation * (taps - 1) <= 14 and (padding <= dilation * (taps - 1) or padding == 0)
]
SIZES = ((24, 20), (23, 17))


def blocks(*size: int) -> Tensor:
    """An image that is constant on blocks of two by two."""
    coarse = torch.randn(2, 4, *half(size), dtype=torch.float64)
    return coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, : size[0], : size[1]]


def coarse_of(image: Tensor) -> Tensor:
    return image[:, :, ::2, ::2]


@pytest.mark.parametrize("slide", GRID)
def test_a_side_is_the_fine_layer_there(slide: tuple[int, int, int, int]) -> None:
    """Exactly, but at edges where the fine image ends inside of a block."""
    taps, stride, padding, dilation = slide
    slides = (slide, slide)
    torch.manual_seed(0)
    weight = torch.randn(4, 2, taps, taps, dtype=torch.float64)
    for size in SIZES:
        image = blocks(*size)
        fine = F.conv2d(image, weight, None, stride, padding, dilation, 2)
        out = half(fine.shape[2:])
        for side in itertools.product((0, 1), repeat=2):
            drawn = torch.tensor(side)
            read, step = at_side(coarse_of(image), drawn, slides, out), coarse_axes(slides)[0].dilation
            found = F.conv2d(read, pooled_kernel(weight, drawn, slides), None, stride, 0, step, 2)
            assert found.shape[2:] == out
            expected = fine[:, :, side[0] :: 2, side[1] :: 2]
            if all(n % 2 == 0 for n in size):
                rows, columns = expected.shape[2:]
                torch.testing.assert_close(found[:, :, :rows, :columns], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("slide", GRID)
def test_the_mean_over_sides_is_the_mean_of_the_fine_layer(slide: tuple[int, int, int, int]) -> None:
    taps, stride, padding, dilation = slide
    torch.manual_seed(0)
    weight, image = torch.randn(4, 2, taps, taps, dtype=torch.float64), blocks(24, 20)
    fine = F.conv2d(image, weight, None, stride, padding, dilation, 2)
    first, size, step = mean_axis(slide)
    out = half(fine.shape[2:])
    read = cut(coarse_of(image), (first, first), tuple((o - 1) * stride + step * (size - 1) + 1 for o in out))
    found = F.conv2d(read, mean_of_sides(weight, (slide, slide)), None, stride, 0, step, 2)
    whole = fine[:, :, : fine.shape[2] // 2 * 2, : fine.shape[3] // 2 * 2]
    expected = F.avg_pool2d(whole, 2)
    torch.testing.assert_close(found[:, :, : expected.shape[2], : expected.shape[3]], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("slide", [(2, 2, 0, 1), (3, 2, 1, 1), (4, 2, 1, 1), (3, 1, 1, 1)])
@pytest.mark.parametrize("side", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_transposed_is_the_adjoint(slide: tuple[int, int, int, int], side: tuple[int, int]) -> None:
    """`<spread(y), x> = <y, read(x)>`: what a side spreads is the transpose of what it reads."""
    slides, drawn = (slide, slide), torch.tensor(side)
    stride = slide[1]
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    weight = torch.randn(5, 3, slide[0], slide[0], dtype=torch.float64)
    kernel = pooled_kernel(weight, drawn, slides)
    out = (8 // stride, 8 // stride)
    read = F.conv2d(at_side(x, drawn, slides, out), kernel, None, stride)
    y = torch.randn_like(read)
    spread = at_side_of(F.conv_transpose2d(y, kernel, None, stride), drawn, slides, (8, 8))
    torch.testing.assert_close((spread * x).sum(), (read * y).sum())


def test_taps_are_counted() -> None:
    slides = ((3, 1, 1, 1), (5, 1, 2, 1))
    assert taps_of_each(torch.tensor([0, 0]), slides, 0).tolist() == [1, 2]
    assert taps_of_each(torch.tensor([1, 0]), slides, 0).tolist() == [2, 1]
    assert taps_of_each(torch.tensor([0, 0]), slides, 1).tolist() == [2, 2, 1]
    weight = torch.ones(1, 1, 3, 5)
    assert torch.equal(averaged_kernel(weight, torch.tensor([0, 1]), slides), torch.ones(1, 1, 2, 3))


def test_even_dilations_pool_nothing() -> None:
    assert coarse_axis(3, 1, 2, 2).is_whole
    assert coarse_axis(3, 1, 4, 4).dilation == 2
    assert not coarse_axis(3, 1, 3, 3).is_whole
    assert coarse_axis(1, 2, 0, 1).lows == (0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("slide", [(3, 1, 1, 1), (4, 2, 1, 1), (7, 2, 3, 1), (1, 2, 0, 1), (3, 1, 3, 3)])
def test_spreading_is_the_transpose_of_pooling(slide: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    slides, side = (slide, (5, 1, 2, 1)), torch.tensor([1, 0])
    weight = torch.randn(3, 2, slide[0], 5, dtype=dtype, requires_grad=True)
    for pool, spread in (
        (lambda w: pooled_kernel(w, side, slides), lambda g: spread_kernel(g, side, slides)),
        (lambda w: mean_of_sides(w, slides), lambda g: spread_mean(g, slides)),
    ):
        value = pool(weight)
        gradient = torch.randn(4, *value.shape, dtype=dtype)
        each = [torch.autograd.grad(value, weight, g, retain_graph=True)[0] for g in gradient]
        torch.testing.assert_close(spread(gradient), torch.stack(each))
