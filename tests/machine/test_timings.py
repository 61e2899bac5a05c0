"""Measurements are taken once, of random factors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import perexfx
from perexfx.ir.convolution import ConvolutionSignature
from perexfx.ir.factors import GradientSignature, ProductSignature, RowsSignature
from perexfx.kernels.geometry import ConvolutionGeometry
from perexfx.machine import timings
from perexfx.strategies import STRATEGIES


def test_measured_plans_time_each_size_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[object] = []
    plain = timings.measure

    def counted(candidates, signature, dtype, device):
        sizes.append(signature)
        seconds = plain(candidates, signature, dtype, device)
        return {name: 1.0 if name == "materialize" else 2.0 for name in seconds}

    monkeypatch.setattr(timings, "measure", counted)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    x = torch.randn(5, 4, 6)
    gm = perexfx.transform(model, x, cost_model="measured")
    plan = gm.perexfx.plan
    assert plan is not None
    assert "measurements" in plan.machine
    assert {plan[site.name] for site in gm.perexfx.sites} == {"materialize"}
    assert len(sizes) == len(set(sizes))
    before = len(sizes)
    timings._remembered.cache_clear()  # as in another process
    perexfx.transform(model, x, cost_model="measured")
    assert len(sizes) == before


def test_random_factors_have_their_signature() -> None:
    slide = ConvolutionGeometry((2, 1), (1, 0), (1, 2), 2)
    for signature in (
        ConvolutionSignature(3, 2, (6, 7), (3, 3), (4, 2, 3, 3), slide),
        ProductSignature(4, 2, 3, 5, 6, (12, 5)),
        RowsSignature(3, 4, 10, 2),
        GradientSignature(3, (7, 2)),
    ):
        factors = timings.random_factors(signature, torch.float64, torch.device("cpu"))
        assert factors.signature == signature
        norms = [s.squared_norms(factors)[0] for s in STRATEGIES if s.refuses(signature) is None]
        for found in norms[1:]:
            torch.testing.assert_close(found, norms[0])


def test_an_unknown_cost_model() -> None:
    with pytest.raises(perexfx.PerexError, match="cost_model"):
        perexfx.transform(nn.Linear(2, 2), cost_model="guess")
