"""Rewritten models: what a rewrite returns, and what it says of itself.

Promises: a rewritten model shares the Parameters and buffers of its model under their names, takes its arguments, and
is captured as the graph that it is; every node that is not as it was has a `Change`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from perexfx.capture import Captured, CapturedModule
from perexfx.ir.inputs import Inputs
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
        sizes: The kind of its inputs, and the number of examples, where there were example inputs.
    """

    name: str
    summary: str
    before: fx.Graph
    changes: tuple[Change, ...]
    sizes: tuple[Inputs, int] | None = None


class Rewritten(CapturedModule):
    """What a rewrite returns: a GraphModule around a model's own Parameters.

    Attributes:
        rewriting: What was done. A `rewriting` of the model itself is hidden by it.
    """

    rewriting: Rewriting


def rewritten(twin: nn.Module, captured: Captured, rewriting: Rewriting) -> Rewritten:
    """A rewritten model.

    Args:
        twin: From `twin_of`, with the modules and buffers that the rewrite adds.
        captured: The graph after the rewrite, and what it holds for.
        rewriting: What was done.
    """
    return Rewritten.around(twin, captured, rewriting=rewriting)


__all__ = ["Change", "Rewriting", "Rewritten", "rewritten"]
