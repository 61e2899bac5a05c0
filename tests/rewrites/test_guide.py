"""The guide's table against a loop by hand, and what is no number, no class, or no pathway."""

from __future__ import annotations

import copy
import io
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import perexfx
from perexfx.rewrites import Guidance, Guide

P, C, N = 3, 5, 8


def guide(**options: Any) -> Guide:
    return Guide(P, Guidance(C, **options), dtype=torch.float64)


def some(seed: int, classes: int = C) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(P, N, C, dtype=torch.float64), torch.randint(classes, (N,))


def by_hand(score: str, logits: Tensor, y: int) -> float:
    """One example's score by one pathway."""
    if score == "loss":
        return F.cross_entropy(logits, torch.tensor(y)).item()
    if score == "error":
        return float(logits.argmax().item() != y)
    return 1 - F.softmax(logits, 0)[y].item()


def moved(table: list[list[float | None]], score: str, logits: Tensor, y: Tensor, m: float) -> None:
    """One batch into a table that has None for what was never seen."""
    for p in range(P):
        for c in range(C):
            found = [by_hand(score, logits[p, i], c) for i in range(N) if y[i] == c]
            if found:
                s, old = sum(found) / len(found), table[p][c]
                table[p][c] = s if old is None else m * old + (1 - m) * s


@pytest.mark.parametrize("score", ["loss", "error", "probability"])
@pytest.mark.parametrize("source", ["batch", "given"])
@pytest.mark.parametrize("momentum", [0, 0.5, 0.9])
def test_the_table_is_that_of_a_loop(score: str, source: str, momentum: float) -> None:
    subject = guide(score=score, table_from=source, momentum=momentum)
    table: list[list[float | None]] = [[None] * C for _ in range(P)]
    for seed in range(4):
        logits, y = some(seed, classes=2 + seed)  # the last class is seen in the last batch, or not at all
        if source == "given":
            subject.update(logits if seed % 2 else list(logits), y)
        else:
            subject(logits.sum(0), logits, logits, y)
            assert torch.equal(subject.seen, torch.tensor([row is not None for row in table[0]]))
            expected = torch.tensor([[value or 0.0 for value in row] for row in table], dtype=torch.float64)
            torch.testing.assert_close(subject.weakness, expected, rtol=0, atol=1e-12)
        moved(table, score, logits, y, momentum)
    if source == "batch":
        subject(logits.sum(0), logits, logits)  # a forward without targets takes up what waits, and leaves nothing
        assert not subject.pending_classes.any()
    expected = torch.tensor([[value or 0.0 for value in row] for row in table], dtype=torch.float64)
    torch.testing.assert_close(subject.weakness, expected, rtol=0, atol=1e-12)
    assert torch.equal(subject.seen, torch.tensor([row is not None for row in table[0]]))


def test_coefficients_are_shares() -> None:
    subject = guide()
    assert torch.equal(subject.coefficients(), torch.full((P, C), 1 / P, dtype=torch.float64))
    subject.weakness.copy_(torch.rand(P, C))
    W = subject.weakness + 1e-3
    torch.testing.assert_close(subject.coefficients(), W / W.sum(0))
    cold = guide(temperature=0.001)
    cold.weakness.copy_(subject.weakness)
    weakest = guide(choose="weakest")
    weakest.weakness.copy_(subject.weakness)
    torch.testing.assert_close(cold.coefficients(), weakest.coefficients(), rtol=0, atol=1e-3)
    assert set(weakest.coefficients().unique().tolist()) == {0.0, 1.0}


def test_ties_of_the_weakest_are_split() -> None:
    subject = guide(choose="weakest")
    subject.weakness[:, 0] = torch.tensor([2.0, 1.0, 2.0])
    subject.weakness[:, 1] = torch.tensor([1.0, 1.0, 3.0])
    assert subject.coefficients()[:, 0].tolist() == [0.5, 0.0, 0.5]
    assert subject.coefficients()[:, 1].tolist() == [0.0, 0.0, 1.0]
    assert torch.equal(subject.coefficients()[:, 2], torch.full((P,), 1 / P, dtype=torch.float64))


def test_the_weakest_choice_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="perexfx"):
        guide()
        assert not caplog.records
        guide(choose="weakest")
    (record,) = caplog.records
    assert record.name == "perexfx"
    assert "some are starved" in record.getMessage()


@pytest.mark.parametrize("score", ["loss", "error", "probability"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_does_not_enter_the_table(score: str, value: float) -> None:
    subject = guide(score=score, table_from="given", momentum=0.5)
    logits, _ = some(0)
    y = torch.arange(N) % 2
    subject.update(logits, y)
    before = subject.weakness.clone()
    logits[1, 0, 0] = value  # the target's logit of an example of class 0, by one pathway
    subject.update(logits, y)
    assert subject.weakness.isfinite().all()
    if torch.tensor(value).isnan() or (score == "loss" and value < 0):
        assert torch.equal(subject.weakness[:, 0], before[:, 0])  # of no pathway: shares would be of different batches
    torch.testing.assert_close(subject.weakness[:, 1], before[:, 1])


def test_a_logit_without_bound_that_is_right_scores_as_it_should() -> None:
    """What is masked for another class leaves finite scores, which count."""
    subject = guide(table_from="given")
    logits, _ = some(0)
    logits[:, :, 4] = -torch.inf
    subject.update(logits, torch.zeros(N, dtype=torch.long))
    assert subject.seen.tolist() == [True, False, False, False, False]
    torch.testing.assert_close(
        subject.weakness[:, 0], torch.stack([F.cross_entropy(each[:, :4], torch.zeros(N).long()) for each in logits])
    )


def test_the_last_of_a_state_dict_is_what_waits() -> None:
    subject = guide()
    for seed in range(2):
        logits, y = some(seed)
        subject(logits.sum(0), logits, logits, y)
    file = io.BytesIO()
    torch.save(subject.state_dict(), file)
    file.seek(0)
    other = guide()
    other.load_state_dict(torch.load(file))
    logits, y = some(2)
    for each in (subject, other, copy.deepcopy(other)):
        each(logits.sum(0), logits, logits, y)
        assert torch.equal(each.weakness, subject.weakness)
    assert set(subject.state_dict()) == {"weakness", "seen", "pending", "pending_classes"}


def test_gradients_do_not_pass_the_table() -> None:
    subject = guide(momentum=0.5)
    logits, y = some(0)
    logits.requires_grad_()
    for _ in range(3):
        subject(logits.sum(0), logits, logits, y)
    assert not any(value.requires_grad for value in subject.buffers())


def test_in_eval_nothing_moves() -> None:
    subject = guide().eval()
    logits, y = some(0)
    for _ in range(2):
        assert torch.equal(subject(logits.sum(0), logits, logits, y), logits.sum(0))
    assert not subject.weakness.any()
    assert not subject.pending_classes.any()


def test_minus_zero_stays_minus_zero() -> None:
    for per in ("class", "target"):
        subject = guide(per=per)
        logits = -torch.zeros(P, N, C, dtype=torch.float64)
        merged = -torch.zeros(N, C, dtype=torch.float64)
        assert subject(merged, logits, logits, torch.zeros(N, dtype=torch.long)).signbit().all()
        subject.weakness.copy_(torch.rand(P, C))
        assert subject.eval()(merged, some(0)[0], logits).signbit().all()


def test_an_update_of_another_table() -> None:
    with pytest.raises(perexfx.ArgumentError) as error:
        guide().update(*some(0))
    assert str(error.value) == (
        'This guide\'s table follows the batches (table_from="batch"). Pass `table_from="given"` to `guide_logits` to '
        "update it yourself."
    )


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (
            torch.zeros(2, N, C),
            "`logits` should be those of 3 pathways: a tensor of shape [3, n, 5], or a list. Found 2.",
        ),
        (
            [torch.zeros(N, C)] * 4,
            "`logits` should be those of 3 pathways: a tensor of shape [3, n, 5], or a list. Found 4.",
        ),
        (torch.tensor(1.0), "a tensor of shape [3, n, 5], or a list. Found Tensor."),
        (None, "a tensor of shape [3, n, 5], or a list. Found NoneType."),
        (torch.zeros(P, N, 4), "The logits of pathway 0 should have shape [8, 5]: examples first"),
        ([torch.zeros(N, C), torch.zeros(3, C), torch.zeros(N, C)], "The logits of pathway 1 should have shape [8, 5]"),
        ([torch.zeros(N, C), 3, torch.zeros(N, C)], "and `num_classes` classes. Found int."),
        (torch.zeros(P, C), "The logits of pathway 0 should have shape [5, 5]"),
    ],
)
def test_logits_that_are_none(logits: Any, message: str) -> None:
    with pytest.raises(perexfx.ArgumentError) as error:
        guide(table_from="given").update(logits, torch.zeros(N, dtype=torch.long))
    assert message in str(error.value)


def test_targets_of_an_update() -> None:
    subject = guide(table_from="given")
    with pytest.raises(perexfx.ArgumentError) as error:
        subject.update(some(0)[0], torch.full((N,), C))
    assert str(error.value) == (
        "`targets` should be the classes of the 8 examples: integers from 0 to 4, of shape [8]. Found 5."
    )
    assert not subject.seen.any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_any_integers_are_classes(dtype: torch.dtype) -> None:
    logits, y = some(0)
    for per in ("class", "target"):
        subject, other = guide(per=per), guide(per=per)
        for _ in range(2):
            out = subject(logits.sum(0), logits, logits, y.to(dtype))
            assert torch.equal(out, other(logits.sum(0), logits, logits, y))
        assert torch.equal(subject.weakness, other.weakness)


def test_a_batch_of_no_examples() -> None:
    subject = guide(per="target")
    empty = torch.zeros(P, 0, C, dtype=torch.float64)
    for _ in range(2):
        assert subject(empty.sum(0), empty, empty, torch.zeros(0, dtype=torch.long)).shape == (0, C)
    assert not subject.seen.any()
    assert subject.weakness.isfinite().all()


def test_what_a_guide_says_of_itself() -> None:
    subject = guide(table_from="given", temperature=0.5)
    subject.update(some(0)[0], torch.tensor([0, 0, 1, 1, 3, 3, 3, 3]))
    assert repr(subject) == (
        "Guide(3 pathways, 5 classes, score=loss, choose=soft, temperature=0.5, per=class, momentum=0.9, "
        "table_from=given, 3 classes seen)"
    )
    assert "choose=weakest, per=target" in repr(guide(choose="weakest", per="target"))
