"""Rochette et al. repeated: two points of a run, and what is said of made-up numbers."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from torch import nn

from perexfx.bench import rochette
from perexfx.bench.methods import NOT_PRIVATE, OURS, Taken, Trials, in_trials
from perexfx.bench.paper_models import toy, toy_channels, vgg
from perexfx.bench.rochette import METHODS, SIZES, Measured, Point, claims, envelope, points
from perexfx.bench.workloads import numbers
from perexfx.ir.errors import ArgumentError

CPU = torch.device("cpu")


def test_two_points(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [
        Point("2 layers, kernel 3", rate, numbers(f"rate {rate:g}", partial(toy, channels, 3, 8), 3, 3, 8, 8))
        for rate, channels in ((1.0, toy_channels(2, 1.0, 4)), (2.0, toy_channels(2, 2.0, 4)))
    ]
    found = rochette.run("small", CPU, tmp_path, chosen, Trials(2, 1))
    assert [set(m.taken) for m in found] == [set(METHODS)] * 2
    assert all(len(taken.seconds) == 2 and not taken.problem for m in found for taken in m.taken.values())
    assert imread(tmp_path / "rochette.png").shape[1] == 1200
    raw = json.loads((tmp_path / "rochette.json").read_text())
    assert [point["beside_theirs"] for point in raw["points"]] == [m.beside_theirs for m in found]
    page = (tmp_path / "rochette.md").read_text()
    for words in ("naive ms", "multi ms", "crb ms", "that crb gains on multi", "Published for VGG-16", "Ours takes"):
        assert words in page
    assert "rate 2" in capsys.readouterr().out


def test_their_networks() -> None:
    assert toy_channels(4, 1.75) == [25, 44, 77, 134]
    model = toy([25, 50, 100], 5, 32)
    assert [type(layer).__name__ for layer in model] == (
        ["Conv2d", "ReLU", "Conv2d", "ReLU", "MaxPool2d", "Conv2d", "ReLU", "Flatten", "Linear"]
    )
    assert all(layer.padding == (2, 2) and layer.stride == (1, 1) for layer in model if isinstance(layer, nn.Conv2d))
    for kernel in (3, 5):
        assert toy([4, 4, 4, 4], kernel, 16)(torch.randn(2, 3, 16, 16)).shape == (2, 10)
    layers = [layer for layer in vgg(16, pixels=32, width=4) if isinstance(layer, nn.Conv2d)]
    assert len(layers) == 13
    assert vgg(16, pixels=64, width=4)(torch.randn(2, 3, 64, 64)).shape == (2, 10)


def test_the_points_of_each_size() -> None:
    full = list(points(SIZES["full"]))
    assert len(full) == 3 * 2 * 5 + 6 + 2
    small = {(point.figure, point.value) for point in points(SIZES["small"])}
    assert small <= {(point.figure, point.value) for point in full}
    assert ("2 layers, kernel 5", 16.0) in small
    workload = full[0].workload
    assert workload.inputs().shape == (8, 3, 256, 256)


def measured(figure: str, value: float, **seconds: float) -> Measured:
    taken = {method: Taken((seconds.get(method, 1.0),)) for method in METHODS}
    return Measured(figure, value, f"{figure} {value:g}", taken)


def test_what_is_said_of_their_claims() -> None:
    group = [
        measured("2 layers, kernel 3", 1, chain_rule=2.0, copies=1.0),
        measured("2 layers, kernel 3", 2, chain_rule=1.0, copies=2.0),
        measured("2 layers, kernel 5", 1, chain_rule=1.0, copies=1.0),
        measured("2 layers, kernel 5", 2, chain_rule=3.0, copies=1.0),
        measured("AlexNet", 16, chain_rule=1.0, copies=2.0),
        measured("VGG-16", 8, chain_rule=1.0, copies=2.0),
    ]
    text = "\n".join(claims(group))
    assert "2 layers, kernel 3: that crb gains on multi as the channel rate grows holds here" in text
    assert "goes from 2.00 to 0.50, and ends below 1" in text
    assert "2 layers, kernel 5: that crb gains on multi as the channel rate grows does not hold here" in text
    assert "That larger kernels favour crb does not hold here" in text
    assert "AlexNet: that it favours crb holds here" in text
    assert "VGG-16: that it favours multi does not hold here" in text


def test_what_is_said_of_the_envelope() -> None:
    under, above = measured("f", 1, perexfx=0.5), measured("f", 2, perexfx=1.5)
    assert under.beside_theirs == 0.5
    assert "on or under it at every point" in envelope([under])
    assert "above their envelope at f 2 (1.50)" in envelope([under, above])


def test_what_fails_has_its_reason() -> None:
    def refuses() -> None:
        raise ArgumentError("no such layer.\nmore")

    def takes_too_much() -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    runs = {"a": lambda: None, "b": refuses, "c": takes_too_much}
    found = in_trials(runs, Trials(2, 3), CPU)
    assert len(found["a"].seconds) == 2
    assert found["b"].problem == "refused: no such layer."
    assert found["c"].problem.startswith("out of memory: ")
    with pytest.raises(RuntimeError, match="other"):
        in_trials({"d": lambda: (_ for _ in ()).throw(RuntimeError("other"))}, Trials(1, 1), CPU)


def test_slow_steps_are_timed_one_by_one() -> None:
    how = Trials(3, 3, limit=20.0)
    assert how.of(0.1) == (3, 3)
    assert how.of(2.0) == (3, 3)
    assert how.of(4.0) == (3, 1)
    assert how.of(9.0) == (2, 1)
    assert how.of(55.0) == (1, 1)
    assert Trials(10, 20).of(1e6) == (10, 20)
    calls: list[int] = []
    slow = Trials(3, 3, limit=-1.0)
    found = in_trials({"a": lambda: calls.append(1) or time.sleep(0.5)}, slow, CPU)
    assert len(found["a"].seconds) == 1
    assert len(calls) == 2


def test_methods_have_the_papers_names() -> None:
    assert (METHODS[0], METHODS[-1]) == (NOT_PRIVATE, OURS)
    assert list(rochette.THEIRS.values()) == ["naive", "multi", "crb"]
