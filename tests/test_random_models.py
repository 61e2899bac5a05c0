"""No model is ever accepted and answered wrongly: random models, tried whole."""

from __future__ import annotations

from collections import Counter
from random import Random

import torch
from hypothesis import HealthCheck, event, given, reject, settings
from hypothesis import strategies as st
from random_models import generate, judge

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
