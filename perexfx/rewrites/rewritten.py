"""Rewritten models: what a rewrite returns, and what it says of itself.

Promises: a rewritten model shares the Parameters and buffers of its model under their names, takes its arguments, and
is captured as the graph that it is; every node that is not as it was has a `Change`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx, nn

from perexfx.capture import Captured, CapturedModule
from perexfx.ir.refusal import Place


@dataclass(frozen=True)
class Change:
    """What became of one node.

    Attributes:
        place: The node, in both graphs, and where it is in the user's model.
        before: What it did, in a few words.
        after: What is done in its place.
    """

    place: Place
    before: str
    after: str


@dataclass(frozen=True)
class Rewriting:
    """What a rewrite did to a model.

    Attributes:
        name: Of the rewrite, as users call it.
        summary: A sentence or two.
        before: The graph of the model as it was.
        changes: In graph order.
    """

    name: str
    summary: str
    before: fx.Graph
    changes: tuple[Change, ...]


class Rewritten(CapturedModule):
    """What a rewrite returns: a GraphModule around a model's own Parameters.

    Attributes:
        rewriting: What was done. A `rewriting` of the model itself is hidden by it.
    """

    rewriting: Rewriting


def rewritten(
    twin: nn.Module, captured: Captured, name: str, summary: str, changes: Sequence[Change], before: fx.Graph
) -> Rewritten:
    """A rewritten model.

    Args:
        twin: From `twin_of`, with the modules and buffers that the rewrite adds.
        captured: The graph after the rewrite, and what it holds for.
        name: Of the rewrite.
        summary: What it did, in a sentence or two.
        changes: Node by node.
        before: The graph before it.
    """
    return Rewritten.around(twin, captured, rewriting=Rewriting(name, summary, before, tuple(changes)))


__all__ = ["Change", "Rewriting", "Rewritten", "rewritten"]
