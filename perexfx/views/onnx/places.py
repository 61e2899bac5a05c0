"""Where in the user's model the operations of a step come from: for refusals.

Promises: an operation of the forward is placed by the line of the module's graph that ran it. One of the backward is
placed by the operation that it undoes, where it reads what that one has read; without one, by what it reads.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator

from torch import fx

from perexfx.ir.node import place_of
from perexfx.ir.refusal import Place
from perexfx.rewrite import Transformed

_LINE = re.compile(r'File "<eval_with_key>[^\n]*\n\s+(\w+) = ')
"""What a stack says of a line in the code of a graph: which of its nodes ran."""


class StepPlaces:
    """Places in a step, found out when they are first asked for.

    Args:
        gm: The module.
        trace: The step's graph once more, with the stack of every operation.
    """

    def __init__(self, gm: Transformed, trace: Callable[[], fx.GraphModule]) -> None:
        self._places = {node.name: place_of(node) for node in gm.graph.nodes}
        self._trace = trace
        self._traced: dict[tuple[str, int], fx.Node] | None = None

    def __call__(self, node: fx.Node) -> Place:
        """The place of a node of the exported step."""
        if self._traced is None:
            self._traced = dict(_numbered(self._trace().graph))
        key = next((key for key, other in _numbered(node.graph) if other is node), None)
        traced = None if key is None else self._traced.get(key)
        name = "" if traced is None else _node_of(traced) or _undone_by(traced)
        return self._places.get(name, Place(node.name))


def _numbered(graph: fx.Graph) -> Iterator[tuple[tuple[str, int], fx.Node]]:
    """Calls by their operation, and the how-manieth of it they are: an export keeps them in order."""
    seen: dict[str, int] = defaultdict(int)
    for node in graph.nodes:
        if node.op == "call_function":
            word = str(node.target)
            yield (word, seen[word]), node
            seen[word] += 1


def _node_of(traced: fx.Node) -> str:
    """Name of the graph node that ran an operation; "" where none did."""
    found = _LINE.search(traced.meta.get("stack_trace") or "")
    return found[1] if found else ""


def _undone_by(traced: fx.Node) -> str:
    """Name of the graph node that an operation of the backward belongs to; "" where it cannot be told."""
    word = str(traced.target)
    readers = [user for read in traced.all_input_nodes for user in (*read.users, read) if user is not traced]
    placed = [(reader, name) for reader in readers if (name := _node_of(reader))]
    undone = [name for reader, name in placed if word.startswith(str(reader.target).removesuffix(".default"))]
    return next(iter(undone or [name for _, name in placed]), "")


__all__ = ["StepPlaces"]
