"""Clipped against ordinary step: times interleaved in one process, peak memory of either in its own."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from perexfx.bench.measure import Timing, in_turn, peak_bytes, steps_of
from perexfx.bench.workloads import WORKLOADS
from perexfx.profiles import processor


@dataclass(frozen=True)
class Result:
    """One workload.

    Attributes:
        name: Of the workload.
        timing: Seconds and their ratio.
        ordinary_bytes: Peak memory of the ordinary step's process.
        clipped_bytes: Peak memory of the clipped step's process.
    """

    name: str
    timing: Timing
    ordinary_bytes: int
    clipped_bytes: int


def run(names: Sequence[str], rounds: int, out: Path | None) -> list[Result]:
    """Measures workloads, shows a table, and writes it with the machine's description.

    Args:
        names: Keys of `WORKLOADS`.
        rounds: Pairs of steps timed for each.
        out: Folder for `suite.json`; None: show only.
    """
    results = []
    with Progress(transient=True) as progress:
        task = progress.add_task("measuring", total=len(names) * (rounds + 2))
        for name in names:
            progress.update(task, description=name)
            timing: Timing | None = None
            for timing in in_turn(*steps_of(WORKLOADS[name]), rounds):  # noqa: B007
                progress.advance(task)
            assert timing is not None
            peaks = []
            for kind in ("ordinary", "clipped"):
                peaks.append(peak_bytes(name, kind))
                progress.advance(task)
            results.append(Result(name, timing, *peaks))
    Console().print(_table(results))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        described = {"machine": machine(), "rounds": rounds, "results": [asdict(result) for result in results]}
        (out / "suite.json").write_text(json.dumps(described, indent=2) + "\n")
    return results


def machine() -> dict[str, object]:
    """What the numbers were measured on."""
    return {
        "processor": processor(),
        "cores": psutil.cpu_count(logical=False),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _table(results: Sequence[Result]) -> Table:
    table = Table(title="clipped against ordinary step", caption=f"geometric mean of the ratios {_mean(results):.3f}")
    for heading in ("workload", "ordinary\nms", "clipped\nms", "ratio", "ordinary\nMB", "clipped\nMB", "ratio"):
        table.add_column(heading, justify="left" if heading == "workload" else "right")
    for result in results:
        timing = result.timing
        table.add_row(
            result.name,
            f"{timing.ordinary * 1e3:.2f}",
            f"{timing.clipped * 1e3:.2f}",
            f"{timing.ratio:.3f}",
            f"{result.ordinary_bytes / 1e6:.0f}",
            f"{result.clipped_bytes / 1e6:.0f}",
            f"{result.clipped_bytes / result.ordinary_bytes:.3f}",
        )
    return table


def _mean(results: Sequence[Result]) -> float:
    return statistics.geometric_mean(result.timing.ratio for result in results)
