"""Reduced steps beside full ones: one network, and what its table says."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from perexfx.bench import downsampled
from perexfx.bench.measure import CPU, Timing
from perexfx.bench.workloads import numbers


def test_ratios_are_of_steps_of_one_kind() -> None:
    full = {"full": 4.0, "side": 1.0, "galerkin": 2.0}
    seconds = full | {"private full": 5.0, "private side": 2.0, "private galerkin": 6.0}
    found = downsampled.Measured("net", Timing({name: (value,) for name, value in seconds.items()}), 0.3)
    assert (found.ratio("side"), found.private_ratio("side")) == (0.25, 0.4)
    assert (found.ratio("galerkin"), found.private_ratio("galerkin")) == (0.5, 1.2)


def test_one_network_is_measured_and_written(tmp_path: Path) -> None:
    net = numbers("tiny", partial(downsampled.small_resnet, (8, 8, 8)), 2, 3, 8, 8)
    (found,) = downsampled.run(1, CPU, tmp_path, [net])
    assert set(found.timing.seconds) == {
        f"{kind}{step}" for kind in ("", "private ") for step in ("full", "side", "galerkin")
    }
    assert found.predicted > 0
    written = json.loads((tmp_path / "downsample.json").read_text())
    assert written["nets"][0]["ratios"].keys() == {"side", "galerkin"}
    assert "private side" in (tmp_path / "downsample.md").read_text()
    assert (tmp_path / "downsample.png").exists()
