"""No model is ever accepted and answered wrongly: random models, tried whole."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, event, given, reject, settings
from hypothesis import strategies as st

from perexfx.analysis.axes.table import RULES
from tests.support.random_models import judge
from tests.support.random_programs import Program, generate
from tests.support.random_writer import Input

SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


@settings(
    max_examples=70,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=SLOW,
)
@given(st.randoms(use_true_random=False))
def test_random_models_are_exact_or_refused(random: Random) -> None:
    torch.set_num_threads(1)
    program = generate(random)
    outcome = judge(program)
    event(f"{outcome.kind}, {'mixing' if outcome.mixes else 'independent'}")
    if outcome.kind == "invalid":
        reject()
    assert outcome.kind in ("exact", "refused"), f"{program}\n{outcome.detail}"


def test_independent_models_are_accepted_and_mixing_ones_met_and_refused() -> None:
    """What the test above says would hold as well if all were refused, or if nothing were ever mixed."""
    counts: Counter[tuple[bool, str]] = Counter()
    for seed in range(100):
        program = generate(Random(seed))
        outcome = judge(program)
        assert outcome.kind != "wrong", f"seed {seed}\n{program}\n{outcome.detail}"
        if outcome.mixes or not program.mistakes:
            counts[outcome.mixes, outcome.kind] += 1
    assert counts[False, "exact"] >= 4 * counts[False, "refused"], counts
    assert counts[True, "refused"] >= 12, counts
    assert not counts[True, "exact"], counts


MIXES = """
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x0):
        return self.layer(x0).softmax(0)
"""


def test_a_mixing_model_counts_as_wrong_where_it_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    program = Program(MIXES, (Input("float", (3,)),), 0, 3, (2,), "traced", "auto", "mean", ())
    assert judge(program).kind == "refused"
    monkeypatch.setitem(RULES, "_softmax", lambda call: call.layout(call.tensors[0]))
    outcome = judge(program)
    assert (outcome.kind, outcome.mixes) == ("wrong", True)
