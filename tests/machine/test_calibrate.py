"""Fits find the rates that made the timings."""

from __future__ import annotations

import pytest

from perexfx.cli import main
from perexfx.ir.convolution import ConvolutionSignature
from perexfx.ir.cost import Cost, Work
from perexfx.ir.cost_model import BUILT_IN, Machine, Rate
from perexfx.ir.factors import GradientSignature, ProductSignature, RowsSignature
from perexfx.kernels.geometry import ConvolutionGeometry
from perexfx.machine import calibrate, on_disk


def test_a_fit_finds_the_rates_behind_the_timings() -> None:
    true = Machine("true", {"a": Rate(2e9, 5e8, 1e-4), "b": Rate(float("inf"), 1e9, 3e-5)})
    costs = [
        Cost((Work("a", flops=f, bytes=m, calls=c), Work("b", bytes=m, calls=1)), 0)
        for f, m, c in (
            (10**7, 10**5, 1),
            (10**5, 10**7, 2),
            (10**6, 10**6, 9),
            (1, 1, 40),
            (10**8, 10**4, 3),
            (5, 10**6, 1),
        )
    ]
    costs += [Cost((Work("b", bytes=m, calls=c),), 0) for m, c in ((10**6, 1), (10, 4))]
    seen = [calibrate.Observation(str(at), "s", cost, true.seconds(cost)) for at, cost in enumerate(costs)]
    found = calibrate.fit(seen, "found")
    for observation in seen:
        assert found.seconds(observation.cost) == pytest.approx(observation.seconds, rel=1e-3)
    assert found.rates["a"].flop_rate == pytest.approx(2e9, rel=1e-2)
    assert found.rates["gemm"] == BUILT_IN.rates["gemm"]  # nothing was seen of it
    touched = Rate(float("inf"), 7e9, 0.0)
    assert calibrate.fit(seen, "found", {"first_touch": touched}).rates["first_touch"] == touched
    good = calibrate.quality(found, seen)
    assert good.error == pytest.approx(1, abs=1e-3)
    assert good.regret == 1


def test_new_memory_is_measured() -> None:
    found = calibrate.first_touch()
    assert 0 < found.byte_rate < float("inf")
    assert found.seconds(Work("first_touch", bytes=1 << 30)) > 0


def test_regret_is_the_price_of_the_wrong_choice() -> None:
    cheap, dear = Cost((Work("a", calls=1),), 0), Cost((Work("a", calls=2),), 0)
    seen = [calibrate.Observation("size", "x", cheap, 3.0), calibrate.Observation("size", "y", dear, 1.0)]
    quality = calibrate.quality(Machine("m", {"a": Rate(1, 1, 1.0)}), seen)
    assert quality.regret == pytest.approx(3)
    assert quality.worst == (3.0, "size")


def test_calibrate_from_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    slide = ConvolutionGeometry((1, 1), (1, 1), (1, 1), 1)
    small = [
        ConvolutionSignature(2, 1, (6, 6), (6, 6), (4, 3, 3, 3), slide),
        ConvolutionSignature(2, 1, (6, 6), (6, 6), (4, 3, 3, 3), slide, channels_last=True),
        ProductSignature(4, 1, 3, 5, 6, (6, 5)),
        ProductSignature(4, 1, 1, 5, 6, (6, 5)),
        RowsSignature(3, 4, 10, 2),
        GradientSignature(3, (7,)),
    ]
    monkeypatch.setattr(calibrate, "signatures", lambda: small)
    monkeypatch.setattr(calibrate, "IMAGES", [(2, 3, 4, 6, 3, 1)])
    assert main(["calibrate"]) == 0
    machine = on_disk.current()
    assert machine is not BUILT_IN
    assert machine.rates.keys() == BUILT_IN.rates.keys()
    assert machine.name in " ".join(capsys.readouterr().out.split())
    assert all(rate.flop_rate > 0 and rate.byte_rate > 0 and rate.per_call >= 0 for rate in machine.rates.values())
