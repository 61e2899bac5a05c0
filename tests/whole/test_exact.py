"""Every accepted layer x strategy pair equals one example at a time, without anyone listing the pairs."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

import perexfx
from perexfx.ir.strategy import REWEIGHT
from perexfx.layers import RULES
from perexfx.strategies import STRATEGIES
from tests.support.cases import BY_NAME, CASES, Case
from tests.support.oracle import Batch, assert_close, norms_of, one_at_a_time, train_step, weighted

TOLERANCE = 1e-9


@functools.cache
def truth(name: str) -> tuple[nn.Module, Batch, dict[str, Tensor]]:
    case = BY_NAME[name]
    model, batch = case.build(), case.batch()
    return model, batch, one_at_a_time(model, batch, case.loss)


def accepted(case: Case) -> list[tuple[str, str]]:
    """(site, strategy) for all that applies, read off the plan."""
    batch = case.batch()
    plan = perexfx.transform(case.build(), batch.inputs, batch_dim=case.batch_dim).perexfx.plan
    assert plan is not None
    found = []
    for decision in plan.decisions:
        if (decision.site, "materialize") in found:
            continue  # a site's other operands have no choice
        joined = decision.reason.startswith(("joined", "pulled"))
        found += [
            (decision.site, a.strategy.name)
            for a in decision.alternatives
            if a.cost and (not joined or a.strategy.name == "materialize")
        ]
    return found


PAIRS = [(case.name, site, strategy) for case in CASES for site, strategy in accepted(case)]


def check(case: Case, strategy: str | dict[str, str], *, ahead: bool) -> None:
    model, batch, gradients = truth(case.name)
    norms = norms_of(gradients)
    clip_norm = float(norms.median())
    gm = perexfx.transform(
        model,
        batch.inputs if ahead else None,
        clip_norm=clip_norm,
        strategy=strategy,
        batch_dim=case.batch_dim,
    )
    found = train_step(gm, batch, case.loss)
    factors = (clip_norm / norms).clamp(max=1)
    assert_close({"norms": gm.perexfx.norms}, {"norms": norms}, TOLERANCE, case.name)
    assert_close({"factors": gm.perexfx.clip_factors}, {"factors": factors}, TOLERANCE, case.name)
    assert_close(found, weighted(gradients, factors / batch.size), TOLERANCE, case.name)


@pytest.mark.parametrize(("name", "site", "strategy"), PAIRS)
def test_every_accepted_pair_is_exact(name: str, site: str, strategy: str) -> None:
    check(BY_NAME[name], {site: strategy}, ahead=True)


@pytest.mark.parametrize("name", sorted({name for name, _, strategy in PAIRS if strategy == REWEIGHT}))
def test_a_second_backward_of_whole_models(name: str) -> None:
    check(BY_NAME[name], REWEIGHT, ahead=False)


@pytest.mark.parametrize("name", BY_NAME)
def test_planned_at_the_first_batch(name: str) -> None:
    check(BY_NAME[name], "auto", ahead=False)


@pytest.mark.parametrize("name", BY_NAME)
def test_forward_is_the_models(name: str) -> None:
    model, batch, _ = truth(name)
    gm = perexfx.transform(model, batch_dim=batch.batch_dim)
    torch.testing.assert_close(gm(*batch.inputs), model(*batch.inputs), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(gm(*batch.inputs), model(*batch.inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", BY_NAME)
def test_permuting_examples_permutes_results(name: str) -> None:
    case = BY_NAME[name]
    model, batch, _ = truth(name)
    order = torch.tensor([2, 0, 3, 1])
    gm = perexfx.transform(model, batch_dim=case.batch_dim)
    before = train_step(gm, batch, case.loss)
    norms = gm.perexfx.norms
    after = train_step(gm, batch.take(order), case.loss)
    assert_close({"norms": gm.perexfx.norms}, {"norms": norms[order]}, TOLERANCE, name)
    assert_close(after, before, TOLERANCE, name)


@pytest.mark.parametrize("name", BY_NAME)
def test_unclipped_sum_is_the_batch_gradient(name: str) -> None:
    case = BY_NAME[name]
    model, batch, _ = truth(name)
    expected = train_step(model, batch, case.loss)
    found = train_step(perexfx.transform(model, clip_norm=None, batch_dim=case.batch_dim), batch, case.loss)
    assert_close(found, expected, TOLERANCE, name)


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("strategy", ["materialize", "gram", "gram_shift", "grouped", "loop", "loop_norms"])
def test_removing_an_example_moves_the_sum_by_at_most_the_clip_norm(name: str, strategy: str) -> None:
    case = BY_NAME[name]
    model, batch, gradients = truth(name)
    clip_norm = float(norms_of(gradients).min()) / 2  # everyone is clipped
    try:
        gm = perexfx.transform(model, clip_norm=clip_norm, strategy=strategy, batch_dim=case.batch_dim)
        whole = train_step(gm, batch, case.loss)
    except perexfx.StrategyError:
        assert all((site, strategy) not in PAIRS for site in gm.perexfx.sites)
        return
    rest = train_step(gm, batch.take(torch.arange(1, batch.size)), case.loss)
    moved = [whole[name] * batch.size - rest[name] * (batch.size - 1) for name in whole]
    assert torch.cat([m.flatten() for m in moved]).norm() <= clip_norm * (1 + 1e-9)


@pytest.mark.parametrize("size", [0, 1, 2, 7])
@pytest.mark.parametrize("name", BY_NAME)
def test_other_batch_sizes(name: str, size: int) -> None:
    case = BY_NAME[name]
    model, _, _ = truth(name)
    gm = perexfx.transform(model, clip_norm=0.3, batch_dim=case.batch_dim, loss_reduction="sum")

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return case.loss(output, targets) * targets.shape[0] if targets.shape[0] else output.sum()

    train_step(gm, case.batch(), loss)  # a plan for another size exists already
    batch = case.batch(size, seed=3)
    found = train_step(gm, batch, loss)
    gradients = one_at_a_time(model, batch, case.loss)
    norms = norms_of(gradients)
    assert gm.perexfx.plan.batch_size == size
    if size == 0:
        assert all(not g.any() for g in found.values())
        assert gm.perexfx.norms.shape == (0,)
        return
    assert_close({"norms": gm.perexfx.norms}, {"norms": norms}, TOLERANCE, name)
    assert_close(found, weighted(gradients, (0.3 / norms).clamp(max=1)), TOLERANCE, name)


@pytest.mark.parametrize("name", BY_NAME)
def test_float32_is_close(name: str) -> None:
    case = BY_NAME[name]
    _, double, gradients = truth(name)
    norms = norms_of(gradients)
    batch = Batch(
        tuple(x.float() if x.is_floating_point() else x for x in double.inputs),
        double.targets.float(),
        double.batch_dim,
    )
    gm = perexfx.transform(case.build().float(), clip_norm=float(norms.median()), batch_dim=case.batch_dim)
    found = train_step(gm, batch, case.loss)
    factors = (float(norms.median()) / norms).clamp(max=1)
    assert_close({"norms": gm.perexfx.norms.double()}, {"norms": norms}, 1e-5, name)
    assert_close({name: g.double() for name, g in found.items()}, weighted(gradients, factors / batch.size), 1e-5, name)


def test_every_rule_and_every_strategy_is_among_the_pairs() -> None:
    kinds = set()
    for case in CASES:
        gm = perexfx.transform(case.build(), batch_dim=case.batch_dim)
        kinds |= {site.kind for site in gm.perexfx.sites}
    assert kinds - {"fallback"} == {rule.kind for rule in RULES}
    assert {strategy for _, _, strategy in PAIRS} == {*(strategy.name for strategy in STRATEGIES), REWEIGHT}
