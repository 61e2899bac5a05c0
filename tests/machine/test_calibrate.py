"""Profiles are kept and read back, fits find the rates that made the timings, and measurements are taken once."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

import perexfx
from perexfx.cli import main
from perexfx.ir.convolution import ConvolutionSignature
from perexfx.ir.cost import Cost, Work
from perexfx.ir.factors import GradientSignature, ProductSignature, RowsSignature
from perexfx.ir.machine import BUILT_IN, Machine, Rate
from perexfx.kernels.geometry import ConvolutionGeometry
from perexfx.machine import calibrate, on_disk, timings
from perexfx.strategies import STRATEGIES


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder of its own for each test."""
    monkeypatch.setenv("PEREXFX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


SLOW = Machine(
    "slow", {kind: Rate(r.flop_rate / 7, r.byte_rate / 7, r.per_call * 7) for kind, r in BUILT_IN.rates.items()}
)


def test_a_profile_is_kept_for_this_machine_and_number_of_threads() -> None:
    assert on_disk.current() is BUILT_IN
    path = on_disk.save(SLOW)
    assert on_disk.current() == SLOW
    gm = perexfx.transform(nn.Linear(3, 2), torch.randn(4, 3))
    assert gm.perexfx.plan is not None
    assert gm.perexfx.plan.machine == "slow"
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert on_disk.current() is BUILT_IN
    finally:
        torch.set_num_threads(threads)
    assert str(threads) in path.name
    assert torch.__version__ in path.name


@pytest.mark.parametrize("content", ["", "{", json.dumps({"name": "old", "rates": {}}), json.dumps([1])])
def test_a_broken_profile_counts_as_none_and_says_so(
    content: str, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = on_disk.save(SLOW)
    path.write_text(content)
    with caplog.at_level(logging.WARNING, "perexfx"):
        assert on_disk.current() is BUILT_IN
    assert str(cache) in caplog.text


def test_a_folder_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PEREXFX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert on_disk.folder() == tmp_path / "perexfx"


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


def test_measured_plans_time_each_size_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[object] = []
    plain = timings.measure

    def counted(candidates, signature, dtype, device):
        sizes.append(signature)
        seconds = plain(candidates, signature, dtype, device)
        return {name: 1.0 if name == "materialize" else 2.0 for name in seconds}

    monkeypatch.setattr(timings, "measure", counted)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    x = torch.randn(5, 4, 6)
    gm = perexfx.transform(model, x, cost_model="measured")
    plan = gm.perexfx.plan
    assert plan is not None
    assert "measurements" in plan.machine
    assert {plan[site.name] for site in gm.perexfx.sites} == {"materialize"}
    assert len(sizes) == len(set(sizes))
    before = len(sizes)
    timings._remembered.cache_clear()  # as in another process
    perexfx.transform(model, x, cost_model="measured")
    assert len(sizes) == before


def test_random_factors_have_their_signature() -> None:
    slide = ConvolutionGeometry((2, 1), (1, 0), (1, 2), 2)
    for signature in (
        ConvolutionSignature(3, 2, (6, 7), (3, 3), (4, 2, 3, 3), slide),
        ProductSignature(4, 2, 3, 5, 6, (12, 5)),
        RowsSignature(3, 4, 10, 2),
        GradientSignature(3, (7, 2)),
    ):
        factors = timings.random_factors(signature, torch.float64, torch.device("cpu"))
        assert factors.signature == signature
        norms = [s.squared_norms(factors)[0] for s in STRATEGIES if s.refuses(signature) is None]
        for found in norms[1:]:
            torch.testing.assert_close(found, norms[0])


def test_an_unknown_cost_model() -> None:
    with pytest.raises(perexfx.PerexError, match="cost_model"):
        perexfx.transform(nn.Linear(2, 2), cost_model="guess")
