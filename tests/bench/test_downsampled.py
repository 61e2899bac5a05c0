"""Reduced steps beside full ones: one network, and what its table says."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from perexfx.bench import downsampled
from perexfx.bench.measure import CPU, Timing
from perexfx.bench.workloads import numbers


def test_ratios_are_of_steps_of_one_kind() -> None:
    seconds = {"full": 4.0, "reduced": 1.0, "private full": 5.0, "private reduced": 2.0}
    timing = Timing({name: (value,) for name, value in seconds.items()})
    slower = Timing({name: (2 * value if "reduced" in name else value,) for name, value in seconds.items()})
    found = downsampled.Measured("net", {"side": timing, "galerkin": slower}, 0.3)
    assert (found.ratio("side"), found.private_ratio("side")) == (0.25, 0.4)
    assert (found.ratio("galerkin"), found.private_ratio("galerkin")) == (0.5, 0.8)


def test_one_network_is_measured_and_written(tmp_path: Path) -> None:
    net = numbers("tiny", partial(downsampled.small_resnet, (8, 8, 8)), 2, 3, 8, 8)
    (found,) = downsampled.run(1, CPU, tmp_path, [net])
    assert found.timings.keys() == {"side", "galerkin"}
    assert set(found.timings["side"].seconds) == {"full", "reduced", "private full", "private reduced"}
    assert found.predicted > 0
    written = json.loads((tmp_path / "downsample.json").read_text())
    assert written["nets"][0]["ratios"].keys() == {"side", "galerkin"}
    assert "private side" in (tmp_path / "downsample.md").read_text()
    assert (tmp_path / "downsample.png").exists()
