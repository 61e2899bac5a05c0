"""What is known about a node of a graph, kept in `node.meta["perexfx"]`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from perexfx.ir.refusal import Place

KEY = "perexfx"


@dataclass(frozen=True)
class NodeInfo:
    """What perexfx knows about one node.

    Attributes:
        module: Path of the module in whose forward it was recorded.
        source: `file.py:line` in the user's code.
        stops_gradient: Recorded under `torch.no_grad()`.
        overwrites: Was written in place: its value must have the shape and dtype of its first argument.
        role: What the rewrite made of it: "model" (untouched), "tape", "clip", "norm", "cut", "format" or "site".
        site: Name of the site it belongs to, or "".
    """

    module: str = ""
    source: str = ""
    stops_gradient: bool = False
    overwrites: bool = False
    role: str = "model"
    site: str = ""


def info_of(node: fx.Node) -> NodeInfo:
    """What is known about a node; blank for nodes that others put into the graph."""
    return node.meta.get(KEY, NodeInfo())


def annotate(node: fx.Node, info: NodeInfo) -> fx.Node:
    """The node, with what is known about it."""
    node.meta[KEY] = info
    return node


def place_of(node: fx.Node) -> Place:
    """Where a node comes from, for messages."""
    info = info_of(node)
    return Place(node.name, info.module, info.source)


__all__ = ["KEY", "NodeInfo", "annotate", "info_of", "place_of"]
