"""Lee & Kifer repeated: two rows of a run, and what is said of made-up numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from perexfx.bench import leekifer
from perexfx.bench.leekifer import METHODS, MODELS, SIZES, Measured, Size, fastest, headline, of_model
from perexfx.bench.methods import Taken, Trials

CPU = torch.device("cpu")


def test_two_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = leekifer.run("small", CPU, tmp_path, {"MLP": (3, 5)}, Trials(2, 1))
    assert [(m.model, m.n) for m in found] == [("MLP", 3), ("MLP", 5)]
    assert all(len(taken.seconds) == 2 and not taken.problem for m in found for taken in m.taken.values())
    assert all((m.allocated or {}).keys() == set(METHODS) for m in found)
    assert imread(tmp_path / "leekifer.png").shape[1] == 1200
    raw = json.loads((tmp_path / "leekifer.json").read_text())
    assert raw["rows"][0]["speedups"]["one_by_one"] == 1.0
    page = (tmp_path / "leekifer.md").read_text()
    for words in ("nxBP ms", "MultiLoss ms", "ReweightGP MB", "which bounds all methods", "54x to 94x"):
        assert words in page
    assert "MLP, B 5" in capsys.readouterr().out


@pytest.mark.parametrize("name", MODELS)
def test_their_models(name: str) -> None:
    workload = MODELS[name].at(2)
    if name in ("ResNet-50", "ResNet-101", "VGG-16", "VGG-19"):
        with torch.device("meta"):
            model, x = workload.model(), torch.empty(2, 3, 32, 32)
        assert model(x).shape == (2, 10)
    else:
        model = workload.model()
        assert workload.loss(model(workload.inputs()), workload.targets()).shape == ()
    layers = sum(isinstance(m, torch.nn.Conv2d) and m.kernel_size != (1, 1) for m in model.modules())
    if name.startswith("VGG"):
        assert layers == int(name.removeprefix("VGG-")) - 3
    if name in ("ResNet-18", "ResNet-34"):
        assert layers == int(name.removeprefix("ResNet-")) - 1


def test_what_takes_too_long_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[set[str]] = []

    def taken(runs: dict[str, object], *_: object) -> dict[str, Taken]:
        asked.append(set(runs))
        return {name: Taken(({"one_by_one": 3.0, "losses": 1.0}.get(name, 0.1),)) for name in runs}

    monkeypatch.setattr(leekifer, "in_trials", taken)
    monkeypatch.setattr(leekifer, "peak_allocation", lambda *_: 1)
    how = Size({}, Trials(1, 1), limit=10.0)
    first, second = of_model(MODELS["MLP"], (2, 8), how, CPU)
    assert asked == [set(METHODS), set(METHODS) - {"one_by_one", "losses"}]
    assert not first.predicted
    assert second.predicted == {"one_by_one", "losses"}
    assert second.mean("one_by_one") == 12.0
    assert second.mean("losses") == 16.0
    first, second = of_model(MODELS["MLP"], (2, 8), Size({}, Trials(1, 1), limit=None), CPU)
    assert not second.predicted


def measured(n: int, **seconds: float) -> Measured:
    return Measured("MLP", n, {method: Taken((seconds.get(method, 1.0),)) for method in METHODS})


def test_what_is_said_of_the_headline() -> None:
    rows = [measured(16), measured(128, one_by_one=8.0, perexfx=2.0, reweight_gp=4.0, **{"not private": 1.0})]
    (sentence,) = headline(rows)
    assert "MLP at a batch of 128: a step that is not private is 8.0x as fast as nxBP" in sentence
    assert "ours is 4.0x, ReweightGP 2.0x: 50% of the bound" in sentence
    assert "ours is faster" not in fastest([measured(16, perexfx=2.0)])
    assert "slower than the fastest of their three methods on MLP, B 16 (2.00)" in fastest([measured(16, perexfx=2.0)])
    assert "faster than their three methods on all 1 rows" in fastest([measured(16, perexfx=0.5)])


def test_sizes() -> None:
    assert SIZES["full"].batches.keys() == MODELS.keys()
    assert SIZES["small"].batches["ResNet-18"] == (16,)
    assert not {"ResNet-50", "VGG-19"} & SIZES["medium"].batches.keys()
