"""Memory: what is predicted is what torch allocates, and a budget costs time, never correctness."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import perexfx
from perexfx.bench.models import LanguageModel, ResNet18, SequenceClassifier, ViT
from perexfx.ir.errors import BudgetError
from perexfx.rehearsal.dry_run import rehearse
from perexfx.rehearsal.peak import Rehearsal
from perexfx.runtime.face import runtime_of
from perexfx.runtime.transformed import Transformed
from tests.support.marks import needs_kernels
from tests.support.memory import measured, step_of
from tests.support.models import Small
from tests.support.oracle import Batch, assert_close, train_step


def vit() -> nn.Module:
    return ViT(image=32, patch=4, width=48, depth=3)


def language_model() -> nn.Module:
    return LanguageModel(vocabulary=500, width=64, depth=2, length=64)


class Beside(nn.Module):
    """A model that returns its input's features too: no value carries all gradients, and no part can run again."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.first, self.model = nn.Conv2d(3, 3, 1), model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.first(x)
        return self.model(h), h


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "resnet": (lambda: ResNet18(width=16), lambda: torch.randn(16, 3, 32, 32)),
    "vit": (vit, lambda: torch.randn(32, 3, 32, 32)),
    "language model": (language_model, lambda: torch.randint(0, 500, (16, 64))),
    "lstm": (SequenceClassifier, lambda: torch.randn(32, 32, 128)),
}


CONVOLUTION_ONLY = ("direct", "loop", "grouped", "loop_norms", "gram_shift")
STRATEGIES = ("auto", "materialize", "materialize_norms", "gram")
CASES = [*itertools.product(MODELS, STRATEGIES), *(("resnet", name) for name in CONVOLUTION_ONLY)]


@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_what_is_predicted_is_what_torch_allocates(name: str, strategy: str) -> None:
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model, x = make(), inputs()
    gm = perexfx.transform(model, x, strategy=strategy)
    ordinary, clipped = measured(step_of(model, x)), measured(step_of(gm, x))
    added = gm.perexfx.plan.bytes_added
    assert abs(added - (clipped - ordinary)) <= 0.1 * abs(added) + 0.05 * ordinary, (added, clipped - ordinary)


def rehearsal_at(gm: Transformed, n: int) -> Rehearsal:
    runtime = runtime_of(gm)
    kind, _ = next(iter(runtime.plans))
    return rehearse(gm, runtime, runtime.prepare(kind, n), kind)


@pytest.mark.parametrize("name", MODELS)
def test_two_rehearsals_tell_those_of_all_batch_sizes(name: str) -> None:
    make, inputs = MODELS[name]
    gm = perexfx.transform(make(), inputs()[:4], strategy="gram")
    between, direct = rehearsal_at(gm, 40).between(rehearsal_at(gm, 47), 83), rehearsal_at(gm, 83)
    assert between is not None
    assert between.handed_over == direct.handed_over
    assert between.clipped.peak() == pytest.approx(direct.clipped.peak(), rel=0.01)
    assert between.ordinary.peak() == pytest.approx(direct.ordinary.peak(), rel=0.01)


def test_a_rehearsal_changes_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.Linear(7, 3))
    x = torch.randn(4, 5)
    gm = perexfx.transform(model, x)
    F.cross_entropy(gm(x), torch.zeros(4, dtype=torch.long)).backward()
    before = gm.perexfx.norms, dict(runtime_of(gm).plans), torch.get_rng_state()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert isinstance(gm.perexfx.plan.bytes_added, int)
    assert gm.perexfx.norms is before[0]
    assert runtime_of(gm).plans == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert all(parameter.grad is own for parameter, own in zip(model.parameters(), gradients, strict=True))


@needs_kernels  # other plans would do without
def test_a_tight_budget_costs_time_not_correctness() -> None:
    torch.manual_seed(0)
    model, x = ResNet18(width=32), torch.randn(32, 3, 32, 32)
    gm = perexfx.transform(model, x)
    free, least = gm.perexfx.plan, gm.perexfx.plan.leanest().bytes_added
    within = perexfx.transform(model, x, memory_budget=max(0, least))
    tight = within.perexfx.plan
    assert tight.bytes_added <= max(0, least) < free.bytes_added
    assert tight.seconds > free.seconds
    batch = Batch((x[:8].double(),), torch.randint(0, 10, (8,)))
    strategies = {decision.site: decision.chosen.strategy.name for decision in tight.decisions}
    exact = perexfx.transform(model.double(), strategy=strategies)
    expected = train_step(perexfx.transform(model), batch, F.cross_entropy)
    assert_close(train_step(exact, batch, F.cross_entropy), expected, 1e-12, "tight budget")


@needs_kernels
def test_an_impossible_budget_names_the_least() -> None:
    model, x = Beside(ResNet18(width=32)), torch.randn(32, 3, 32, 32)
    transform = partial(perexfx.transform, model, x)
    gm = transform()
    free = gm.perexfx.plan
    with pytest.raises(BudgetError, match="Raise the budget or lower the batch size") as refused:
        transform(memory_budget=10)
    least = int(str(refused.value).split("least that would do is ")[1].split(" bytes")[0].replace(",", ""))
    within = transform(memory_budget=least)
    tight = within.perexfx.plan
    assert tight.bytes_added == least < free.bytes_added
    assert tight.seconds > free.seconds
    with pytest.raises(BudgetError):
        transform(memory_budget=least - 1)


def test_a_budget_that_a_later_batch_breaks_is_an_error_at_that_batch() -> None:
    model = Beside(vit())
    small = perexfx.transform(model, torch.empty(2, 3, 32, 32))
    gm = perexfx.transform(model, memory_budget=small.perexfx.plan.bytes_added)
    gm(torch.randn(2, 3, 32, 32))
    with pytest.raises(BudgetError, match="Raise the budget or lower the batch size"):
        gm(torch.randn(40, 3, 32, 32))


def test_what_cannot_be_rehearsed_is_overestimated(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = perexfx.transform(Small(), torch.empty(4, 3, 12, 12)).perexfx.plan.bytes_added

    def fails(*_: object) -> None:
        raise RuntimeError("a model that reads numbers")

    monkeypatch.setattr("perexfx.rehearsal.dry_run.rehearse", fails)
    plan = perexfx.transform(Small(), torch.empty(4, 3, 12, 12)).perexfx.plan
    assert exact < sum(decision.chosen.bytes_held for decision in plan.decisions) <= plan.bytes_added


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda gm: pickle.loads(pickle.dumps(gm))])
def test_copies_predict_the_same(copied: Callable[[Transformed], Transformed]) -> None:
    gm = perexfx.transform(Small(), torch.empty(4, 3, 12, 12))
    twin = copied(gm)
    assert twin.perexfx.plan.bytes_added == gm.perexfx.plan.bytes_added
