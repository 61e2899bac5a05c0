"""Kernels in C++: against the Python code in their place, and against one example at a time in float64."""

from __future__ import annotations

import logging
import math
import random
import shutil
from collections.abc import Iterator
from ctypes import CDLL
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import perexfx
from perexfx import kernels
from perexfx.ir.convolution import Convolution
from perexfx.ir.factors import Product, SharedGram
from perexfx.ir.kept import Kept
from perexfx.kernels import loading
from perexfx.kernels.geometry import ConvolutionGeometry
from perexfx.runtime.formats import in_format
from perexfx.strategies.direct import Direct
from perexfx.strategies.gram import Gram
from perexfx.strategies.gram_shift import GramShift, _fits_kernel
from tests.support.cases_recurrent import Whole
from tests.support.marks import needs_kernels
from tests.support.oracle import Batch, assert_close, norms_of, one_at_a_time, train_step, weighted

LEVELS = {"avx512": ("AVX512",), "avx2": ("AVX512", "AVX2")}
"""Library -> the capabilities of a processor, as torch names them, that can run it."""


@needs_kernels
def test_the_best_is_taken() -> None:
    assert kernels.level() == {"AVX512": "avx512", "AVX2": "avx2"}[torch.backends.cpu.get_cpu_capability()]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CDLL:
    """Every library that this processor can run, in turn."""
    if torch.backends.cpu.get_cpu_capability() not in LEVELS[request.param]:
        pytest.skip("this processor has no such vectors")
    path = loading.FOLDER / f"{request.param}.kernels"
    if not path.exists():
        pytest.skip("kernels are built where there is a compiler with OpenMP")
    library = loading.load(path)
    assert library is not None
    monkeypatch.setattr("perexfx.kernels.tensors.loaded", lambda: library)
    return library


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that ran."""
    ran: list[str] = []
    for name in kernels.__all__:
        original = getattr(kernels, name)
        if not callable(original) or name in ("are_built", "are_for", "for_sizes", "level"):
            continue

        def run(*args: object, original=original, name=name) -> object:
            found = original(*args)
            if found is not None:
                ran.append(name)
            return found

        monkeypatch.setattr(kernels, name, run)
    monkeypatch.setattr("perexfx.layers.lstm.lstm_steps_back", kernels.lstm_steps_back)
    return ran


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (3, 5, 7), (2, 8, 16), (4, 17, 33), (3, 31, 130), (5, 64, 300), (1, 40, 257), (2, 100, 20)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_matrices(sizes: tuple[int, int, int], dtype: torch.dtype, threads: int, level: CDLL) -> None:
    torch.manual_seed(0)
    n, t, size = sizes
    for rows in (
        torch.randn(n, t, size, dtype=dtype),
        torch.randn(t, n, size, dtype=dtype).transpose(0, 1),
        torch.randn(n, t, size + 3, dtype=dtype)[..., 1:-2],
    ):
        found = kernels.gram(rows)
        assert found is not None
        exact = rows.double() @ rows.double().transpose(1, 2)
        tolerance = 1e-6 if dtype == torch.float32 else 1e-14
        torch.testing.assert_close(found.double(), exact, rtol=0.0, atol=tolerance * float(exact.abs().max()))
        assert torch.equal(found, found.transpose(1, 2))


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


def assert_all_close(found: Tensor, exact: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> None:
    """Args: scale: What errors are held against, if not the largest number."""
    tolerance = 3e-5 if dtype == torch.float32 else 1e-12
    largest = float((exact if scale is None else scale).abs().max())
    torch.testing.assert_close(found.double(), exact, rtol=0.0, atol=tolerance * max(1e-30, largest))


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


@pytest.mark.parametrize("sizes", [(3, 64, 9, 32), (2, 6, 3, 1), (1, 17, 20, 17), (5, 12, 1, 3), (2, 40, 33, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("is_affine", [True, False])
def test_group_norms(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, is_affine: bool, threads: int, level: CDLL
) -> None:
    torch.manual_seed(0)
    n, channels, size, groups = sizes
    x = in_format(3 * torch.randn(n, channels, size, size, dtype=dtype) + 5, torch.channels_last)
    g = in_format(torch.randn(n, channels, size, size, dtype=dtype), torch.channels_last)
    weight, bias = torch.randn(2, channels, dtype=dtype) if is_affine else (None, None)
    forward = kernels.group_norm(x, weight, bias, groups, 1e-5)
    assert forward is not None
    backward = kernels.group_norm_back(g, x, weight, *forward[1:])
    assert backward is not None
    exact = x.double().contiguous().requires_grad_()
    scale = torch.ones(n, channels, dtype=torch.float64) if weight is None else weight.double().repeat(n, 1)
    shift = torch.zeros(n, channels, dtype=torch.float64) if bias is None else bias.double().repeat(n, 1)
    scale.requires_grad_(), shift.requires_grad_()
    y = nn.functional.group_norm(exact, groups) * scale[..., None, None] + shift[..., None, None]
    y.backward(g.double())
    for found, expected in zip((forward[0], *backward), (y.detach(), exact.grad, scale.grad, shift.grad), strict=True):
        assert expected is not None
        assert_all_close(found, expected, dtype)
    assert forward[0].is_contiguous(memory_format=torch.channels_last)


def test_values_that_lie_in_memory_with_the_other_sign() -> None:
    torch.manual_seed(0)
    x = torch.imag(torch.randn(3, 1, 4, 6, 6, dtype=torch.complex64).conj())
    g = torch.randn(3, 1, 5, 6, 6) + 0.5
    assert x.is_neg()
    factors = Convolution(x, g, (5, 4, 3, 3), ConvolutionGeometry((1, 1), (1, 1), (1, 1), 1))
    exact = in_float64(factors)
    for found in (Direct(keep=True).squared_norms(factors)[1].gradients(), factors.gradients()):
        assert_all_close(found, exact, torch.float32)


def test_mixed_dtypes_are_left_to_torch() -> None:
    x = in_format(torch.randn(2, 4, 3, 3), torch.channels_last)
    assert kernels.group_norm(x, torch.ones(4, dtype=torch.float64), None, 2, 1e-5) is None


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


def a_product(seed: int) -> Product:
    """Of random sizes, in any memory format."""
    drawn = random.Random(seed)
    torch.manual_seed(seed)
    n, g = drawn.choice([1, 2, 5]), drawn.choice([1, 1, 3])
    t = drawn.choice([1, 3, 16, 64, 197, 256, 257, 700])
    i, o = (drawn.choice([1, 3, 6, 16, 31, 64, 65, 130, 300]) for _ in range(2))
    dtype = drawn.choice([torch.float32, torch.float64])

    def factor(features: int) -> Tensor:
        sizes = {"n": n, "g": g, "t": t, "f": features}
        order = drawn.sample("ngtf", 4) if drawn.random() < 0.5 else list("ngtf")
        found = torch.randn([sizes[axis] for axis in order], dtype=dtype)
        found = found.permute([order.index(axis) for axis in "ngtf"])
        if drawn.random() < 0.2:
            found = torch.randn(n, g, t, features + 5, dtype=dtype)[..., 2:-3]
        return found[:1, :1].expand(n, g, t, features) if drawn.random() < 0.1 else found

    return Product(factor(i), factor(o), (g * o, i))


def product_in_float64(factors: Product) -> Tensor:
    """Per-example gradients by torch's own product."""
    each = factors.right.double().transpose(2, 3) @ factors.left.double()
    return each.reshape(each.shape[0], *factors.shape)


def entries_of_grams(factors: Product) -> Tensor:
    """The most that products of the entries of both Gram matrices add up to: they have both signs, and may cancel."""
    norms = [
        (value.double() @ value.double().transpose(2, 3)).flatten(1).norm(dim=1)
        for value in (factors.left, factors.right)
    ]
    return norms[0] * norms[1]


@pytest.mark.parametrize("seed", range(80))
def test_products(seed: int, level: CDLL, calls: list[str]) -> None:
    factors = a_product(seed)
    dtype = factors.left.dtype
    exact = product_in_float64(factors)
    norms = exact.flatten(1).square().sum(1)
    weights = torch.rand(len(norms), dtype=dtype)
    expected = torch.einsum("n,n...->...", weights.double(), exact)
    for strategy in (Direct(keep=True), Direct(keep=False), Gram()):
        squared, held = strategy.squared_norms(factors)
        assert squared.dtype == dtype
        scale = entries_of_grams(factors) if isinstance(strategy, Gram) else norms
        assert_all_close(squared, norms, dtype, scale)
        assert_all_close(held.weighted_sum(weights), expected, dtype)
        if isinstance(held, Kept):
            assert_all_close(held.gradients(), exact, dtype)
    assert calls == ["product_gradients", "weighted_sum", "product_gradients", "gram_norms"]


@needs_kernels
def test_products_on_threads(threads: int) -> None:
    for seed in range(80, 100):
        factors = a_product(seed)
        exact = product_in_float64(factors)
        for strategy in (Direct(keep=True), Direct(keep=False), Gram()):
            squared, _ = strategy.squared_norms(factors)
            scale = entries_of_grams(factors)
            assert_all_close(squared, exact.flatten(1).square().sum(1), factors.left.dtype, scale)


@pytest.mark.parametrize(("i", "o"), [(64, 96), (100, 70), (7, 640)])
@pytest.mark.parametrize("t", [100, 300])
@pytest.mark.parametrize("n", [1, 40, 300])
def test_gradients_that_go_past_the_caches(i: int, o: int, t: int, n: int, level: CDLL) -> None:
    """Those of more than 4 MB whose rows fill vectors: some of these are, some are in several pieces, some neither."""
    torch.manual_seed(0)
    factors = Product(torch.randn(n, 1, t, i), torch.randn(n, 1, t, o), (o, i))
    exact = product_in_float64(factors)
    squared, kept = Direct(keep=True).squared_norms(factors)
    assert_all_close(squared, exact.flatten(1).square().sum(1), torch.float32)
    assert_all_close(kept.gradients(), exact, torch.float32)
    weights = torch.rand(n)
    expected = torch.einsum("n,n...->...", weights.double(), exact)
    assert_all_close(kept.weighted_sum(weights), expected, torch.float32)


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


@needs_kernels
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_a_product_of_an_example_that_is_not_finite(bad: float, threads: int) -> None:
    """It must not reach the others, whatever memory they share; nor be lost itself."""
    torch.manual_seed(0)
    x, g = torch.randn(9, 1, 70, 33), torch.randn(9, 1, 70, 50)
    factors = Product(x, g, (50, 33))
    exact = product_in_float64(factors)
    x[2, 0, 69, 32] = g[6, 0, 0, 1] = bad
    others = [0, 1, 3, 4, 5, 7, 8]
    for strategy in (Direct(keep=True), Direct(keep=False), Gram()):
        squared, _ = strategy.squared_norms(factors)
        assert not torch.isfinite(squared[[2, 6]]).any()
        assert_all_close(squared[others], exact[others].flatten(1).square().sum(1), torch.float32)
    _, kept = Direct(keep=True).squared_norms(factors)
    assert_all_close(kept.gradients()[others], exact[others], torch.float32)


@needs_kernels
def test_norms_next_to_the_largest_number() -> None:
    """Entries of one matrix may be as large as numbers get; an example with larger ones is lost, and alone."""
    left, right = torch.full((1, 2, 1), 1.5e19), torch.full((1, 2, 1), 1e-15)
    found = kernels.gram_norms(left, None, right)
    assert found is not None
    torch.testing.assert_close(found, torch.tensor([9e8], dtype=torch.float64), rtol=1e-6, atol=0.0)
    for t in (1, 3, 4, 9):
        x = torch.rand(3, 1, t, 8)
        x[0] *= 1e20
        for strategy in (Direct(keep=True), Direct(keep=False), Gram()):
            squared, _ = strategy.squared_norms(Product(x, torch.ones(3, 1, t, 8), (8, 8)))
            assert not torch.isfinite(squared[0])
            assert torch.isfinite(squared[1:]).all()


@needs_kernels
def test_a_product_both_of_whose_gram_matrices_are_shared() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(2, 1, 6, 4), torch.randn(2, 1, 6, 5)
    of_left, of_right = SharedGram(1, left), SharedGram(2)
    Gram().squared_norms(Product(torch.randn(2, 1, 6, 3), right, (5, 3), right_gram=of_right))
    both = Product(left, right, (5, 4), left_gram=of_left, right_gram=of_right)
    squared, _ = Gram().squared_norms(both)
    assert_all_close(squared, product_in_float64(both).flatten(1).square().sum(1), torch.float32)
    assert of_left._value is None
    assert of_right._value is None


@needs_kernels
def test_under_vmap_torch_computes() -> None:
    left, right = torch.randn(2, 3, 1, 6, 4), torch.randn(2, 3, 1, 6, 5)

    def found(left: Tensor, right: Tensor) -> Tensor:
        assert kernels.product_gradients(left, right, True) is None
        assert kernels.weighted_sum([left], left[:, 0, 0, 0]) is None
        assert kernels.gram_norms(left[:, 0], None, right[:, 0]) is None
        return left.sum()

    torch.vmap(found)(left, right)


@needs_kernels
def test_products_over_many_positions_keep_their_digits() -> None:
    factors = Product(torch.full((2, 1, 100_000, 3), 1.1), torch.full((2, 1, 100_000, 16), 0.7), (16, 3))
    exact = product_in_float64(factors)
    for keep in (True, False):
        squared, held = Direct(keep).squared_norms(factors)
        torch.testing.assert_close(squared.double(), exact.flatten(1).square().sum(1), rtol=2e-5, atol=0.0)
        if isinstance(held, Kept):
            torch.testing.assert_close(held.gradients().double(), exact, rtol=2e-5, atol=0.0)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 2, 5), (40, 200, 6), (130, 7, 64), (2, 1030, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_from_gram_matrices(sizes: tuple[int, int, int], dtype: torch.dtype, threads: int, level: CDLL) -> None:
    """One matrix at hand or none; few long examples are cut into ranges of rows."""
    torch.manual_seed(0)
    n, t, size = sizes
    left, right = torch.randn(n, t, 37, dtype=dtype), torch.randn(t, n, size, dtype=dtype).transpose(0, 1)
    exact = (right.double().transpose(1, 2) @ left.double()).flatten(1).square().sum(1)
    grams = kernels.gram(left)
    for found in (kernels.gram_norms(left, None, right), kernels.gram_norms(None, grams, right)):
        assert found is not None
        assert_all_close(found, exact, dtype)


@pytest.mark.parametrize("counts", [(1,), (3,), (8,), (5, 12), (1, 1, 1), (8, 8, 3)])
@pytest.mark.parametrize("shape", [(), (1,), (17,), (40, 100), (3, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weighted_sums(counts: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype, level: CDLL) -> None:
    torch.manual_seed(0)
    pieces = tuple(torch.randn(count, *shape, dtype=dtype) for count in counts)
    weights = torch.rand(sum(counts))
    found = kernels.weighted_sum(pieces, weights)
    assert found is not None
    expected = torch.einsum("n,n...->...", weights.to(dtype).double(), torch.cat(pieces).double())
    assert_all_close(found, expected, dtype)


def test_weighted_sums_of_other_layouts_are_left_to_torch() -> None:
    weights = torch.ones(3)
    assert kernels.weighted_sum([torch.randn(3, 4)], torch._neg_view(weights)) is None
    with pytest.raises(ValueError, match="3 examples and 2 weights"):
        kernels.weighted_sum([torch.randn(3, 4)], weights[:2])
    assert kernels.weighted_sum([torch.randn(4, 3).t()], weights) is None
    assert kernels.weighted_sum([torch.randn(2, 4), torch.randn(4, 1).t()[:, :4].expand(1, 4)[:0]], weights[:2]) is None
    assert kernels.weighted_sum([torch.randn(3, 4, dtype=torch.bfloat16)], weights) is None


@pytest.mark.parametrize(("i", "o"), [(5000, 12), (12, 5000), (12, 20), (5000, 4200)])
@pytest.mark.parametrize("t", [7, 64, 65])
def test_norms_where_a_kernel_makes_one_gram_matrix_and_not_the_other(t: int, i: int, o: int) -> None:
    torch.manual_seed(0)
    left, others, right = torch.randn(3, 1, t, i), torch.randn(3, 1, t, 5), torch.randn(3, 1, t, o)
    shared = SharedGram(2)
    for factor in (left, others):
        product = Product(factor, right, (o, factor.shape[3]), right_gram=shared)
        found, _ = Gram().squared_norms(product)
        exact = torch.einsum("ngti,ngto->noi", factor.double(), right.double()).flatten(1).square().sum(1)
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0.0)


def squares(output: Tensor, targets: Tensor) -> Tensor:
    return (output.flatten(1).sum(1) - targets).square().mean()


class FromState(nn.Module):
    """Initial states from the input; the last ones among the results."""

    def __init__(self, hidden: int, bidirectional: bool) -> None:
        super().__init__()
        self.directions = 2 if bidirectional else 1
        self.state = nn.Linear(3, hidden)
        self.lstm = nn.LSTM(3, hidden, batch_first=True, bidirectional=bidirectional)

    def forward(self, x: Tensor) -> Tensor:
        state = self.state(x[:, 0]).repeat(self.directions, 1, 1)
        output, (h, c) = self.lstm(x, (state, state.tanh()))
        return torch.cat([output.mean(1), *(last.transpose(0, 1).flatten(1) for last in (h, c))], 1)


@pytest.mark.parametrize(("hidden", "examples", "steps"), [(16, 1, 1), (16, 9, 5), (32, 7, 4), (48, 16, 6), (80, 3, 2)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_an_lstm(
    bidirectional: bool, hidden: int, examples: int, steps: int, threads: int, level: CDLL, calls: list[str]
) -> None:
    torch.manual_seed(0)
    model = FromState(hidden, bidirectional)
    batch = Batch((torch.randn(examples, steps, 3),), torch.randn(examples))
    gm = perexfx.transform(model, clip_norm=0.5)
    found = train_step(gm, batch, squares)
    assert "lstm_steps_back" in calls
    assert gm.perexfx.norms is not None
    gradients = one_at_a_time(model.double(), batch.double(), squares)
    expected = norms_of(gradients)
    assert_close({"norms": gm.perexfx.norms.double()}, {"norms": expected}, 1e-5, "norms")
    factors = (0.5 / expected).clamp(max=1) / examples
    assert_close({k: v.double() for k, v in found.items()}, weighted(gradients, factors), 1e-5, "sums")


@needs_kernels
@pytest.mark.parametrize("bias", [-200.0, -60.0, -20.0, 200.0])
@pytest.mark.parametrize("gate", range(4))
def test_gates_at_their_ends(gate: int, bias: float, calls: list[str]) -> None:
    """The kernel divides the output by the output gate, which may be zero."""
    torch.manual_seed(0)
    model = FromState(16, bidirectional=False)
    with torch.no_grad():
        model.lstm.bias_ih_l0.unflatten(0, (4, -1))[gate] += bias
    batch = Batch((torch.randn(9, 5, 3),), torch.randn(9))
    gm = perexfx.transform(model, clip_norm=None)
    found = train_step(gm, batch, squares)
    assert "lstm_steps_back" in calls
    gradients = one_at_a_time(model.double(), batch.double(), squares)
    expected = weighted(gradients, torch.ones(9, dtype=torch.float64) / 9)
    assert_close({k: v.double() for k, v in found.items()}, expected, 1e-5, "sums")


@pytest.mark.parametrize(
    ("layer", "dtype"),
    [
        (nn.LSTM(3, 24, batch_first=True), torch.float32),  # hidden size
        (nn.LSTM(3, 16, batch_first=True, proj_size=5), torch.float32),
        (nn.LSTM(3, 16, batch_first=True), torch.float64),
        (nn.GRU(3, 16, batch_first=True), torch.float32),
    ],
)
def test_what_the_lstm_kernel_is_not_for(
    layer: nn.Module, dtype: torch.dtype, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Whole(layer).to(dtype)
    batch = Batch((torch.randn(4, 5, 3, dtype=dtype),), torch.randn(4, dtype=dtype))
    found = train_step(perexfx.transform(model), batch, squares)
    assert "lstm_steps_back" not in calls
    monkeypatch.setattr("perexfx.kernels.tensors.loaded", lambda: None)
    expected = train_step(perexfx.transform(model), batch, squares)
    assert_close(found, expected, 1e-6, "gradients")


@needs_kernels
def test_an_example_that_is_not_finite(calls: list[str]) -> None:
    torch.manual_seed(0)
    model = FromState(16, bidirectional=False)
    x = torch.randn(9, 5, 3)
    x[0, 2, 1] = torch.nan
    batch = Batch((x,), torch.randn(9))
    others = Batch((x[1:],), batch.targets[1:])
    gm = perexfx.transform(model, clip_norm=0.5)
    found = train_step(gm, batch, squares)
    expected = train_step(gm, others, squares)
    assert "lstm_steps_back" in calls
    assert_close(found, {name: value * 8 / 9 for name, value in expected.items()}, 1e-5, "all but that example")


@pytest.mark.parametrize(("scale", "eps"), [(1e16, 1e-5), (1e-13, 1e-30)])
@pytest.mark.parametrize("has_kernels", [True, False])
def test_group_norms_of_very_large_and_small_images(
    scale: float, eps: float, has_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_kernels:
        monkeypatch.setattr("perexfx.kernels.tensors.loaded", lambda: None)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.GroupNorm(4, 16, eps=eps), nn.Tanh())
    batch = Batch((scale * torch.randn(3, 8, 6, 6).contiguous(memory_format=torch.channels_last),), torch.randn(3))
    found = train_step(perexfx.transform(model, clip_norm=None), batch, squares)
    expected = train_step(model.double(), batch.double(), squares)
    assert_close({name: value.double() for name, value in found.items()}, expected, 1e-4, "gradients")


class Turned(nn.Module):
    """Channels last, with an axis of one element that has a stride of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 8, 1), nn.GroupNorm(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.first(x).contiguous(memory_format=torch.channels_last).transpose(2, 3)).tanh()


@pytest.mark.parametrize("frozen", ["", "norm.bias", "norm.weight"])
@pytest.mark.parametrize("has_kernels", [True, False])
def test_group_norms_with_an_axis_of_one_element(
    frozen: str, has_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_kernels:
        monkeypatch.setattr("perexfx.kernels.tensors.loaded", lambda: None)
    torch.manual_seed(0)
    model = Turned()
    if frozen:
        model.get_parameter(frozen).requires_grad_(False)
    batch = Batch((torch.randn(3, 2, 1, 7),), torch.randn(3))
    found = train_step(perexfx.transform(model, clip_norm=None), batch, squares)
    assert_close(found, train_step(model, batch, squares), 1e-5, "gradients")


class SmallNet(nn.Module):
    """Convolutions, a group norm and a strided shortcut, small enough for every strategy."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.second = nn.Conv2d(16, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8 * 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.norm(self.first(x)).relu()).relu().flatten(1))


def without_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str) -> None:
    """As where they are not wanted, were not built, or cannot be used."""
    if how == "not wanted":
        monkeypatch.setenv("PEREXFX_KERNELS", "0")
        return
    for path in loading.FOLDER.iterdir():
        if path.suffix in {"of other sources": (".cpp", ".h", ".kernels")}.get(how, (".cpp", ".h")):
            shutil.copy(path, tmp_path)
    if how == "of other sources":
        with (tmp_path / "gram.cpp").open("a") as file:
            file.write("// changed\n")
    if how == "no library":
        for name in LEVELS:
            (tmp_path / f"{name}.kernels").write_text("not a library")
    monkeypatch.setattr(loading, "FOLDER", tmp_path)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("not wanted", ""),
        ("not built", "were not built"),
        ("no library", "cannot be used"),
        pytest.param("of other sources", "Install the package again", marks=needs_kernels),
    ],
)
def test_without_kernels(
    how: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = SmallNet()
    batch = Batch((torch.randn(5, 3, 8, 8),), torch.randn(5))
    expected = train_step(perexfx.transform(model), batch, squares)
    without_kernels(monkeypatch, tmp_path, how)
    loading.loaded.cache_clear()
    try:
        with caplog.at_level(logging.INFO, "perexfx"):
            gm = perexfx.transform(model)
            found = train_step(gm, batch, squares)
            train_step(gm, batch, squares)
        assert kernels.level() == "none"
    finally:
        monkeypatch.undo()
        loading.loaded.cache_clear()
    assert gm.perexfx.plan["first"] != "direct"
    assert_close(found, expected, 1e-5, "gradients")
    messages = {record.message for record in caplog.records if "kernels" in record.message}
    assert all(said in message for message in messages)
    assert bool(messages) is bool(said)


def test_a_strategy_without_its_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perexfx.kernels.tensors.loaded", lambda: None)
    with pytest.raises(perexfx.PerexError, match="no kernel in C\\+\\+"):
        perexfx.transform(SmallNet(), torch.randn(2, 3, 8, 8), strategy={"first": "direct"})


@needs_kernels
def test_a_traced_step_has_torch_operations_in_place_of_kernels() -> None:
    torch.manual_seed(0)
    model = SmallNet()
    x, y = torch.randn(5, 3, 8, 8), torch.randn(5)
    gm = perexfx.transform(model, strategy={"first": "direct", "second": "direct"})
    expected = train_step(gm, Batch((x,), y), squares)
    graph = perexfx.step_graph(gm, squares, x, y)
    _, _, found = graph(dict(gm.named_parameters()), dict(gm.named_buffers()), x, y)
    assert_close(found, expected, 1e-5, "gradients")
