"""Plans are made from shapes alone, ahead of any step, and the same each time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import perexfx
from perexfx.bench.models import ResNet18
from perexfx.ir.convolution import ConvolutionSignature
from perexfx.ir.cost_model import BUILT_IN
from perexfx.strategies import STRATEGIES
from tests.support.models import Small
from tests.support.signatures import convolution


def test_the_plan_follows_shapes() -> None:
    def chosen(conv: ConvolutionSignature) -> str:
        costs = {s.name: BUILT_IN.seconds(s.cost(conv, 4)) for s in STRATEGIES if s.refuses(conv) is None}
        return min(costs, key=lambda name: costs[name])

    assert chosen(convolution(32, 512, 512, 4)) == "gram_shift"
    assert chosen(convolution(32, 256, 256, 14)) == "gram_shift"
    assert chosen(convolution(32, 64, 64, 56)) in ("loop", "grouped")
    assert chosen(replace(convolution(32, 64, 64, 56), has_kernels=True, channels_last=True)) == "direct"
    assert chosen(replace(convolution(32, 256, 256, 14), has_kernels=True)) == "gram_shift"


def test_groups_of_channels_that_fill_no_vectors_are_no_groups() -> None:
    """Rochette et al.'s networks of 25 channels: torch's kernel gradient in such groups is a product a group."""

    def over_direct(channels: int) -> float:
        conv = replace(convolution(8, channels, channels, 64), has_kernels=True)
        seconds = {s.name: BUILT_IN.seconds(s.cost(conv, 4)) for s in STRATEGIES if s.name in ("grouped", "direct")}
        return seconds["grouped"] / seconds["direct"]

    assert all(over_direct(channels) < 1.3 for channels in (24, 32, 40, 64))
    assert all(over_direct(channels) > 1.5 for channels in (20, 25, 28, 50, 100))


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


def test_forcing_everywhere_applies_where_it_can() -> None:
    gm = perexfx.transform(Small(), torch.empty(4, 3, 12, 12), strategy="loop")
    plan = gm.perexfx.plan
    assert plan["conv"] == "loop"
    assert plan["head"] in ("outer", "gram", "materialize", "materialize_norms")
    with pytest.raises(KeyError):
        plan["nowhere"]
