"""What a profile times, and what it needs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import perexfx
from tests.support.models import Mixed


def test_sites_that_are_joined_are_timed_too() -> None:
    gm = perexfx.transform(Mixed())
    ids = torch.zeros(8, 12, dtype=torch.long)
    found = perexfx.profile(gm, lambda output, _: output.square().mean(), ids, None, steps=2)
    sites = {site.name: site for site in found.sites}
    assert all(site.seconds > 0 for site in found.sites)
    assert sites["shared"].bytes_held is sites["shared#2"].bytes_held is None
    assert perexfx.report(gm).batch_size == 8


def test_what_a_profile_needs() -> None:
    gm = perexfx.transform(nn.Linear(3, 2))
    with pytest.raises(perexfx.ArgumentError, match=r"`steps` should be a positive number. Found 0"):
        perexfx.profile(gm, F.cross_entropy, torch.zeros(2, 3), None, steps=0)
    with pytest.raises(perexfx.ArgumentError, match=r"`loss_fn` should be a function of output and targets. Found str"):
        perexfx.profile(gm, "mse", torch.zeros(2, 3), None)
    with pytest.raises(perexfx.ArgumentError, match=r"should come from `perexfx.transform`. Found Linear"):
        perexfx.profile(nn.Linear(3, 2), F.cross_entropy, torch.zeros(2, 3), None)
