"""The kinds of plots that the tables draw: bars, points against a diagonal, curves of powers, and panels of curves.

Colors are those of Okabe and Ito (2008), which people who are color-blind can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#B8A800")
MARKERS = "osD^vPX*"


def bars(
    axes: Axes,
    labels: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    *,
    is_log: bool = False,
    missing: str = "",
) -> None:
    """Groups of bars, and a line at 1.0, where the ordinary step is.

    Args:
        axes: To draw on.
        labels: One per group.
        series: Name -> one ratio per group.
        is_log: Whether the axis of the ratios is logarithmic.
        missing: Written where a ratio is None.
    """
    width = 0.8 / len(series)
    for at, (name, values) in enumerate(series.items()):
        places = [group + width * (at - (len(series) - 1) / 2) for group in range(len(labels))]
        heights = [math.nan if value is None else value for value in values]
        color = COLORS[at % len(COLORS)]
        axes.bar(places, heights, width, label=name, color=color)
        for place, value in zip(places, values, strict=True):
            if value is None:
                axes.text(place, 1.0, missing, color=color, ha="center", va="bottom")
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set_xticks(range(len(labels)), labels, rotation=20, ha="right")
    if is_log:
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(0.5, axes.get_ylim()[0]))
        _write_plain_numbers(axes)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def points(axes: Axes, series: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Measured over predicted, both logarithmic, and the line on which they agree.

    Args:
        axes: To draw on.
        series: Name -> (predicted, measured) pairs; those that a logarithm cannot show are left out.
    """
    every: list[float] = []
    for at, (name, pairs) in enumerate(series.items()):
        shown = [pair for pair in pairs if min(pair) > 0]
        every += [value for pair in shown for value in pair]
        color, marker = COLORS[at % len(COLORS)], MARKERS[at % len(MARKERS)]
        x, y = [x for x, _ in shown], [y for _, y in shown]
        axes.scatter(x, y, s=16, alpha=0.7, linewidths=0, label=name, color=color, marker=marker)
    if every:
        ends = (min(every), max(every))
        axes.plot(ends, ends, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)


def curves(axes: Axes, sizes: Sequence[int], series: Mapping[str, Sequence[float]]) -> None:
    """Values over sizes that double, both logarithmic.

    Args:
        axes: To draw on.
        sizes: In growing order.
        series: Name -> one value per size.
    """
    for at, (name, values) in enumerate(series.items()):
        axes.plot(sizes, values, marker=MARKERS[at], markersize=4, color=COLORS[at], label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    _write_plain_numbers(axes)
    axes.grid(alpha=0.3)


Curve = Sequence[tuple[float, float]]


def panels(figure: Figure, series: Mapping[str, Mapping[str, Curve]], labels: Mapping[str, tuple[str, str]]) -> None:
    """A panel of curves for each of several experiments, up to three in a row, of logarithmic values; one legend.

    Args:
        figure: To draw on, whose size is set.
        series: Title of a panel -> name of a curve -> its points.
        labels: Title of a panel -> what is along its two axes.
    """
    columns = min(3, len(series))
    rows = -(-len(series) // columns)
    figure.set_size_inches(10, 2.6 * rows + 0.6)
    every = figure.subplots(rows, columns, squeeze=False)
    for axes in every.flat[len(series) :]:
        axes.set_axis_off()
    for axes, (title, drawn) in zip(every.flat, series.items(), strict=False):
        for at, (name, shown) in enumerate(drawn.items()):
            x, y = [x for x, _ in shown], [y for _, y in shown]
            axes.plot(x, y, marker=MARKERS[at], markersize=4, color=COLORS[at], label=name)
        axes.set_yscale("log")
        axes.set_title(title, fontsize=9)
        along, up = labels[title]
        axes.set_xlabel(along, fontsize=8)
        axes.set_ylabel(up, fontsize=8)
        axes.grid(alpha=0.3)
    figure.legend(*every[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)


def _write_plain_numbers(axes: Axes) -> None:
    """Along a logarithmic axis: as people write them, not as powers of ten."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())
