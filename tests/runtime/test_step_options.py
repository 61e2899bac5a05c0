"""How a step runs is handed to it, and goes with it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import perexfx
from perexfx.runtime import StepOptions, Transformed, runtime_of, stepping


def transformed() -> tuple[Transformed, Tensor]:
    torch.manual_seed(0)
    return perexfx.transform(nn.Linear(3, 2), clip_norm=0.5), torch.randn(4, 3)


def test_gradients_go_to_who_asked_for_them() -> None:
    gm, x = transformed()
    each: dict[str, Tensor] = {}
    output = stepping(gm, StepOptions(gradients_to=each.update))(x)
    other = gm(x)  # begins without options, before the first one's backward
    output.sum(1).mean().backward()
    assert {name: value.shape for name, value in each.items()} == {"weight": (4, 2, 3), "bias": (4, 2)}
    torch.testing.assert_close(gm.perexfx.norms, torch.cat([v.flatten(1) for v in each.values()], 1).norm(dim=1))
    each.clear()
    other.sum(1).mean().backward()
    assert not each


def test_a_forward_that_fails_leaves_no_options_behind() -> None:
    gm, x = transformed()
    each: dict[str, Tensor] = {}
    step = stepping(gm, StepOptions(gradients_to=each.update))
    with pytest.raises(perexfx.RefusedError):
        step(x[:, :2])
    gm(x).sum().backward()
    assert not each


def test_a_plan_may_be_handed_to_a_step() -> None:
    gm, x = transformed()
    gm(x)
    runtime = runtime_of(gm)
    assert runtime.plan is not None
    other = perexfx.transform(nn.Linear(3, 2), x, strategy="materialize").perexfx.plan
    assert runtime.kind is not None
    with runtime.stepping(StepOptions({(runtime.kind, 4): other})):
        gm(x[:2])
        assert gm.perexfx.plan.batch_size == 2
        gm(x)
        assert gm.perexfx.plan is other
    gm(x)
    assert gm.perexfx.plan is not other


def test_results_on_the_side_are_not_shown() -> None:
    gm, x = transformed()
    gm(x).sum().backward()
    norms, plan = gm.perexfx.norms, gm.perexfx.plan
    with runtime_of(gm).results_kept():
        gm(x[:2]).sum().backward()
        assert gm.perexfx.norms.shape == (2,)
    assert gm.perexfx.norms is norms
    assert gm.perexfx.plan is plan
