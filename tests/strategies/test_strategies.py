"""Every strategy on random factors: against the gradients from their definition."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from perexfx.ir.convolution import Convolution
from perexfx.ir.factors import Factors, Gradient, Product, Rows
from perexfx.kernels.geometry import ConvolutionGeometry
from perexfx.strategies import STRATEGIES

small = st.integers(1, 4)


@st.composite
def products(draw: st.DrawFn) -> Product:
    n, g, t, i, o = draw(st.integers(0, 4)), draw(small), draw(small), draw(small), draw(small)
    return Product(_randn(n, g, t, i), _randn(n, g, t, o), (g * o, i))


@st.composite
def rows(draw: st.DrawFn) -> Rows:
    n, t, v, d = draw(st.integers(0, 4)), draw(st.integers(0, 6)), draw(small), draw(small)
    return Rows(torch.randint(0, v, (n, t)), _randn(n, t, d), v, draw(st.integers(-1, v - 1)))


@st.composite
def convolutions(draw: st.DrawFn) -> Convolution:
    rank, n, frames, groups = draw(st.integers(1, 3)), draw(st.integers(0, 3)), draw(st.integers(1, 2)), draw(small)
    channels, out = draw(st.integers(1, 2)) * groups, draw(st.integers(1, 2)) * groups
    slide, kernel, size, out_size = [], [], [], []
    for _ in range(rank):
        k, stride, dilation, padding = draw(st.integers(1, 3)), draw(small), draw(st.integers(1, 3)), draw(small) - 1
        reach = dilation * (k - 1) + 1
        length = max(1, reach - 2 * padding) + draw(st.integers(0, 4))
        slide.append((stride, padding, dilation))
        kernel.append(k)
        size.append(length)
        out_size.append((length + 2 * padding - reach) // stride + 1)
    strides, paddings, dilations = zip(*slide, strict=True)
    return Convolution(
        _randn(n, frames, channels, *size),
        _randn(n, frames, out, *out_size),
        (out, channels // groups, *kernel),
        ConvolutionGeometry(strides, paddings, dilations, groups),
    )


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def reference(factors: Factors) -> Tensor:
    """Per-example gradients, from the definition."""
    if isinstance(factors, Product):
        return torch.einsum("ngti,ngto->ngoi", factors.left, factors.right).reshape(-1, *factors.shape)
    if isinstance(factors, Rows):
        one_hot = torch.nn.functional.one_hot(factors.ids, factors.v).double()
        table = torch.einsum("ntv,ntd->nvd", one_hot, factors.right)
        if factors.padding_idx >= 0:
            table[:, factors.padding_idx] = 0
        return table
    assert isinstance(factors, Convolution)
    slide = factors.geometry
    kernel = torch.zeros(factors.shape, dtype=torch.float64, requires_grad=True)
    convolve = (torch.conv1d, torch.conv2d, torch.conv3d)[len(slide.stride) - 1]
    each = [
        torch.autograd.grad(
            convolve(x, kernel, None, slide.stride, slide.padding, slide.dilation, slide.groups), kernel, g
        )
        for x, g in zip(factors.layer_input, factors.grad_output, strict=True)
    ]
    return torch.stack([g for (g,) in each]) if each else torch.zeros(0, *factors.shape, dtype=torch.float64)


@settings(max_examples=300, deadline=None)
@given(st.one_of(products(), rows(), convolutions()))
def test_every_strategy_on_random_factors(factors: Factors) -> None:
    expected = reference(factors)
    signature = factors.signature
    weights = torch.rand(signature.n, dtype=torch.float64)
    clipped = torch.tensordot(weights, expected, dims=1)
    torch.testing.assert_close(factors.gradients(), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(factors.weighted_sum(weights), clipped, rtol=1e-9, atol=1e-9)
    for strategy in STRATEGIES:
        if strategy.refuses(signature) is not None:
            continue
        strategy.cost(signature, itemsize=8)
        squared, held = strategy.squared_norms(factors)
        torch.testing.assert_close(squared, expected.flatten(1).square().sum(1), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(held.weighted_sum(weights), clipped, rtol=1e-9, atol=1e-9)


@given(st.one_of(products(), rows(), convolutions()), st.data())
@settings(max_examples=60, deadline=None)
def test_dropped_examples_count_as_zero_whatever_they_hold(factors: Factors, data: st.DataObject) -> None:
    n = factors.signature.n
    dropped = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), dtype=torch.bool)
    weights = torch.rand(n, dtype=torch.float64).masked_fill(dropped, 0)
    expected = factors.weighted_sum(weights)
    for name in ("left", "right", "layer_input", "grad_output"):
        if hasattr(factors, name):
            getattr(factors, name)[dropped] = float("inf")
    torch.testing.assert_close(factors.without(dropped).weighted_sum(weights), expected, rtol=1e-9, atol=1e-9)
    kept = Gradient(torch.full((n, 2), float("nan"), dtype=torch.float64)).without(dropped)
    assert bool(kept.value[dropped].eq(0).all())
