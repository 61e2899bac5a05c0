"""Kernels of products, Gram matrices and weighted sums: against torch's own in float64."""

from __future__ import annotations

import random
from ctypes import CDLL

import pytest
import torch
from torch import Tensor

from perexfx import kernels
from perexfx.ir.factors import Product, SharedGram
from perexfx.ir.kept import Kept
from perexfx.strategies.direct import Direct
from perexfx.strategies.gram import Gram
from tests.support.kernels import assert_all_close
from tests.support.marks import needs_kernels


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
