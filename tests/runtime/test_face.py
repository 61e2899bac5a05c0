"""`gm.perexfx` shows what is documented, and nothing else."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import perexfx
from perexfx.runtime import Transformed, runtime_of

DOCUMENTED = {"clip_factors", "norms", "plan", "settings", "sites"}


def transformed() -> Transformed:
    torch.manual_seed(0)
    return perexfx.transform(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), clip_norm=0.5)


def test_it_has_what_is_documented_and_what_every_module_has() -> None:
    gm = transformed()
    assert set(dir(gm.perexfx)) - set(dir(nn.Module())) == DOCUMENTED
    doc = type(gm.perexfx).__doc__ or ""
    assert set(re.findall(r"^ {8}(\w+):", doc, re.MULTILINE)) == DOCUMENTED


def test_it_shows_the_last_step() -> None:
    gm = transformed()
    assert gm.perexfx.norms is gm.perexfx.clip_factors is gm.perexfx.plan is None
    assert [site.name for site in gm.perexfx.sites] == ["0", "2"]
    assert gm.perexfx.settings.clip_norm == 0.5
    gm(torch.randn(5, 3)).sum().backward()
    assert gm.perexfx.norms.shape == gm.perexfx.clip_factors.shape == (5,)
    assert gm.perexfx.plan.batch_size == 5
    assert "(perexfx): PerExample(2 sites, clip_norm=0.5, clipping='flat')" in str(gm)


@pytest.mark.parametrize("name", sorted(DOCUMENTED))
def test_it_is_to_be_read(name: str) -> None:
    with pytest.raises(AttributeError):
        setattr(transformed().perexfx, name, None)


def test_a_saved_module_takes_its_first_backward_in_another_process() -> None:
    gm = transformed()
    gm(torch.randn(5, 3)).sum().backward()
    code = (
        "import pickle, sys, torch; gm = pickle.load(sys.stdin.buffer);"
        "gm(torch.randn(4, 3)).sum().backward(); print(len(gm.perexfx.norms))"
    )
    found = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(gm), check=True, capture_output=True)
    assert found.stdout.split() == [b"4"]


def test_replicas_take_steps_of_their_own() -> None:
    torch.manual_seed(0)
    gm, x = perexfx.transform(nn.Linear(3, 2), clip_norm=0.5, loss_reduction="sum"), torch.randn(5, 3)
    gm(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in gm.named_parameters() if p.grad is not None}
    gm.zero_grad()
    norms = gm.perexfx.norms
    first, second = replica(gm), replica(gm)
    torch.cat([first(x[:2]), second(x[2:])]).square().sum().backward()
    assert gm.perexfx.norms is norms
    assert (len(first.perexfx.norms), len(second.perexfx.norms)) == (2, 3)
    for name, parameter in gm.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def replica(module: nn.Module) -> Any:
    """As torch.nn.parallel.replicate makes them, without a second device."""
    modules = list(module.modules())
    copies = {own: own._replicate_for_data_parallel() for own in modules}
    for own, copied in copies.items():
        for name, child in own._modules.items():
            copied._modules[name] = None if child is None else copies[child]
        for name, parameter in own._parameters.items():
            if parameter is not None:  # no Parameter, so that a gradient goes on to the module's own
                del copied._parameters[name]
                setattr(copied, name, parameter * 1)
    return copies[module]


def test_a_forward_that_began_before_leaves_its_norms_last() -> None:
    gm, x = transformed(), torch.randn(5, 3)
    loss = gm(x).sum()
    with runtime_of(gm).set_aside():
        inside = gm(x[:2]).sum()
        gm(x[:3]).sum().backward()
        assert len(gm.perexfx.norms) == 3
    assert gm.perexfx.norms is None
    inside.backward()
    assert len(gm.perexfx.norms) == 2
    loss.backward()
    assert len(gm.perexfx.norms) == 5


def test_one_attribute_is_added_to_those_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    gm = perexfx.transform(model)
    assert dict(gm.named_modules()).keys() - dict(model.named_modules()).keys() == {"perexfx"}
    assert gm.state_dict().keys() == model.state_dict().keys()


def test_what_others_remember_goes_with_the_graph() -> None:
    gm = transformed()
    gm(torch.randn(5, 3)).sum().backward()
    notes = runtime_of(gm).notes.of(str)
    notes["key"] = "a note"
    assert runtime_of(gm).notes.of(str) is notes
    assert not runtime_of(gm).notes.of(int)
    for twin in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert not runtime_of(twin).notes.of(str)
        assert torch.equal(twin.perexfx.norms, gm.perexfx.norms)
    gm.recompile()
    assert not runtime_of(gm).notes.of(str)
