"""Full and reduced batches in turn."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import perexfx
from perexfx.rewrites import Interleaved
from perexfx.schedules import Every, Then

X, Y = torch.randn(6, 3, 12, 12), torch.tensor([0, 1, 1, 0, 2, 1])


def net(norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    torch.manual_seed(0)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    middle = norm(8) if norm is nn.BatchNorm2d else nn.GroupNorm(2, 8)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), middle, nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), *head)


def pair(schedule: perexfx.schedules.Schedule, statistics: str = "full") -> Interleaved:
    model = net()
    return perexfx.interleave(model, perexfx.downsample(model, X), schedule, statistics)


def test_batches_follow_the_schedule_and_share_parameters() -> None:
    both = pair(Every(2))
    assert len(list(both.parameters())) == len(list(both.full.parameters()))
    seen = []
    for _ in range(5):
        both(X)
        seen.append(both.last is both.reduced)
    assert seen == [False, True, False, True, False]
    assert int(both.steps) == 5
    both.eval()
    both(X)
    assert both.last is both.full
    assert int(both.steps) == 5


def test_statistics_are_those_of_full_batches() -> None:
    both = pair(Then(2))
    norm = both.full[1]
    assert isinstance(norm, nn.BatchNorm2d)
    before = copy.deepcopy(norm.state_dict())
    both(X), both(X)
    assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())
    both(X)
    assert int(norm.num_batches_tracked or 0) == 1
    assert not torch.equal(before["running_mean"], norm.running_mean if norm.running_mean is not None else X)


def test_reduced_models_normalise_by_their_batch_in_training_and_by_statistics_in_evaluation() -> None:
    both = pair(Every(1))
    reduced = both.reduced
    torch.manual_seed(3)
    one = reduced(X[:2])
    torch.manual_seed(3)
    assert not torch.allclose(one, reduced(X)[:2])
    reduced.eval()
    torch.testing.assert_close(reduced(X[:2]), reduced(X)[:2])


def test_the_counter_is_saved_with_the_rest() -> None:
    both, other = pair(Every(3)), pair(Every(3))
    for _ in range(4):
        both(X)
    other.load_state_dict(both.state_dict())
    assert int(other.steps) == 4
    copied = copy.deepcopy(both)
    for each in (other, copied):
        each(X), each(X)
        assert each.last is each.reduced
    shared = set(map(id, copied.full.parameters())) ^ set(map(id, copied.reduced.parameters()))
    assert not shared


def test_estimated_afresh() -> None:
    both = pair(Every(2), "reestimated")
    both(X), both(X)
    both.eval()
    with pytest.raises(perexfx.ModeError, match=r"Call `.reestimate\(batches\)`"):
        both(X)
    both.reestimate([X[:3], (X[3:],), {"input": X[:3]}])
    norm = both.full[1]
    assert isinstance(norm, nn.BatchNorm2d)
    first = both.full[0]
    assert isinstance(first, nn.Conv2d)
    with torch.no_grad():
        means = torch.stack([first(part).mean((0, 2, 3)) for part in (X[:3], X[3:], X[:3])]).mean(0)
    torch.testing.assert_close(norm.running_mean, means)
    assert norm.momentum == 0.1
    assert not both.full.training
    both(X)
    both.train()
    both(X)
    both.eval()
    with pytest.raises(perexfx.ModeError, match="afresh"):
        both(X)
    with pytest.raises(perexfx.ArgumentError, match="one batch of inputs at least"):
        both.reestimate([])


def test_private_training_takes_both_transformed() -> None:
    model = net(nn.GroupNorm)
    parts = (perexfx.transform(m, X, clip_norm=0.1) for m in (model, perexfx.downsample(model, X)))
    both = perexfx.interleave(*parts, Every(2))
    optimizer = torch.optim.SGD(both.parameters(), lr=0.1)
    seen: list[Tensor] = []
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(both(X), Y).backward()
        assert both.last is not None
        seen.append(both.last.perexfx.norms)
        total = torch.cat([p.grad.flatten() for p in both.parameters() if p.grad is not None])
        assert float(total.norm()) <= 0.1 * (1 + 1e-6)
        optimizer.step()
    assert not torch.allclose(seen[0], seen[1])
    with pytest.raises(perexfx.ArgumentError, match="Transform both and interleave what comes out"):
        perexfx.transform(perexfx.interleave(model, perexfx.downsample(model, X), Every(2)), X)


def test_mistakes() -> None:
    model = net()
    reduced = perexfx.downsample(model, X)
    with pytest.raises(perexfx.ArgumentError, match=r"should share their parameters, and `0.weight`"):
        perexfx.interleave(net(), reduced, Every(2))
    with pytest.raises(perexfx.ArgumentError, match=r"`schedule` should be one of `perexfx.schedules`"):
        perexfx.interleave(model, reduced, 2)  # pyright: ignore[reportArgumentType]
    with pytest.raises(perexfx.ArgumentError, match="`statistics` should be one of 'full', 'reestimated'"):
        perexfx.interleave(model, reduced, Every(2), "both")
    with pytest.raises(perexfx.ArgumentError, match=r"`reduced` should be a torch.nn.Module"):
        perexfx.interleave(model, 3, Every(2))  # pyright: ignore[reportArgumentType]
