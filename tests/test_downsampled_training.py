"""The experiment of `examples/downsampled_training.py`, with a handful of steps."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

for name in ("mlxtend", "matplotlib", "rich", "scipy", "tqdm"):
    pytest.importorskip(name)

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = ("downsampled_training", "report_of_downsampling")


@pytest.fixture(scope="module")
def script() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module(NAMES[0])
        for name in NAMES:
            sys.modules.pop(name, None)


@pytest.fixture
def report(script: ModuleType) -> ModuleType:
    return sys.modules[NAMES[1]]


def test_runs_of_a_seed_are_paired_and_their_times_are_shares(script: ModuleType, tmp_path: Path) -> None:
    given = f"--seeds 1 --steps 4 --digits 64 --rounds 1 --nets vgg --settings .5 --private --out {tmp_path}"
    runs, rows = script.main(given.split())
    of_nets = {net: [run for run in runs if run.net == net] for net in ("vgg", "private resnet")}
    assert [len(some) for some in of_nets.values()] == [5, 4]
    starts = [{run.start for run in some} for some in of_nets.values()]
    assert [len(some) for some in starts] == [1, 1]
    assert starts[0] != starts[1]
    assert [(run.steps, run.share) for run in of_nets["vgg"][:4]] == [(4, 1.0), (3, 0.75), (2, 0.5), (4, 1.0)]
    assert {row.setting: row.fraction for row in rows if row.net == "vgg"}["then .5, side"] == 0.5
    assert {row.relative_time for row in rows if row.setting == "skip, 50% of steps"} == {0.5}
    assert all(0 < row.relative_time < 1.5 for row in rows)
    assert all(row.relative_time == pytest.approx(1 - row.fraction * (1 - row.ratio)) for row in rows if row.fraction)
    assert json.loads((tmp_path / "downsampling.json").read_text())["rows"][0]["setting"] == "full"
    assert "| then .5, galerkin, until stage2 | 0.50 |" in (tmp_path / "downsampling_results.md").read_text()
    assert (tmp_path / "downsampling.png").stat().st_size


def test_fewer_steps_take_the_first_batches_of_more(script: ModuleType) -> None:
    many, few = script.batches(3, 100, 12), script.batches(3, 100, 7)
    assert [batch.tolist() for batch in few] == [batch.tolist() for batch in many[:7]]
    assert script.batches(4, 100, 1)[0].tolist() != few[0].tolist()
    assert sorted({len(batch) for batch in many}) == [32]


def test_splits_share_no_digit_and_leave_those_for_tuning_out(script: ModuleType) -> None:
    train, test = (set(some.tolist()) for some in script.split(5, 2000))
    assert len(train | test) == 4000
    assert min(train | test) == 1000


def test_the_control_at_equal_time(report: ModuleType) -> None:
    known = [(1.0, 0.9), (0.5, 0.7), (0.75, 0.8)]
    assert report.between(0.6, known) == pytest.approx(0.74)
    assert report.between(0.4, known) is None
    assert [report.equal_at(accuracy, known) for accuracy in (0.6, 0.75, 0.95)] == ["< 0.50", "0.62", "> 1.00"]


def test_rows_compare_seed_by_seed(report: ModuleType) -> None:
    def run(setting: str, seed: int, accuracy: float, share: float = 1.0, fraction: float = 0.0) -> dict[str, Any]:
        form = "side, whole" if fraction else "full"
        same = {"net": "vgg", "form": form, "seed": seed, "share": share, "fraction": fraction}
        return {"setting": setting, "accuracy": accuracy, **same}

    runs = [run("full", 0, 0.8), run("full", 1, 0.9), run("skip", 0, 0.7, 0.5), run("skip", 1, 0.7, 0.5)]
    runs += [run("cheap", 0, 0.77, fraction=0.5), run("cheap", 1, 0.85, fraction=0.5)]
    full, skip, cheap = report.rows_of(runs, {"vgg": {"full": 0.02, "side, whole": 0.01}})
    assert full.to_full is None
    assert skip.to_full.mean == pytest.approx(-0.15)
    assert cheap.relative_time == 0.75
    assert cheap.to_full.mean == pytest.approx(-0.04)
    assert cheap.to_full.error == pytest.approx(0.01)
    assert cheap.to_skip.mean == pytest.approx(0.035)  # 0.77 - 0.75, 0.85 - 0.80
    assert cheap.equal_at == "0.87"
