"""Modes: normalisations over the batch that follow their layers, and that are fixed again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import perexfx
from perexfx.capture import CapturedModule, capture, release_norms, twin_of


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def released(model: nn.Module) -> CapturedModule:
    captured = capture(model)
    paths = release_norms(captured.graph)
    assert paths == {"1"}
    held = type(captured)(captured.graph, {}, captured.constants, captured.baked, captured.conditions)
    return CapturedModule.around(twin_of(model, captured.constants), held)


@pytest.mark.parametrize("training", [True, False])
def test_released_norms_follow_the_mode(training: bool) -> None:
    x = torch.randn(4, 3, 8, 8)
    model, twin = net().train(training), released(net().train(not training)).train(training)
    torch.testing.assert_close(twin(x), model(x))
    expected = dict(model.named_buffers())
    for name, value in twin.named_buffers():
        if "num_batches" not in name:
            torch.testing.assert_close(value, expected[name])


def test_a_transform_fixes_them_again() -> None:
    x = torch.randn(4, 3, 8, 8)
    module = released(net())
    with pytest.raises(perexfx.MixingError, match="BatchNorm in training mode"):
        perexfx.transform(module, x)
    module.eval()
    gm = perexfx.transform(module, x)
    gm(x).sum().backward()
    gm.train()
    with pytest.raises(perexfx.ModeError, match="computes something else in train mode"):
        gm(x)
    module.train()
    assert not torch.equal(module(x)[:1], module(x[:1]))
