"""Kernels of convolutions: against the Python code in their place, and against torch's own in float64."""

from __future__ import annotations

import math
import random
from ctypes import CDLL

import pytest
import torch
from torch import Tensor, nn

import perexfx
from perexfx import kernels
from perexfx.ir.convolution import Convolution
from perexfx.kernels.geometry import ConvolutionGeometry
from perexfx.runtime.memory_formats import in_format
from perexfx.strategies.direct import Direct
from perexfx.strategies.gram import Gram
from perexfx.strategies.gram_shift import GramShift, _fits_kernel
from tests.support.kernels import assert_all_close
from tests.support.losses import squares
from tests.support.marks import needs_kernels
from tests.support.oracle import Batch, assert_close, train_step


def a_convolution(seed: int) -> Convolution:
    """Of random sizes, one or two spatial axes, in any memory format; taps may read nothing but padding."""
    drawn = random.Random(seed)
    torch.manual_seed(seed)
    while True:
        n, frames, groups, rank = (drawn.choice(v) for v in ([1, 2, 5], [1, 1, 3], [1, 1, 2, 3], [1, 2, 2]))
        channels, outputs = groups * drawn.choice([1, 2, 5, 8, 17]), groups * drawn.choice([1, 2, 5, 16, 20, 64, 70])
        if drawn.random() < 0.25:  # every channel has a kernel of its own
            groups = channels = outputs = drawn.choice([2, 5, 16, 20, 64, 70, 150])
        kernel, stride, padding, dilation = (
            tuple(drawn.choice(options) for _ in range(rank))
            for options in ([1, 2, 3, 5], [1, 2, 3], [0, 1, 3], [1, 2])
        )
        size = tuple(drawn.choice([1, 4, 7, 16, 21, 150 if rank == 1 else 26]) for _ in range(rank))
        windows = zip(size, padding, dilation, kernel, stride, strict=True)
        out_size = [(s + 2 * p - d * (k - 1) - 1) // step + 1 for s, p, d, k, step in windows]
        if min(out_size) > 0:
            break
    dtype = drawn.choice([torch.float32, torch.float64])

    def images(channels: int, *size: int) -> Tensor:
        found = torch.randn(n * frames, channels, *size, dtype=dtype)
        if rank == 2 and drawn.random() < 0.5:
            found = in_format(found, torch.channels_last)
        found = found.unflatten(0, (n, frames))
        return found.transpose(0, 1).contiguous().transpose(0, 1) if drawn.random() < 0.2 else found

    x, g = images(channels, *size), images(outputs, *out_size)
    return Convolution(
        x, g, (outputs, channels // groups, *kernel), ConvolutionGeometry(stride, padding, dilation, groups)
    )


def in_float64(factors: Convolution) -> Tensor:
    """Per-example gradients by torch's own convolution."""
    exact = Convolution(factors.layer_input.double(), factors.grad_output.double(), factors.shape, factors.geometry)
    return exact.gradients()


@pytest.mark.parametrize("seed", range(80))
def test_convolutions(seed: int, level: CDLL, calls: list[str]) -> None:
    factors = a_convolution(seed)
    dtype = factors.layer_input.dtype
    exact = in_float64(factors)
    norms = exact.flatten(1).square().sum(1)
    squared, kept = Direct(keep=True).squared_norms(factors)
    assert calls == ["kernel_gradients"]
    assert_all_close(kept.gradients(), exact, dtype)
    assert_all_close(squared, norms, dtype)
    weights = torch.rand(len(norms), dtype=dtype)
    expected = torch.einsum("n,n...->...", weights.double(), exact)
    assert_all_close(kept.weighted_sum(weights), expected, dtype)
    found = kernels.kernel_sum(factors.layer_input, factors.grad_output, weights, factors.shape, factors.geometry)
    assert found is not None
    assert found.is_contiguous()
    assert_all_close(found, expected, dtype)
    if factors.layer_input.shape[1] == 1:
        squared, _ = GramShift().squared_norms(factors)
        assert_all_close(squared, norms, dtype)
        assert math.prod(factors.layer_input.shape[3:]) > 300 or "shifted_squares" in calls


@needs_kernels
def test_convolutions_on_threads(threads: int) -> None:
    for seed in range(8):
        factors = a_convolution(seed)
        squared, kept = Direct(keep=True).squared_norms(factors)
        exact = in_float64(factors)
        assert_all_close(kept.gradients(), exact, factors.layer_input.dtype)
        assert_all_close(squared, exact.flatten(1).square().sum(1), factors.layer_input.dtype)


@needs_kernels
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("is_depthwise", [False, True])
def test_a_convolution_of_an_example_that_is_not_finite(is_depthwise: bool, bad: float, threads: int) -> None:
    """It must not reach the others, whatever memory they share."""
    torch.manual_seed(0)
    x, g = torch.randn(9, 1, 20 if is_depthwise else 5, 8, 8), torch.randn(9, 1, 20, 8, 8)
    geometry = ConvolutionGeometry((1, 1), (1, 1), (1, 1), 20 if is_depthwise else 1)
    factors = Convolution(x, g, (20, 1 if is_depthwise else 5, 3, 3), geometry)
    exact = in_float64(factors)
    for lost, value in ((2, x), (6, g)):
        value[lost, 0, 1, 2, 3] = bad
    others = [0, 1, 3, 4, 5, 7, 8]
    for strategy in (Direct(keep=True), GramShift()):
        squared, _ = strategy.squared_norms(factors)
        assert not torch.isfinite(squared[[2, 6]]).any()
        assert_all_close(squared[others], exact[others].flatten(1).square().sum(1), torch.float32)
    _, kept = Direct(keep=True).squared_norms(factors)
    assert_all_close(kept.gradients()[others], exact[others], torch.float32)


def test_values_that_lie_in_memory_with_the_other_sign() -> None:
    torch.manual_seed(0)
    x = torch.imag(torch.randn(3, 1, 4, 6, 6, dtype=torch.complex64).conj())
    g = torch.randn(3, 1, 5, 6, 6) + 0.5
    assert x.is_neg()
    factors = Convolution(x, g, (5, 4, 3, 3), ConvolutionGeometry((1, 1), (1, 1), (1, 1), 1))
    exact = in_float64(factors)
    for found in (Direct(keep=True).squared_norms(factors)[1].gradients(), factors.gradients()):
        assert_all_close(found, exact, torch.float32)


@pytest.mark.parametrize(
    ("x", "g", "kernel", "dilation", "padding"),
    [
        ((3, 4, 21, 21), (3, 5, 21, 21), (3, 3), 40, 40),  # taps that read nothing but padding
        ((3, 4, 60), (3, 5, 1), (60,), 1, 0),  # a kernel as large as its image
        ((3, 4, 12, 12), (3, 70, 2, 2), (11, 11), 1, 0),
    ],
)
def test_kernels_as_large_as_their_images(
    x: tuple[int, ...], g: tuple[int, ...], kernel: tuple[int, ...], dilation: int, padding: int, threads: int
) -> None:
    torch.manual_seed(0)
    rank = len(kernel)
    geometry = ConvolutionGeometry((1,) * rank, (padding,) * rank, (dilation,) * rank, 1)
    factors = Convolution(torch.randn(x)[:, None], torch.randn(g)[:, None], (g[1], x[1], *kernel), geometry)
    exact = in_float64(factors)
    weights = torch.rand(3)
    for strategy in (Direct(keep=True), GramShift(), Gram()):
        squared, held = strategy.squared_norms(factors)
        assert_all_close(squared, exact.flatten(1).square().sum(1), torch.float32)
        expected = torch.einsum("n,n...->...", weights.double(), exact)
        assert_all_close(held.weighted_sum(weights), expected, torch.float32)


def test_what_one_thread_needs_does_not_grow_with_the_padding() -> None:
    """Grids of the kernel have the padding on them."""
    geometry = ConvolutionGeometry((1, 1), (400, 400), (400, 400), 1)
    factors = Convolution(torch.randn(2, 1, 3, 21, 21), torch.randn(2, 1, 4, 21, 21), (4, 3, 3, 3), geometry)
    assert not _fits_kernel(geometry, (3, 3), (21, 21))
    exact = in_float64(factors)
    assert_all_close(Direct(keep=True).squared_norms(factors)[0], exact.flatten(1).square().sum(1), torch.float32)


@needs_kernels
def test_sums_over_many_positions_keep_their_digits() -> None:
    x, g = torch.full((1, 1, 4, 224, 224), 1.1), torch.full((1, 1, 16, 224, 224), 0.7)
    factors = Convolution(x, g, (16, 4, 3, 3), ConvolutionGeometry((1, 1), (1, 1), (1, 1), 1))
    exact = in_float64(factors)
    found = Direct(keep=True).squared_norms(factors)[1].gradients()
    torch.testing.assert_close(found.double(), exact, rtol=2e-5, atol=0.0)


def test_convolutions_of_three_axes_are_left_to_torch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(4, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(64, 1))
    batch = Batch((torch.randn(3, 4, 4, 4, 4),), torch.randn(3))
    for strategy in ("auto", "gram", "loop_norms"):
        gm = perexfx.transform(model, clip_norm=None, strategy=strategy)
        found = train_step(gm, batch, squares)
        expected = train_step(model, batch, squares)
        assert_close(found, expected, 1e-5, "gradients")


@pytest.mark.parametrize(
    ("groups", "inputs", "outputs", "size"),
    [(1, 40, 64, 8), (1, 40, 64, 20), (1, 40, 50, 8), (16, 40, 8, 4), (4, 40, 24, 4), (8, 20, 16, 4), (4096, 1, 1, 3)],
)
def test_kernel_gradients_that_go_past_the_caches(
    groups: int, inputs: int, outputs: int, size: int, level: CDLL
) -> None:
    """Vectors that end within a group are none that can be stored whole."""
    torch.manual_seed(0)
    x, g = torch.randn(48, 1, groups * inputs, size, size), torch.randn(48, 1, groups * outputs, size, size)
    slide = ConvolutionGeometry((1, 1), (1, 1), (1, 1), groups)
    factors = Convolution(x, g, (groups * outputs, inputs, 3, 3), slide)
    exact = in_float64(factors)
    squared, kept = Direct(keep=True).squared_norms(factors)
    assert_all_close(squared, exact.flatten(1).square().sum(1), torch.float32)
    assert_all_close(kept.gradients(), exact, torch.float32)
