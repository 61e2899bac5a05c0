"""Coarse images: eager and traced forms agree; pools and edges."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from perexfx.kernels.coarse import (
    at_side,
    at_side_of,
    coarse_avg_pool,
    coarse_max_pool,
    grow,
    half,
    pool_windows,
    shrink,
)
from perexfx.kernels.pooled import averaged_kernel, mean_of_sides, pooled_kernel

SLIDES = ((3, 2, 1, 1), (4, 1, 1, 1))


@pytest.mark.parametrize("side", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_trace_holds_for_every_side(side: tuple[int, int]) -> None:
    """Whoever traces sees indices in the place of numbers: the graph of one side is that of all."""
    image, weight = torch.randn(2, 3, 7, 6), torch.randn(5, 3, 3, 4)

    def both(side: torch.Tensor) -> tuple[torch.Tensor, ...]:
        read = at_side(image, side, SLIDES, (4, 3))
        spread = at_side_of(image, side, SLIDES, (9, 8))
        return read, spread, pooled_kernel(weight, side, SLIDES), averaged_kernel(weight, side, SLIDES)

    traced = make_fx(both)(torch.tensor([0, 0]))
    for found, expected in zip(traced(torch.tensor(side)), both(torch.tensor(side)), strict=True):
        torch.testing.assert_close(found, expected)
    of_mean = make_fx(lambda w: mean_of_sides(w, SLIDES))(weight)
    torch.testing.assert_close(of_mean(weight), mean_of_sides(weight, SLIDES))


def test_nothing_that_is_kept_comes_from_a_run_without_numbers() -> None:
    weight, side, slides = torch.randn(2, 2, 3, 3), torch.tensor([1, 1]), ((3, 1, 1, 1), (3, 3, 0, 1))
    with FakeTensorMode(allow_non_fake_inputs=True):
        pooled_kernel(weight, side, slides), mean_of_sides(weight, slides)
    with torch.inference_mode():
        pooled_kernel(weight, side, slides), mean_of_sides(weight, slides)
    w = weight.requires_grad_()
    (pooled_kernel(w, side, slides).sum() + mean_of_sides(w, slides).sum()).backward()
    assert w.grad is not None
    assert torch.equal(w.grad, torch.full_like(w, 2))


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 4)])
def test_shrunk_and_grown(size: tuple[int, int]) -> None:
    image = torch.rand(2, 3, *size)
    assert shrink(image, "average").shape[2:] == half(size)
    assert torch.equal(shrink(image, "max"), F.max_pool2d(image, 2, ceil_mode=True))
    coarse = torch.rand(2, 3, *half(size))
    grown = grow(coarse, size)
    assert grown.shape[2:] == size
    assert torch.equal(grown[:, :, ::2, ::2], coarse)
    torch.testing.assert_close(shrink(grown, "average"), coarse)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (3, 3, 0), (3, 2, 1), (3, 1, 1), (2, 1, 0)])
@pytest.mark.parametrize("size", [(12, 12), (13, 11), (6, 7)])
def test_pools_have_half_the_size_and_hold_real_pixels(
    kernel: int, stride: int, padding: int, size: tuple[int, int]
) -> None:
    windows, counts = pool_windows((kernel,) * 2, (stride,) * 2, (padding,) * 2, (1, 1))
    for ceil_mode in (False, True):
        fine = F.max_pool2d(torch.zeros(1, 1, *size), kernel, stride, padding, ceil_mode=ceil_mode)
        out = half(fine.shape[2:])
        image = torch.rand(2, 3, *half(size))
        largest = coarse_max_pool(image, windows, out)
        assert largest.shape[2:] == out
        assert bool((largest >= 0).all())  # -inf would be a window of nothing but padding
        mean = coarse_avg_pool(torch.ones_like(image), windows, counts, out)
        assert mean.shape[2:] == out
        assert float(mean.max()) <= 1 + 1e-6
    if kernel == stride:
        torch.testing.assert_close(mean, torch.ones_like(mean))


def test_a_mean_over_blocks_is_the_fine_one() -> None:
    coarse = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    fine = F.avg_pool2d(grow(coarse, (12, 12)), 2)
    windows, counts = pool_windows((2, 2), (2, 2), (0, 0), (1, 1))
    torch.testing.assert_close(coarse_avg_pool(coarse, windows, counts, (3, 3)), F.avg_pool2d(fine, 2))
