"""Every rule about the example axis, held against a probe: run for real, no example moves what a rule gives to another.

The calls are those that models of the other tests make, each kind once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

import perexfx
from perexfx.analysis import follow
from perexfx.analysis.axes.call import Followed, Mixing, Opaque, OpCall, Unknown
from perexfx.analysis.axes.probe import movements
from perexfx.analysis.axes.propagate import propagate, rule_of
from perexfx.analysis.axes.table import RULES
from perexfx.analysis.tags import tags_of
from perexfx.ir.layout import Layout
from tests.support.cases import CASES, Case
from tests.support.layers import LAYERS

LARGEST = 4_000
"""Entries of a call, at most, that a test runs."""


def key_of(call: OpCall) -> str:
    def shown(value: Any) -> Any:
        return (
            (tuple(value.shape), str(value.dtype), call.layouts.get(id(value))) if isinstance(value, Tensor) else value
        )

    leaves = [shown(leaf) for leaf in pytree.tree_leaves((call.args, call.kwargs))]
    return repr((call.func, call.n, leaves))


class Held:
    """Every call that has a rule, compared with its probe; several of one kind once."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.names: set[str] = set()
        self.wrong: list[str] = []

    def propagate(self, call: OpCall) -> list[Followed]:
        found = propagate(call)
        key = key_of(call)
        if rule_of(call.func) is not None and "empty" not in call.name and key not in self.seen:
            self.seen.add(key)
            if sum(tensor.numel() for tensor in (*call.tensors, *call.results)) <= LARGEST:
                self.compare(call, found, key)
        return found

    def compare(self, call: OpCall, found: Iterable[Followed], key: str) -> None:
        with _disable_current_modes():
            moves = movements(call, seeds=1)
        if moves is None:
            return
        self.names.add(call.name.removesuffix("_"))
        for place, tensor, each in zip(found, call.results, moves, strict=True):
            if isinstance(place, Opaque):
                continue
            for example, moved in enumerate(each, start=1):
                own = tags_of(place, tensor.shape, call.n) == example
                if bool((moved & ~own).any()):
                    self.wrong.append(f"{key}: example {example} moves what {place} gives to others")


def hold(cases: Iterable[Case], monkeypatch: pytest.MonkeyPatch) -> Held:
    held = Held()
    monkeypatch.setattr(follow, "propagate", held.propagate)
    for case in cases:
        perexfx.transform(case.build(), case.batch().inputs, batch_dim=case.batch_dim)
    return held


def test_no_rule_gives_one_example_what_another_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    held = hold((*CASES, *LAYERS), monkeypatch)
    assert not held.wrong, "\n".join(held.wrong)
    assert len(held.names) >= 60, sorted(held.names)  # kinds of operations that the models reach


class Along(nn.Module):
    """One operation along one axis, between layers."""

    def __init__(self, name: str, dim: int) -> None:
        super().__init__()
        self.layer, self.name, self.dim = nn.Linear(4, 4), name, dim

    def forward(self, x: Tensor) -> Tensor:
        found = getattr(torch, self.name)(self.layer(x), dim=self.dim)
        return found[0] if self.name in PAIRS else found


PAIRS = ("cummax", "cummin", "sort", "median", "mode", "aminmax")
ALONG = (
    "softmax log_softmax cumsum cumprod logcumsumexp cummax cummin sort argsort logsumexp sum mean prod amax amin std "
    "var median mode nanmean nansum argmax norm aminmax all any"
).split()


@pytest.mark.parametrize("name", ALONG)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_what_works_along_an_axis_mixes_along_that_of_the_examples(
    name: str, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(name, lambda: Along(name, dim), lambda n: (torch.randn(n, 3, 4),))
    if dim == 0:
        with pytest.raises((perexfx.MixingError, perexfx.RefusedError), match=name):
            hold([case], monkeypatch)
    else:
        held = hold([case], monkeypatch)
        assert not held.wrong


def test_a_wrong_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: a softmax over the examples that is said to keep them apart."""

    def keeps(call: OpCall) -> Layout | None:
        return call.layout(call.argument("self"))

    monkeypatch.setitem(RULES, "_softmax", keeps)
    case = Case("softmax", lambda: Along("softmax", 0), lambda n: (torch.randn(n, 3, 4),))
    assert any("_softmax" in text for text in hold([case], monkeypatch).wrong)


def test_refusals_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (Mixing, Unknown):

        def refuses(_: OpCall, error: type[Exception] = error) -> None:
            raise error("for this test")

        monkeypatch.setitem(RULES, "_softmax", refuses)
        with pytest.raises(perexfx.PerexError, match="for this test"):
            perexfx.transform(Along("softmax", 1), torch.randn(3, 3, 4))
