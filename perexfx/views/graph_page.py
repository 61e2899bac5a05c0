"""The page of the graph: data, and the script that draws it with two libraries packed in.

Promises: one file without network; what it shows is the drawing, as JSON, folded and laid out in the browser by
Graphviz (viz.js, WebAssembly) and moved about with svg-pan-zoom. The same drawing gives the same text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from perexfx.views.decisions import Row
from perexfx.views.drawing import Drawing, Node, Side
from perexfx.views.pages import FOLDER, page
from perexfx.views.palette import OTHER, PARTS, STRATEGIES
from perexfx.views.styles import style_of

SCRIPTS = (
    *("vendor/viz-global.js", "vendor/svg-pan-zoom.min.js"),
    *("graph/layout.js", "graph/view.js", "graph/panel.js", "graph/page.js"),
)


def graph_page(drawing: Drawing, depth: int | None) -> str:
    """The page.

    Args:
        drawing: What it shows.
        depth: How many levels of modules are unfolded when it opens; None: as many as can be read at once.
    """
    scripts = [(FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS]
    return page("graph/graph.html", drawing=drawing, data=_as_json(_data(drawing, depth)), scripts=scripts)


def _as_json(value: Any) -> str:
    """JSON that cannot end the script element that it stands in."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _data(drawing: Drawing, depth: int | None) -> dict[str, Any]:
    rows = {row.site: row for row in drawing.rows}
    sides = {"before": drawing.before} | ({} if drawing.after is None else {"after": drawing.after})
    return {
        "depth": depth,
        "subtitle": drawing.subtitle,
        "sides": {name: _side(side, rows) for name, side in sides.items()},
        "boxes": dict(drawing.boxes),
        "rows": {row.site: asdict(row) for row in drawing.rows},
        "colors": {**STRATEGIES, "": OTHER},
        "parts": PARTS,
        "strategies": list(drawing.strategies),
        "refusals": list(drawing.refusals),
        "heat_maps": [{**asdict(heat), "cells": heat.cells, "colors": heat.colors} for heat in drawing.heat_maps],
    }


def _side(side: Side, rows: Mapping[str, Row]) -> dict[str, Any]:
    return {
        "nodes": [_node(node, rows.get(node.site)) for node in side.nodes],
        "edges": [[edge.source, edge.target, edge.kind] for edge in side.edges],
    }


def _node(node: Node, row: Row | None) -> dict[str, Any]:
    known = {key: value for key, value in asdict(node).items() if value}
    return {**known, "modules": list(node.modules), "style": asdict(style_of(node, row))}
