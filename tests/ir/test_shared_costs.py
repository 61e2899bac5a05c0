"""What each strategy costs, in exact integers, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

from perexfx.ir.factors import GradientSignature, ProductSignature, RowsSignature
from perexfx.strategies import STRATEGIES, Gram, GramShift, Grouped, Loop, Materialize, Outer
from perexfx.strategies.direct import Direct
from tests.support.signatures import convolution


def test_costs_are_exact_integers() -> None:
    linear = ProductSignature(n=8, g=1, t=16, i=32, o=64, shape=(64, 32))
    gram = Gram().cost(linear, itemsize=4)
    assert gram.work[0].flops == 2 * 8 * 16 * 16 * (32 + 64)
    assert gram.flops == 2 * 8 * 16 * 16 * (32 + 64) + 2 * 8 * 16 * 32 * 64
    assert gram.bytes_held == 4 * 8 * 16 * (32 + 64)
    kept = Materialize(keep=True).cost(linear, itemsize=4)
    assert kept.work[0].flops == 2 * 8 * 16 * 32 * 64
    assert kept.bytes_held == 4 * 8 * 32 * 64
    conv = convolution(4, 16, 32, 10)
    flops = 2 * 4 * 100 * 16 * 32 * 9
    for strategy in (Grouped(), Loop(keep=True), Loop(keep=False)):
        assert strategy.cost(conv, itemsize=4).work[0].flops == flops
    assert Loop(keep=True).cost(conv, itemsize=4).bytes_held == 4 * 4 * 32 * 16 * 9
    assert Loop(keep=False).cost(conv, itemsize=4).bytes_held == 4 * (4 * 16 * 100 + 4 * 32 * 100)
    shift = GramShift().cost(conv, itemsize=4)
    assert shift.work[0].flops == 4 * (2 * 100 * 100 * 32 + 2 * 144 * 144 * 16)


def test_what_strategies_refuse() -> None:
    linear, one = ProductSignature(8, 1, 16, 3, 2, (2, 3)), ProductSignature(8, 1, 1, 3, 2, (2, 3))
    conv, frames = convolution(4, 2, 2, 5), convolution(4, 2, 2, 5, frames=3)
    rows, bias = RowsSignature(4, 5, 9, 3), GradientSignature(4, (3,))
    accepted = {
        strategy.name: [s for s in (linear, one, conv, frames, rows, bias) if strategy.refuses(s) is None]
        for strategy in STRATEGIES
    }
    assert accepted == {
        "outer": [one],
        "materialize": [linear, one, conv, frames, rows, bias],
        "materialize_norms": [linear, one, conv, frames],
        "gram": [linear, one, conv, frames, rows],
        "direct": [],
        "direct_norms": [],
        "grouped": [conv, frames],
        "loop": [conv, frames],
        "loop_norms": [conv, frames],
        "gram_shift": [conv],
    }
    assert "each example is 3 images" in str(GramShift().refuses(frames))
    assert Outer().refuses(bias) == "its gradient is not a matrix product"
    assert Direct(keep=True).refuses(replace(frames, has_kernels=True)) is None
    assert Direct(keep=True).refuses(conv) == "there is no kernel in C++ for it here"
    assert Direct(keep=False).refuses(replace(conv, has_kernels=True)) == "a convolution's kernel writes what it makes"
    assert Direct(keep=True).refuses(bias) == "its gradient is not a product of two factors"
    for keep in (True, False):
        assert Direct(keep).refuses(linear) == "there is no kernel in C++ for it here"
        assert Direct(keep).refuses(replace(linear, has_kernels=True)) is None


def test_costs_of_products_by_kernels() -> None:
    """Vectors run over the features that fill them better; a Gram matrix costs its lower half."""
    linear = ProductSignature(n=8, g=1, t=16, i=32, o=48, shape=(48, 32), has_kernels=True)
    for keep, held in ((True, 4 * 8 * 32 * 48), (False, 4 * 8 * 16 * (32 + 48))):
        cost = Direct(keep).cost(linear, itemsize=4)
        assert cost.bytes_held == held
        flops = {(32, 48): 2 * 8 * 16 * 32 * 48, (3, 48): 2 * 8 * 16 * 3 * 48, (48, 3): 2 * 8 * 16 * 3 * 48}
        for (i, o), exact in flops.items():
            found = Direct(keep).cost(replace(linear, i=i, o=o, shape=(o, i)), itemsize=4).work[0]
            assert (found.kind, found.flops) == ("direct_product", exact)
    waste = Direct(keep=True).cost(replace(linear, i=3, o=5, shape=(5, 3)), itemsize=4).work[0].flops
    assert waste == int(2 * 8 * 16 * 3 * 5 * (16 / 5) * (1 / 3 + 1 / 1))
    assert Gram().cost(linear, itemsize=4).work[0].flops == 8 * 16 * (16 + 4) * (32 + 48)
    shared = Gram().cost(replace(linear, left_users=2), itemsize=4)
    assert shared.work[0].flops == 8 * 16 * (16 + 4) * (16 + 48)
    assert shared.bytes_transient == 4 * 8 * 16 * 16
