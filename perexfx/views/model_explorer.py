"""The drawing for Google's Model Explorer: graphs, and node data that colours them.

Promises: the files follow Model Explorer's JSON formats (graph collection, node data per graph); ids are those of the
graph's nodes, namespaces the modules that they are in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perexfx.views.decisions import Row
from perexfx.views.drawing import Drawing, Node, Side
from perexfx.views.files import write_file
from perexfx.views.palette import color_of
from perexfx.views.styles import style_of
from perexfx.views.words import megabytes

GRADIENT = [{"stop": 0, "bgColor": "#ffffff"}, {"stop": 1, "bgColor": "#e8590c"}]
"""From the cheapest site to the dearest."""


def write_model_explorer(drawing: Drawing, path: Path) -> None:
    """Writes the graphs, and with a plan the node data beside them.

    Raises:
        ArgumentError: A file cannot be written.
    """
    write_file(path, _text(_collection(drawing)))
    for name, data in _node_data(drawing).items():
        write_file(path.with_suffix(f".{name}.json"), _text(data))


def _text(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def _collection(drawing: Drawing) -> dict[str, Any]:
    rows = {row.site: row for row in drawing.rows}
    sides = {"after": drawing.after, "before": drawing.before}  # the first is what opens
    graphs = [_graph(name, side, rows) for name, side in sides.items() if side is not None]
    return {"label": drawing.title, "graphs": graphs}


def _graph(name: str, side: Side, rows: Mapping[str, Row]) -> dict[str, Any]:
    incoming: dict[str, list[str]] = {}
    for edge in side.edges:
        incoming.setdefault(edge.target, []).append(edge.source)
    return {"id": name, "nodes": [_node(node, incoming.get(node.id, []), rows.get(node.site)) for node in side.nodes]}


def _node(node: Node, reads: list[str], row: Row | None) -> dict[str, Any]:
    style = style_of(node, row)
    attributes = {
        "module": node.module,
        "source": node.source,
        "role": node.role,
        "site": node.site,
        "parameters": ", ".join(node.parameters),
        "refusal": node.refusal,
        "note": node.note,
    }
    if row is not None and node.role == "site":
        attributes |= {
            "strategy": row.strategy,
            "predicted ms": f"{row.seconds * 1e3:.3f}",
            "predicted MB held": megabytes(row.bytes_held),
            "next best": row.next_best,
            "why not": row.why_not,
        }
    edges = [
        {"sourceNodeId": read, "sourceNodeOutputId": "0", "targetNodeInputId": str(at)} for at, read in enumerate(reads)
    ]
    outputs = [{"id": "0", "attrs": [{"key": "shape", "value": node.shape}]}] if node.shape else []
    return {
        "id": node.id,
        "label": node.label,
        "namespace": "/".join(node.modules),
        "attrs": [{"key": key, "value": value} for key, value in attributes.items() if value],
        "incomingEdges": edges,
        "outputsMetadata": outputs,
        "style": {"backgroundColor": style.fill, "borderColor": style.border},
    }


def _node_data(drawing: Drawing) -> dict[str, Any]:
    """Name of the overlay -> graph -> node -> value."""
    if drawing.after is None or not drawing.rows:
        return {}
    rows = {row.site: row for row in drawing.rows}
    found = {node.id: rows[node.site] for node in drawing.after.nodes if node.role == "site"}
    strategies = {name: {"value": row.strategy, "bgColor": color_of(row.strategy)} for name, row in found.items()}
    seconds = {name: {"value": row.seconds} for name, row in found.items()}
    held = {name: {"value": row.bytes_held} for name, row in found.items()}
    return {
        "strategy": {"after": {"name": "strategy", "results": strategies}},
        "seconds": {"after": {"name": "predicted seconds", "results": seconds, "gradient": GRADIENT}},
        "bytes": {"after": {"name": "predicted bytes held", "results": held, "gradient": GRADIENT}},
    }
