"""Columns side by side: the sum or mean of the models, each once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import perexfx


def columns(count: int = 3) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)) for _ in range(count)]


@pytest.mark.parametrize("merge", ["sum", "mean"])
def test_the_output_is_the_merge_of_the_columns(merge: str) -> None:
    models, x = columns(), torch.randn(5, 4)
    net = perexfx.parallel_columns(models, merge)
    stacked = torch.stack([model(x) for model in models])
    assert torch.equal(net(x), stacked.sum(0) if merge == "sum" else stacked.mean(0))
    assert list(net.columns) == models
    assert f"merge={merge}" in repr(net)


@pytest.mark.parametrize("merge", ["sum", "mean"])
@pytest.mark.parametrize("known", [True, False])
def test_columns_are_guided(merge: str, known: bool) -> None:
    net, x, y = perexfx.parallel_columns(columns(), merge), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    g = perexfx.guide_logits(net, x if known else None, num_classes=3)
    assert torch.equal(g(x, targets=y), net(x))
    assert g.guide.pathways == 3
    assert f"the {merge} of" in g.rewriting.summary


def test_lists_of_modules_are_taken() -> None:
    net = perexfx.parallel_columns(nn.ModuleList(columns()))
    assert len(net.columns) == 3


def test_columns_may_share_what_has_no_parameters() -> None:
    relu = nn.ReLU()
    net = perexfx.parallel_columns([nn.Sequential(nn.Linear(4, 3), relu), nn.Sequential(nn.Linear(4, 3), relu)])
    assert net(torch.randn(2, 4)).shape == (2, 3)


ONE = nn.Sequential(nn.Linear(4, 3))
TRUNK = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("models", "merge", "message"),
    [
        (ONE, "sum", "`models` should be a list of at least two modules. Found Sequential."),
        ([ONE], "sum", "`models` should be a list of at least two modules. Found 1."),
        ([], "sum", "`models` should be a list of at least two modules. Found 0."),
        ([ONE, 3], "sum", "`models[1]` should be a torch.nn.Module. Found int."),
        (
            [ONE, copy.deepcopy(ONE), ONE],
            "sum",
            "`models[0]` and `models[2]` are the same module. Columns are networks",
        ),
        (
            [nn.Sequential(TRUNK, nn.Linear(4, 3)), nn.Sequential(nn.Identity(), TRUNK)],
            "sum",
            "`models[0]` and `models[1]` share a parameter, `0.weight` and `1.weight`. Columns are networks",
        ),
        ([ONE, copy.deepcopy(ONE)], "max", '`merge` should be "sum" or "mean". Found \'max\'.'),
    ],
)
def test_what_are_no_columns(models: Any, merge: str, message: str) -> None:
    with pytest.raises(perexfx.ArgumentError) as error:
        perexfx.parallel_columns(models, merge)
    assert str(error.value).startswith(message)
