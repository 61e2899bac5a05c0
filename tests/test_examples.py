"""The examples run, in small, and their results are what they say they are."""

from __future__ import annotations

import importlib
import json
import math
import statistics
from pathlib import Path
from types import ModuleType

import pytest
import torch
from scipy.stats import t

EXAMPLES = Path(__file__).parent.parent / "examples"
pytest.importorskip("mlxtend", reason="the extra `examples` brings it")


@pytest.fixture
def guided_columns(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("guided_columns")


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("guided_columns_results")


def test_guided_columns_runs(guided_columns: ModuleType, tmp_path: Path) -> None:
    small = "--seeds 1 --epochs 1 --data digits,mnist-long-tail --limit 200 --out"
    runs = guided_columns.main([*small.split(), str(tmp_path)])
    methods = list(guided_columns.METHODS)
    assert [(r.data, r.method) for r in runs] == [(d, m) for d in ("digits", "mnist-long-tail") for m in methods]
    assert len({r.start for r in runs}) == 1
    assert len({tuple(r.columns) for r in runs if r.data == "digits"}) > 3  # and they do not end alike
    for r in runs:
        assert r.weakest == min(r.columns)
        assert sum(r.counts) == 200
        assert (r.weakness is not None) == r.method.startswith("guided")
    written = json.loads((tmp_path / "guidebp.json").read_text())
    assert written["settings"]["epochs"] == 1
    compared_with = {row["method"]: row["baseline"] for row in written["summary"]}
    assert {compared_with[m] for m in methods if "guided" not in m or "lr" not in m} == {"plain sum"}
    assert {compared_with[m] for m in methods if "guided" in m and "lr" in m} == {"plain sum, lr 6e-3"}
    for row in written["summary"]:
        ours, plain = (
            next(r for r in runs if (r.data, r.method) == (row["data"], m)) for m in (row["method"], row["baseline"])
        )
        for measure in ("ensemble", "weakest"):
            assert row[measure]["difference"] == getattr(ours, measure) - getattr(plain, measure)
    assert (tmp_path / "guidebp_results.md").read_text().count("\n| ") == 2 + 2 * len(methods)
    for name in ("guidebp.png", "guidebp_weakness.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_every_seed_has_its_own_weights_and_columns_differ(guided_columns: ModuleType) -> None:
    first, again, other = (guided_columns.build(seed) for seed in (0, 0, 1))
    digest = guided_columns.digest
    assert digest(torch.nn.ModuleList(first)) == digest(torch.nn.ModuleList(again))
    assert digest(torch.nn.ModuleList(first)) != digest(torch.nn.ModuleList(other))
    assert len({digest(column) for column in first}) == 3


def test_splits_are_apart_and_the_test_is_balanced(guided_columns: ModuleType) -> None:
    x, y = torch.arange(2000).view(-1, 1, 1, 1), torch.arange(10).repeat_interleave(200)
    plain, tail = (guided_columns.split(x, y, 3, long_tail=tailed, limit=None) for tailed in (False, True))
    for given in (plain, tail):
        assert not set(given.x.flatten().tolist()) & set(given.test_x.flatten().tolist())
        assert given.test_y.bincount().tolist() == [40] * 10
        assert torch.equal(y[given.x.flatten()], given.y)
    assert plain.y.bincount().tolist() == [160] * 10
    assert sorted(tail.y.bincount().tolist()) == [3, 5, 8, 12, 18, 28, 43, 67, 104, 160]
    assert torch.equal(plain.test_x, tail.test_x)


def test_recall_counts_classes_alike(guided_columns: ModuleType) -> None:
    y = torch.tensor([0, 0, 0, 1])
    assert guided_columns.recall(torch.tensor([[1.0, 0.0]]).expand(4, 2), y) == 50.0


def test_differences_are_paired(results: ModuleType) -> None:
    ours, plain = [91.0, 84.0, 77.5, 90.0], [90.0, 82.5, 78.0, 90.0]
    found = results.compared(ours, plain)
    d = [1.0, 1.5, -0.5, 0.0]
    assert found["difference"] == statistics.fmean(d)
    assert math.isclose(found["error"], statistics.stdev(d) / 2)
    assert math.isclose(found["p"], 2 * float(t.sf(found["difference"] / found["error"], df=3)))
    assert (found["wins"], found["losses"]) == (2, 1)
    assert results.compared(plain, plain)["p"] is None  # nothing differs, and nothing is divided by
