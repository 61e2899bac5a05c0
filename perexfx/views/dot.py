"""The drawing for Graphviz: one text for .dot, .svg and .png.

Promises: both graphs side by side, modules as boxes; those that lie deeper than asked for are folded into one node
each, striped in the strategies of their sites by predicted time. The same drawing gives the same text.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from perexfx.ir.errors import PerexError
from perexfx.views.decisions import Row
from perexfx.views.drawing import CLIP, Drawing, Node, Side
from perexfx.views.files import write_file
from perexfx.views.heat_maps import HeatMap
from perexfx.views.palette import BOX, EDGE, FOLDED, FRAME, SOFT, color_of
from perexfx.views.palette import CLIP as RED
from perexfx.views.styles import style_of

SHOWN = 60
"""Nodes of a graph that are drawn one by one, unless more is asked for."""

HEAT_COLUMNS = 24
"""Columns of a table that a picture has room for."""

CLIPPED = 14
"""Norm nodes, up to which the edges of the clip node are drawn: more of them hide the graph."""


def to_dot(drawing: Drawing, depth: int | None = None) -> str:
    """The text.

    Args:
        drawing: What to draw.
        depth: How many levels of modules are unfolded; None: as many as keep a graph within `SHOWN` nodes.
    """
    rows = {row.site: row for row in drawing.rows}
    sides = {"before": drawing.before} | ({} if drawing.after is None else {"after": drawing.after})
    levels = _fitting_depth(drawing) if depth is None else depth
    lines = [
        "digraph perexfx {",
        f'  label=<{_heading(drawing)}>; labelloc=t; fontname="Helvetica";',
        '  node [fontname="Helvetica", fontsize=11, shape=box, style="filled,rounded"];',
        '  node [margin="0.2,0.07", height=0.3]; nodesep=0.25; ranksep=0.32;',
        f'  edge [color="{EDGE}", arrowsize=0.6];',
    ]
    for name, side in sides.items():
        lines += _side(name, side, levels, rows, drawing.boxes)
    return "\n".join([*lines, "}"]) + "\n"


def _heading(drawing: Drawing) -> str:
    """Title and legend, as Graphviz's HTML."""
    cell = '<td bgcolor="{}"><font point-size="11"> {} </font></td>'
    keys = "".join(cell.format(color_of(name), escape(name)) for name in drawing.strategies)
    rows = [
        f'<td><font point-size="18">{escape(drawing.title)}</font></td>',
        f'<td><font point-size="12" color="{SOFT}">{escape(drawing.subtitle)}</font></td>',
    ]
    if keys:
        rows.append(
            f'<td><table border="0" cellborder="0" cellspacing="6" cellpadding="3"><tr>{keys}</tr></table></td>'
        )
    rows += [part for heat in drawing.heat_maps for part in _heat_map(heat)]
    return f'<table border="0" cellspacing="0" cellpadding="2">{"".join(f"<tr>{row}</tr>" for row in rows)}</table>'


def _heat_map(heat: HeatMap) -> Iterator[str]:
    """Title, table and caption; wide tables have no room in a picture, and are said to be left out."""
    small = f'<td><font point-size="11" color="{SOFT}">{{}}</font></td>'
    yield small.format(escape(heat.title))
    if len(heat.columns) > HEAT_COLUMNS:
        yield small.format(f"{len(heat.columns)} columns: see the page or the report")
        return
    cell = '<td bgcolor="{}"><font point-size="10"> {} </font></td>'
    head = "".join(cell.format("#ffffff", escape(name)) for name in ("", *heat.columns))
    body = [
        cell.format("#ffffff", escape(name)) + "".join(cell.format(*pair) for pair in zip(colors, cells, strict=True))
        for name, colors, cells in zip(heat.rows, heat.colors, heat.cells, strict=True)
    ]
    table = "".join(f"<tr>{row}</tr>" for row in (head, *body))
    yield f'<td><table border="0" cellborder="0" cellspacing="1" cellpadding="2">{table}</table></td>'
    for sentence in heat.caption.split(". "):
        yield small.format(escape(sentence.removesuffix(".") + "."))


def _fitting_depth(drawing: Drawing) -> int:
    """The most levels at which no graph has more than `SHOWN` nodes; at least none."""
    deepest = max((len(node.modules) for node in drawing.before.nodes), default=0)
    side = drawing.after or drawing.before
    for depth in range(deepest, 0, -1):
        if len({_representative(node, depth) for node in _drawn(side)}) <= SHOWN:
            return depth
    return 0


def _drawn(side: Side) -> Iterator[Node]:
    """All but sizes, and what the output does not depend on: they say nothing of the rewrite."""
    return (node for node in side.nodes if node.role not in ("number", "unused"))


def _representative(node: Node, depth: int) -> str:
    """The folded module that a node is drawn as, by path with a slash before it, or its own name."""
    return f"/{node.modules[depth]}" if len(node.modules) > depth else node.id


def _side(name: str, side: Side, depth: int, rows: Mapping[str, Row], boxes: Mapping[str, str]) -> list[str]:
    nodes = {node.id: node for node in _drawn(side)}
    folded: dict[str, list[Node]] = {}
    inside: dict[tuple[str, ...], list[str]] = {}
    for node in nodes.values():
        own = _representative(node, depth)
        if own == node.id:
            inside.setdefault(node.modules, []).append(_node(name, node, rows))
            continue
        if own not in folded:
            inside.setdefault(node.modules[:depth], []).append(f"@{own}")
        folded.setdefault(own, []).append(node)
    body = [
        f'  subgraph "cluster_{name}" {{',
        f'    label="{name}"; labeljust=c; fontname="Helvetica"; fontsize=13; peripheries=0;',
    ]
    body += _clusters((), inside, folded, name, rows, boxes)
    edges = {}
    clipped = sum(node.role == "norm" for node in nodes.values())
    for edge in side.edges:
        if edge.source not in nodes or edge.target not in nodes:
            continue
        source, target = (_representative(nodes[end], depth) for end in (edge.source, edge.target))
        is_fan_out = source == CLIP and clipped > CLIPPED
        if source != target and not is_fan_out:
            edges.setdefault((source, target), edge.kind)
    for (source, target), kind in edges.items():
        how = "weight=0" if source == CLIP else "minlen=0"  # a norm node stands beside its site
        style = " [weight=8]" if kind == "data" else f' [color="{RED}", style=dashed, {how}]'
        body.append(f"    {_quoted(f'{name}/{source}')} -> {_quoted(f'{name}/{target}')}{style};")
    return [*body, "  }"]


def _clusters(
    path: tuple[str, ...],
    inside: Mapping[tuple[str, ...], Sequence[str]],
    folded: Mapping[str, list[Node]],
    name: str,
    rows: Mapping[str, Row],
    boxes: Mapping[str, str],
) -> list[str]:
    """The nodes of one box, and the boxes in it."""
    pad = "    " + "  " * len(path)
    lines = []
    for drawn in inside.get(path, ()):
        is_folded = drawn.startswith("@")
        lines.append(pad + (_folded(name, drawn[1:], folded[drawn[1:]], rows, boxes) if is_folded else drawn))
    level = len(path) + 1
    deeper = [found[:level] for found in inside if len(found) >= level and found[: level - 1] == path]
    for box in dict.fromkeys(deeper):
        lines.append(f"{pad}subgraph {_quoted(f'cluster_{name}/{box[-1]}')} {{")
        lines.append(
            f'{pad}  label={_labelled(_box_label(box[-1], boxes))}; labeljust=l; fontsize=11; fontcolor="{SOFT}"; '
            f'style="rounded,filled"; fillcolor="{BOX}"; color="{FRAME}";'
        )
        lines += _clusters(box, inside, folded, name, rows, boxes)
        lines.append(f"{pad}}}")
    return lines


def _node(side: str, node: Node, rows: Mapping[str, Row]) -> str:
    style = style_of(node, rows.get(node.site))
    label = "\n".join(style.lines)
    return (
        f"{_quoted(f'{side}/{node.id}')} [label={_labelled(label)}, shape={style.shape}, "
        f'fillcolor="{style.fill}", color="{style.border}", fontcolor="{style.ink}"];'
    )


def _folded(side: str, own: str, members: Sequence[Node], rows: Mapping[str, Row], boxes: Mapping[str, str]) -> str:
    seconds: dict[str, float] = {}
    for node in members:
        if node.role == "site" and node.site in rows:
            row = rows[node.site]
            seconds[row.strategy] = seconds.get(row.strategy, 0.0) + row.seconds
    total = sum(seconds.values())
    label = _box_label(own[1:], boxes)
    fill = f'style="filled,rounded", fillcolor="{FOLDED}"'
    if any(node.role == "culprit" for node in members):
        fill = f'style="filled,rounded", fillcolor="{RED}", fontcolor=white'
    elif total:
        stripes = ":".join(f"{color_of(name)};{part / total:.4f}" for name, part in seconds.items())
        fill = (
            f'style=striped, fillcolor="{stripes}"'
            if len(seconds) > 1
            else f'fillcolor="{color_of(next(iter(seconds)))}"'
        )
        label += f"\n{sum(n.role == 'site' for n in members)} sites, {total * 1e3:.2f} ms"
    return f'{_quoted(f"{side}/{own}")} [label={_labelled(label)}, {fill}, color="{SOFT}", penwidth=1.4];'


def _box_label(path: str, boxes: Mapping[str, str]) -> str:
    """A module's own name and its class."""
    return f"{path} ({boxes[path]})" if boxes.get(path) else path


def _labelled(text: str) -> str:
    """A label, in which Graphviz would read `&amp;` as one letter."""
    return _quoted(text.replace("&", "&amp;"))


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def render(text: str, path: Path) -> None:
    """Draws the text by Graphviz's `dot`, in the format of the file's suffix.

    Raises:
        PerexError: Graphviz is not installed, or fails.
        ArgumentError: The file cannot be written.
    """
    program = shutil.which("dot")
    if program is None:
        raise PerexError(
            f"{path.suffix} needs Graphviz, whose program `dot` was not found. Install it (Debian: "
            "`apt install graphviz`; macOS: `brew install graphviz`; conda: `conda install graphviz`), or write .html "
            "or .dot, which need nothing."
        )
    drawn = subprocess.run([program, f"-T{path.suffix[1:]}"], input=text.encode(), capture_output=True, check=False)
    if drawn.returncode:
        raise PerexError(f"Graphviz failed on the drawing: {drawn.stderr.decode(errors='replace').strip()}.")
    write_file(path, drawn.stdout)
