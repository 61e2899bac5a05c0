"""Plans are made from shapes alone, exactly, and kept within their budget."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import perexfx
from perexfx.bench.models import ResNet18
from perexfx.ir.alternative import Alternative
from perexfx.ir.convolution import ConvolutionSignature
from perexfx.ir.cost import Cost, Work
from perexfx.ir.errors import BudgetError
from perexfx.ir.factors import GradientSignature, ProductSignature, RowsSignature
from perexfx.ir.machine import BUILT_IN, Machine, Rate
from perexfx.kernels.geometry import ConvolutionGeometry
from perexfx.planning.knapsack import choose, least_bytes
from perexfx.sites.regions import convolution_work, image_work
from perexfx.strategies import STRATEGIES, Gram, GramShift, Grouped, Loop, Materialize, Outer
from perexfx.strategies.direct import Direct


def convolution(n: int, channels: int, out: int, size: int, kernel: int = 3, frames: int = 1) -> ConvolutionSignature:
    slide = ConvolutionGeometry((1, 1), (kernel // 2, kernel // 2), (1, 1), 1)
    return ConvolutionSignature(n, frames, (size, size), (size, size), (out, channels, kernel, kernel), slide)


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


def test_the_plan_follows_shapes() -> None:
    def chosen(conv: ConvolutionSignature) -> str:
        costs = {s.name: BUILT_IN.seconds(s.cost(conv, 4)) for s in STRATEGIES if s.refuses(conv) is None}
        return min(costs, key=lambda name: costs[name])

    assert chosen(convolution(32, 512, 512, 4)) == "gram_shift"
    assert chosen(convolution(32, 256, 256, 14)) == "gram_shift"
    assert chosen(convolution(32, 64, 64, 56)) in ("loop", "grouped")
    assert chosen(replace(convolution(32, 64, 64, 56), has_kernels=True, channels_last=True)) == "direct"
    assert chosen(replace(convolution(32, 256, 256, 14), has_kernels=True)) == "gram_shift"


def test_a_plan_is_made_ahead_without_computing() -> None:
    model = ResNet18(width=8)
    with torch.device("meta"):
        x = torch.empty(32, 3, 32, 32)
    gm = perexfx.transform(model.to("meta"), x)
    assert gm.perexfx.plan is not None
    assert gm.perexfx.plan.batch_size == 32
    assert len({decision.site for decision in gm.perexfx.plan.decisions}) == len(gm.perexfx.sites) == 41


def test_plans_are_deterministic_and_per_batch_size() -> None:
    model = ResNet18(width=8)
    plans = [perexfx.transform(model, torch.empty(n, 3, 32, 32)).perexfx.plan for n in (4, 4, 64)]
    assert repr(plans[0]) == repr(plans[1])
    gm = perexfx.transform(model)
    for plan in plans:
        gm(torch.randn(plan.batch_size, 3, 32, 32))
        assert repr(gm.perexfx.plan) == repr(plan)


def alternatives(rng: random.Random, count: int) -> list[Alternative]:
    costs = [Cost((Work("w"),), rng.randrange(0, 40), rng.choice((0, 0, 5, 20))) for _ in range(count)]
    return [Alternative(Outer(), rng.randrange(1, 30) / 4, cost) for cost in costs]


def total_bytes(choice: tuple[Alternative, ...]) -> int:
    return sum(a.bytes_held for a in choice) + max(a.bytes_transient for a in choice)


@pytest.mark.parametrize("seed", range(40))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    rng = random.Random(seed)
    rows = [alternatives(rng, rng.randrange(1, 4)) for _ in range(rng.randrange(1, 7))]
    everything = list(itertools.product(*rows))
    least = min(map(total_bytes, everything))
    assert least_bytes(rows) == least
    for budget in (least, least + 7, least + 31, 10**9):
        best = min(sum(a.seconds for a in c) for c in everything if total_bytes(c) <= budget)
        picked = choose(rows, budget)
        assert total_bytes(tuple(picked)) <= budget
        assert math.isclose(sum(a.seconds for a in picked), best)
    if least:
        with pytest.raises(BudgetError, match=f"The least that would do is {least:,} bytes"):
            choose(rows, least - 1)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 32, 3), nn.GroupNorm(4, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def test_forcing_everywhere_applies_where_it_can() -> None:
    gm = perexfx.transform(Small(), torch.empty(4, 3, 12, 12), strategy="loop")
    plan = gm.perexfx.plan
    assert plan["conv"] == "loop"
    assert plan["head"] in ("outer", "gram", "materialize", "materialize_norms")
    with pytest.raises(KeyError):
        plan["nowhere"]


def test_machines_add_up() -> None:
    machine = Machine("test", {"a": Rate(2.0, 4.0, 1.0), "b": Rate(math.inf, math.inf, 0.5)})
    assert machine.seconds(Cost((Work("a", flops=4, bytes=4, calls=3), Work("b", flops=9)), 0)) == 3 + 2 + 1 + 0.5
    depthwise = convolution(4, 8, 8, 5)
    depthwise = replace(depthwise, shape=(8, 1, *depthwise.kernel), geometry=replace(depthwise.geometry, groups=8))
    kinds = {
        work.kind
        for strategy in STRATEGIES
        for signature in (
            convolution(4, 2, 2, 5),
            convolution(4, 8, 2, 5),
            replace(convolution(4, 8, 2, 5), has_kernels=True),
            replace(depthwise, has_kernels=True),
            ProductSignature(8, 1, 1, 3, 2, (2, 3)),
            ProductSignature(8, 1, 1, 3, 2, (2, 3), has_kernels=True),
            RowsSignature(4, 5, 9, 3),
        )
        if strategy.refuses(signature) is None
        for work in strategy.cost(signature, 4).work
    }
    for last in (False, True):
        kinds |= {work.kind for work in convolution_work(convolution(4, 2, 2, 5), last)}
        kinds |= {image_work(layer, 8, last).kind for layer in ("max_pool", "group_norm")}
        kinds |= {image_work("group_norm", 8, last, has_kernel=True).kind}
    assert kinds == set(BUILT_IN.rates)
    assert Machine.from_dict(json.loads(json.dumps(BUILT_IN.to_dict()))) == BUILT_IN
    with pytest.raises(KeyError, match="gemm"):
        Machine.from_dict({"name": "old", "rates": {}})
