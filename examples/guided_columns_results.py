"""What trained columns gave, beside plain sums of the same seeds: a table, and pictures."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy.stats import ttest_rel

from perexfx.bench.results import machine

BASELINE = "plain sum"
MEASURES = {"ensemble": "all columns together", "weakest": "the weakest column by itself"}


@dataclass(frozen=True)
class Run:
    """What one method gave with one seed: accuracies in percent, each the mean over classes of their recall.

    Attributes:
        baseline: The method that this one is compared with.
        start: Digest of the weights before the first step.
        weakness: The guide's final table, pathways x classes.
        counts: Training examples of each class.
    """

    data: str
    method: str
    baseline: str
    seed: int
    start: str
    ensemble: float
    weakest: float
    columns: list[float]
    weakness: list[list[float]] | None
    counts: list[int]


def compared(ours: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """Paired differences, ours less the baseline's: mean, its standard error, p of the t-test, wins and losses."""
    d = [one - other for one, other in zip(ours, baseline, strict=True)]
    varied = len(set(d)) > 1
    return {
        "difference": statistics.fmean(d),
        "error": statistics.stdev(d) / len(d) ** 0.5 if len(d) > 1 else None,
        "p": float(ttest_rel(ours, baseline).pvalue) if varied else None,
        "wins": sum(x > 0 for x in d),
        "losses": sum(x < 0 for x in d),
    }


def summarize(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Of each data set, method and measure: mean, standard deviation, and what is different from the baseline."""
    rows = []
    for data in dict.fromkeys(r.data for r in runs):
        for name, baseline in dict.fromkeys((r.method, r.baseline) for r in runs):
            row: dict[str, Any] = {"data": data, "method": name, "baseline": baseline}
            for measure in MEASURES:
                ours, plain = (
                    [getattr(r, measure) for r in runs if (r.data, r.method) == (data, m)] for m in (name, baseline)
                )
                sd = statistics.stdev(ours) if len(ours) > 1 else None
                row[measure] = {"mean": statistics.fmean(ours), "sd": sd, **compared(ours, plain)}
            rows.append(row)
    return rows


HEADINGS = (
    "data",
    "method",
    "against",
    *(f"{m}{x}" for m in MEASURES for x in ("", ": difference", ": p", ": won/lost")),
)


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row of the summary in words; see `HEADINGS`."""
    against_itself = row["method"] == row["baseline"]
    found = [row["data"], row["method"], "" if against_itself else row["baseline"]]
    for s in (row[measure] for measure in MEASURES):
        found.append(f"{s['mean']:.2f}" + (f" ± {s['sd']:.2f}" if s["sd"] is not None else ""))
        if against_itself:
            found += ["", "", ""]
            continue
        found.append(f"{s['difference']:+.2f}" + (f" ± {s['error']:.2f}" if s["error"] is not None else ""))
        found += ["" if s["p"] is None else f"{s['p']:.2g}", f"{s['wins']}/{s['losses']}"]
    return found


def draw(summary: Sequence[Mapping[str, Any]], figure: Figure) -> None:
    """A panel for each data set: accuracy of the columns together and of the weakest one, mean and deviation."""
    data = list(dict.fromkeys(row["data"] for row in summary))
    figure.set_size_inches(4.2 * len(data) + 1.5, 4.8)
    panels = figure.subplots(1, len(data), sharex=True, sharey=True, squeeze=False)[0]
    methods = list(dict.fromkeys(row["method"] for row in summary))
    places = range(len(methods))
    for panel, name in zip(panels, data, strict=True):
        rows = [row for row in summary if row["data"] == name]
        for (measure, words), marker, color in zip(MEASURES.items(), "os", ("tab:blue", "tab:orange"), strict=True):
            found = [row[measure] for row in rows]
            bars = [s["sd"] or 0 for s in found]
            panel.errorbar(
                [s["mean"] for s in found],
                places,
                xerr=bars,
                fmt=marker,
                color=color,
                capsize=3,
                mfc="none",
                label=words,
            )
        panel.set(title=name, xlabel="test accuracy, mean of classes, % (± sd over seeds)")
        panel.grid(alpha=0.3)
    panels[0].set_yticks(places, methods)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)


def draw_weakness(found: Run, figure: Figure) -> None:
    """A heat map of a guide's table, with its numbers."""
    assert found.weakness is not None
    figure.set_size_inches(10, 3.6)
    axes = figure.subplots()
    axes.imshow(found.weakness, cmap="Oranges", aspect="auto")
    middle = max(map(max, found.weakness)) / 2
    for p, row in enumerate(found.weakness):
        for c, w in enumerate(row):
            axes.text(c, p, f"{w:.2f}", ha="center", va="center", color="white" if w > middle * 1.3 else "black")
    axes.set_xticks(range(len(found.counts)), [f"{c}\nn = {n}" for c, n in enumerate(found.counts)])
    axes.set_yticks(range(len(found.weakness)), [f"pathway {p}" for p in range(len(found.weakness))])
    axes.set_xlabel("class, and how many training examples it has")
    axes.set_title(
        f"Weakness on {found.data}, {found.method}, seed {found.seed}: cross-entropy of a pathway alone, in nats.\n"
        "Compare down a column: darker is the pathway that is weaker at this class, and gets more of its gradient.\n"
        "Large beside a right merge: others carry the class. Dark in all rows: a hard or rare class.",
        fontsize=10,
    )


def publish(runs: Sequence[Run], settings: Mapping[str, Any]) -> None:
    """Shows the table, and writes it with its numbers and pictures."""
    summary, described, out = summarize(runs), machine(torch.device("cpu")), settings["out"]
    table = Table(*HEADINGS, title=f"guided columns, {settings['epochs']} epochs, {settings['seeds']} seeds")
    for row in summary:
        table.add_row(*cells(row), end_section=row["method"] == summary[-1]["method"])
    Console(width=None if sys.stdout.isatty() else 210).print(table)
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in settings.items() if name != "out"}
    raw = {"machine": described, "settings": kept, "summary": summary, "runs": [asdict(r) for r in runs]}
    (out / "guidebp.json").write_text(json.dumps(raw, indent=1) + "\n")
    lines = [HEADINGS, ["---"] * 3 + ["---:"] * (len(HEADINGS) - 3), *map(cells, summary)]
    where = "{processor}, {cores} cores, {threads} threads, torch {torch}, Python {python}".format(**described)
    (out / "guidebp_results.md").write_text(
        f"# Guided columns: test accuracy after {kept['epochs']} epochs, {kept['seeds']} seeds\n\n{where}\n\n"
        + "\n".join(f"| {' | '.join(line)} |" for line in lines)
        + "\n\nAccuracies are means of class recalls in percent, ± standard deviation over seeds. Differences are "
        "paired, seed by seed, ± standard error; p by paired t-tests, uncorrected. Adam at 2e-3 if not said.\n"
    )
    shown = [r for r in runs if r.method == "guided, per class" and r.seed == 0][-1]
    for name, drawn in (("guidebp", summary), ("guidebp_weakness", shown)):
        figure = Figure(layout="constrained", dpi=120)
        draw_weakness(drawn, figure) if isinstance(drawn, Run) else draw(drawn, figure)
        figure.savefig(out / f"{name}.png")
