"""How a node looks, whatever draws it."""

from __future__ import annotations

from dataclasses import dataclass

from perexfx.views.decisions import Row
from perexfx.views.drawing import Node
from perexfx.views.palette import CLIP, CUT, FAINT, FORMAT, INK, MODEL, NORM, REWRITTEN, color_of
from perexfx.views.words import counted


@dataclass(frozen=True)
class Style:
    """Attributes: Graphviz's shape; fill, border and text colours; the lines of text."""

    shape: str
    fill: str
    border: str
    ink: str
    lines: tuple[str, ...]


def style_of(node: Node, row: Row | None) -> Style:
    """The look of a node; of a site by its row in the report, where there is a plan."""
    match node.role:
        case "clip":
            return Style("box", CLIP, "#a81c22", "#ffffff", ("clip", counted(len(node.parameters), "parameter")))
        case "norm":
            return Style("ellipse", NORM, CLIP, INK, ("norm",))
        case "format":
            return Style("box", FORMAT, "#9a8fd0", INK, (node.label,))
        case "cut":
            return Style("box", CUT, "#3d8f8b", INK, (node.label,))
        case "rewritten":
            return Style("box", REWRITTEN, "#b08b2e", INK, (node.label, *_lines(node.note)))
        case "culprit":
            return Style("box", CLIP, "#7a0c12", "#ffffff", (node.label, "refused"))
        case "input" | "output":
            shape = (node.shape,) if node.shape else ()
            return Style("box", "#344054", "#1d2939", "#ffffff", (node.label, *shape))
        case "number" | "unused":
            return Style("box", MODEL, "#e4e7ec", FAINT, (node.label,))
        case "site" if row is not None:
            lines = (f"{node.label}  {row.site}", f"{row.strategy}  {row.seconds * 1e3:.2f} ms")
            return Style("box", color_of(row.strategy), "#475467", INK, lines)
        case "site":
            return Style("box", color_of(""), "#475467", INK, (f"{node.label}  {node.site}",))
        case _:
            parameters = (node.site,) if node.site else ()
            return Style("box", MODEL, "#475467" if node.site else "#b6bcc6", INK, (node.label, *parameters))


def _lines(note: str) -> tuple[str, ...]:
    """What a rewrite made of a node."""
    _, arrow, after = note.partition(" -> ")
    return (f"-> {after}",) if arrow else ()
