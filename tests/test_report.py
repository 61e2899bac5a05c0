"""The report is a deterministic table with a line per site."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import perexfx
from perexfx.bench.models import ResNet18

GOLDEN = Path(__file__).parent / "golden"


class Mixed(nn.Module):
    """A site of every kind that the report words differently."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(100, 16), nn.Parameter(torch.zeros(12, 16))
        self.conv, self.norm = nn.Conv1d(16, 32, 3, stride=2, padding=1, groups=2), nn.GroupNorm(4, 32)
        self.shared, self.head = nn.Linear(32, 32), nn.Linear(32, 10)

    def forward(self, ids: Tensor) -> Tensor:
        x = (self.embedding(ids) + self.positions).transpose(1, 2)
        x = self.norm(self.conv(x)).mean(2)
        return self.head(self.shared(torch.tanh(self.shared(x))))


def check(name: str, text: str) -> None:
    """Compares with a golden file; `UPDATE_GOLDEN=1` writes it anew."""
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text + "\n")
    assert text + "\n" == path.read_text()


def test_golden_mixed() -> None:
    gm = perexfx.transform(Mixed(), torch.zeros(8, 12, dtype=torch.long))
    check("mixed.txt", str(perexfx.report(gm)))


def test_golden_resnet_under_a_budget() -> None:
    x = torch.zeros(8, 3, 32, 32)
    gm = perexfx.transform(ResNet18(width=16), x, clip_norm=0.5, clipping="automatic", memory_budget=0)
    check("resnet_budget.txt", str(perexfx.report(gm)))


def test_golden_forced() -> None:
    gm = perexfx.transform(Mixed(), torch.zeros(8, 12, dtype=torch.long), clip_norm=None, strategy="gram")
    check("forced.txt", str(perexfx.report(gm)))


def test_it_says_the_same_after_the_first_batch() -> None:
    ids = torch.zeros(8, 12, dtype=torch.long)
    gm = perexfx.transform(Mixed())
    gm(ids)
    assert str(perexfx.report(gm)) == str(perexfx.report(perexfx.transform(Mixed(), ids)))


def test_rows_add_up_to_the_plan() -> None:
    gm = perexfx.transform(Mixed(), torch.zeros(8, 12, dtype=torch.long))
    report, plan = perexfx.report(gm), gm.perexfx.plan
    assert [row.site for row in report.rows] == [site.name for site in gm.perexfx.sites]
    assert sum(row.seconds for row in report.rows) == pytest.approx(plan.seconds)
    assert sum(row.bytes_held for row in report.rows) == sum(d.chosen.bytes_held for d in plan.decisions)


def test_without_a_plan_or_a_transform() -> None:
    with pytest.raises(perexfx.ArgumentError, match="There is no plan yet"):
        perexfx.report(perexfx.transform(Mixed()))
    with pytest.raises(perexfx.ArgumentError, match=r"should come from `perexfx.transform`. Found Mixed"):
        perexfx.report(Mixed())
