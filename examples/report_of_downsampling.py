"""Tables and a plot of `downsampled_training.py`: every setting beside full training and the control at equal time."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from rich.table import Table
from scipy.stats import ttest_rel

from perexfx.bench.results import processor

mpl.use("Agg")
HEADINGS = (
    "setting", "f", "r", "relative time", "test accuracy, %", "against full, points", "p",
    "against skip at equal time, points", "p", "skip's time to equal accuracy",
)  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """Of accuracies, seed by seed: mean, standard error of the mean, and p of a paired t-test; None where unknown."""

    mean: float
    error: float | None
    p: float | None


@dataclass(frozen=True)
class Row:
    """A setting over all seeds.

    Attributes:
        net: Its network.
        setting: Its name.
        fraction: Mean share of reduced batches: f.
        ratio: Time of a reduced step / a full one: r.
        relative_time: Time of the training / full training.
        accuracies: One per seed.
        to_full: Against full training.
        to_skip: Against the control at the same relative time; None outside of its range.
        equal_at: Relative time at which the control is as accurate in the mean, or a bound; empty for itself.
    """

    net: str
    setting: str
    fraction: float
    ratio: float
    relative_time: float
    accuracies: tuple[float, ...]
    to_full: Difference | None
    to_skip: Difference | None
    equal_at: str

    @property
    def is_control(self) -> bool:
        """Whether all of its steps are full ones."""
        return not self.equal_at

    @property
    def cells(self) -> tuple[str, ...]:
        """As in `HEADINGS`."""
        spread = f" ± {100 * statistics.stdev(self.accuracies):.2f}" if len(self.accuracies) > 1 else ""
        accuracy = f"{100 * statistics.mean(self.accuracies):.2f}{spread}"
        reduced = ("", "") if self.is_control else (f"{self.fraction:.2f}", f"{self.ratio:.2f}")
        differences = (*_cells(self.to_full), *_cells(self.to_skip))
        return self.setting, *reduced, f"{self.relative_time:.2f}", accuracy, *differences, self.equal_at


def _cells(difference: Difference | None) -> tuple[str, str]:
    if difference is None:
        return "", ""
    error = "" if difference.error is None else f" ± {100 * difference.error:.2f}"
    return f"{100 * difference.mean:+.2f}{error}", _p(difference.p)


def _p(p: float | None) -> str:
    if p is None:
        return ""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """The paired difference of accuracies."""
    by_seed = [a - b for a, b in zip(ours, theirs, strict=True)]
    if len(by_seed) < 2:
        return Difference(by_seed[0], None, None)
    error = statistics.stdev(by_seed) / math.sqrt(len(by_seed))
    p = float(ttest_rel(ours, theirs).pvalue) if error else None
    return Difference(statistics.mean(by_seed), error, p)


def between(at: float, known: Sequence[tuple[float, float]]) -> float | None:
    """The value at a place, linearly between known ones; None outside of them."""
    known = sorted(known)
    for (left, low), (right, high) in pairwise(known):
        if left <= at <= right:
            return low + (high - low) * (at - left) / (right - left)
    return None


def equal_at(accuracy: float, known: Sequence[tuple[float, float]]) -> str:
    """The least relative time at which the control's mean reaches an accuracy, or a bound of it."""
    known = sorted(known)
    if accuracy < known[0][1]:
        return f"< {known[0][0]:.2f}"
    for (left, low), (right, high) in pairwise(known):
        if accuracy <= high:
            return f"{left + (right - left) * (accuracy - low) / (high - low) if high > low else right:.2f}"
    return f"> {known[-1][0]:.2f}"


def rows_of(runs: Sequence[dict[str, Any]], seconds: dict[str, dict[str, float]]) -> list[Row]:
    """A row for each network and setting, in the order of the runs."""
    rows = []
    for net, setting in dict.fromkeys((run["net"], run["setting"]) for run in runs):
        of_net = [run for run in runs if run["net"] == net]
        some = [run for run in of_net if run["setting"] == setting]
        fraction = statistics.mean(run["fraction"] for run in some)
        ratio = seconds[net][some[0]["form"]] / seconds[net]["full"]
        relative_time = some[0]["share"] * (1 - fraction * (1 - ratio))
        accuracies = tuple(run["accuracy"] for run in some)
        controls: dict[float, list[float]] = {}
        for run in of_net:
            if run["form"] == "full":
                controls.setdefault(run["share"], []).append(run["accuracy"])
        means = [(share, statistics.mean(found)) for share, found in controls.items()]
        to_skip, at = None, ""
        if some[0]["form"] != "full":
            by_seed = [
                between(relative_time, [(share, found[seed]) for share, found in controls.items()])
                for seed in range(len(some))
            ]
            known = [value for value in by_seed if value is not None]
            to_skip = difference(accuracies, known) if len(known) == len(some) else None
            at = equal_at(statistics.mean(accuracies), means)
        to_full = None if setting == "full" else difference(accuracies, controls[1.0])
        rows.append(Row(net, setting, fraction, ratio, relative_time, accuracies, to_full, to_skip, at))
    return rows


def table(rows: Sequence[Row]) -> Table:
    """For a terminal."""
    found = Table(title="Downsampled batches against full training and against fewer steps")
    for heading in ("net", *HEADINGS):
        found.add_column(heading)
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None and before.net != row.net:
            found.add_section()
        found.add_row(row.net, *row.cells)
    return found


def machine() -> str:
    """What the times were measured on."""
    return f"{processor()}, {os.cpu_count()} cores, one thread, torch {torch.__version__}"


def write(path: Path, rows: Sequence[Row], about: dict[str, Any], runs: Sequence[dict[str, Any]]) -> None:
    """Writes `PATH.json`, `PATH_results.md` and `PATH.png`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"machine": machine(), **about}
    content = {**about, "rows": [asdict(row) for row in rows], "runs": list(runs)}
    path.with_name(f"{path.name}.json").write_text(json.dumps(content, indent=1) + "\n")
    lines = [
        "# Downsampled batches: results",
        "",
        f"{about['machine']}. {about['seeds']} seeds, {about['steps']} steps of full training, batches of 32; "
        "mean ± standard deviation, differences ± standard error, p of paired t-tests.",
    ]
    for net in dict.fromkeys(row.net for row in rows):
        full = 1e3 * about["seconds"][net]["full"]
        lines += ["", f"## {net}: a full step takes {full:.1f} ms", "", f"| {' | '.join(HEADINGS)} |"]
        lines += ["|---" + "|---:" * (len(HEADINGS) - 1) + "|"]
        lines += [f"| {' | '.join(row.cells)} |" for row in rows if row.net == net]
    path.with_name(f"{path.name}_results.md").write_text("\n".join(lines) + "\n")
    plot(path.with_name(f"{path.name}.png"), rows)


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Accuracy over relative time: the control as a line, settings as numbered points, named below each panel."""
    nets = list(dict.fromkeys(row.net for row in rows))
    figure, panels = plt.subplots(1, len(nets), figsize=(5.5 * len(nets), 7), squeeze=False, layout="constrained")
    colors = {"random": "tab:orange", "then": "tab:green", "every": "tab:purple"}
    for net, panel in zip(nets, panels[0], strict=True):
        of_net = [row for row in rows if row.net == net]
        control = sorted((row.relative_time, 100 * statistics.mean(row.accuracies)) for row in of_net if row.is_control)
        panel.plot(*zip(*control, strict=True), "o-", color="black", label="full steps only, fewer of them")
        for number, row in enumerate((row for row in of_net if not row.is_control), start=1):
            x, y = row.relative_time, 100 * statistics.mean(row.accuracies)
            color = colors[row.setting.split()[0]]
            marker = "s" if "until" in row.setting else "^" if "galerkin" in row.setting else "o"
            panel.plot(x, y, marker, color=color, label=f"{number}: {row.setting}", linestyle="none")
            side = 1 if number % 2 else -1
            panel.annotate(
                str(number),
                (x, y),
                xytext=(7 * side, -3),
                textcoords="offset points",
                ha="left" if side > 0 else "right",
            )
        panel.set(title=net, xlabel="time / time of full training", ylabel="test accuracy, %")
        panel.grid(alpha=0.3)
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize="small", frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
