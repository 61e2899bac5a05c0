"""Properties of the parts: layouts, tags, factors and strategies on random shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from perexfx.analysis.tags import Mixing, layout_of, tags_of
from perexfx.ir.convolution import Convolution
from perexfx.ir.factors import Factors, Gradient, Product, Rows, SharedGram, squared_norms_of
from perexfx.ir.layout import Layout
from perexfx.ir.schemas import all_arguments, arguments_by_name, names_written
from perexfx.kernels.geometry import ConvolutionGeometry
from perexfx.kernels.watched import is_watched
from perexfx.layers.convolution import _input_gradient
from perexfx.strategies import STRATEGIES, Gram

small = st.integers(1, 4)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, tuple[int, ...], int]:
    """A layout, a shape that has it, and the number of examples."""
    n, before, after = draw(st.integers(0, 5)), draw(small), draw(small)
    shape = draw(st.lists(small, min_size=0, max_size=3))
    axis = draw(st.integers(0, len(shape)))
    return Layout(axis, before, after), (*shape[:axis], before * n * after, *shape[axis:]), n


@given(layouts())
def test_examples_first(drawn: tuple[Layout, tuple[int, ...], int]) -> None:
    layout, shape, n = drawn
    value = torch.randn(shape)
    first = layout.examples_first(value)
    assert first.shape[:2] == (n, layout.repeats)
    assert torch.equal(first.flatten().sort().values, value.flatten().sort().values)
    if n:
        tags = layout.examples_first(tags_of(layout, shape, n))
        expected = torch.arange(1.0, n + 1).view(-1, *[1] * (tags.dim() - 1))
        assert torch.equal(tags, expected.expand_as(tags))


@given(layouts())
def test_tags_tell_the_layout(drawn: tuple[Layout, tuple[int, ...], int]) -> None:
    layout, shape, n = drawn
    if n < 2:
        return
    tags = tags_of(layout, shape, n)
    assert layout_of(tags, n) == layout
    assert layout_of(tags.contiguous(), n) == layout
    with pytest.raises(Mixing):
        layout_of(tags.flip(layout.axis), n)


@given(layouts(), st.integers(0, 3))
def test_elements_of_no_example_go_with_the_others(drawn: tuple[Layout, tuple[int, ...], int], amount: int) -> None:
    layout, shape, n = drawn
    if n < 2 or layout.axis == len(shape) - 1:
        return
    padded = torch.nn.functional.pad(tags_of(layout, shape, n), (amount, amount))
    assert layout_of(padded, n) == layout


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


def test_norms_of_large_gradients_are_accurate_in_float32() -> None:
    torch.manual_seed(0)
    gradients = torch.randn(2, 3_000_001)
    expected = gradients.double().square().sum(1)
    torch.testing.assert_close(squared_norms_of(gradients).double(), expected, rtol=1e-6, atol=0)
    wide = Convolution(
        torch.randn(2, 1, 512, 4, 4),
        torch.randn(2, 1, 512, 4, 4),
        (512, 512, 3, 3),
        ConvolutionGeometry((1, 1), (1, 1), (1, 1), 1),
    )
    doubled = Convolution(wide.layer_input.double(), wide.grad_output.double(), wide.shape, wide.geometry)
    expected = doubled.gradients().flatten(1).square().sum(1)
    for strategy in STRATEGIES:
        if strategy.refuses(wide.signature) is None:
            squared, _ = strategy.squared_norms(wide)
            torch.testing.assert_close(squared.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("t", [63, 64, 65, 130])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_grams_without_their_lower_quarter(n: int, t: int) -> None:
    torch.manual_seed(0)
    right, shared = torch.randn(n, 1, t, 6).double(), SharedGram(2)
    for features in (2, 5):
        factors = Product(torch.randn(n, 1, t, features).double(), right, (6, features), right_gram=shared)
        expected = squared_norms_of(factors.gradients())
        for product in (factors, Product(factors.left, right, factors.shape)):
            torch.testing.assert_close(Gram().squared_norms(product)[0], expected)
    opposite = Product(torch.ones(1, 1, t, 1), torch.tensor([1.0, -1.0]).repeat(65)[:t].reshape(1, 1, t, 1), (1, 1))
    assert Gram().squared_norms(opposite)[0] >= 0


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("stride", [(2,), (3, 1), (2, 3), (1, 2, 2)])
def test_input_gradients_of_strided_pixels(stride: tuple[int, ...], last: bool) -> None:
    torch.manual_seed(0)
    rank = len(stride)
    x = torch.randn(2, 3, *(7, 8, 5)[:rank]).double()
    if last and rank == 2:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    weight = torch.randn(4, 3, *[1] * rank).double()
    output = (torch.conv1d, torch.conv2d, torch.conv3d)[rank - 1](x, weight, None, stride)
    grad_output = torch.randn_like(output)
    (expected,) = torch.autograd.grad(output, x, grad_output)
    geometry = ConvolutionGeometry(stride, (0,) * rank, (1,) * rank, 1)
    found = _input_gradient(grad_output, x.detach(), weight, geometry)
    torch.testing.assert_close(found, expected)
    assert found.stride() == x.stride()


def test_who_watches_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An export that failed leaves torch's own flag set."""
    monkeypatch.setattr("torch.utils._python_dispatch._is_in_torch_dispatch_mode", True)
    assert not is_watched()
    with TorchDispatchMode():
        assert is_watched()
    assert not is_watched()


def test_arguments_have_the_names_of_the_schema() -> None:
    mean, add, into = torch.ops.aten.mean.dim, torch.ops.aten.add.Tensor, torch.ops.aten.add.out
    assert arguments_by_name(mean, ("x",), {"dim": [0]}) == {"self": "x", "dim": [0]}
    assert all_arguments(mean, ("x", [0]), {}) == {"self": "x", "dim": [0], "keepdim": False, "dtype": None}
    assert list(all_arguments(add, ("x",), {"alpha": 2, "other": "y"})) == ["self", "other", "alpha"]
    assert names_written(add) == []
    assert names_written(into) == ["out"]
