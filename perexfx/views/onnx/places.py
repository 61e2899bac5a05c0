"""Where in the user's model the operations of a step come from: for refusals.

Promises: an operation of the forward is placed by the line of the module's graph that ran it, one of the loss by the
function. One of the backward is
placed by the operation that it undoes, where it reads what that one has read; without one, by what it reads.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from perexfx.ir.node import place_of
from perexfx.ir.refusal import Place
from perexfx.runtime import Transformed
from perexfx.steps import LossFunction

_LINE = re.compile(r'File "<eval_with_key>[^\n]*\n\s+(\w+) = ')
"""What a stack says of a line in the code of a graph: which of its nodes ran."""


_LOSS = "<loss>"
"""Stands for the loss among the names of graph nodes."""


class StepPlaces:
    """Places in a step, found out when they are first asked for.

    Args:
        gm: The module.
        loss_fn: The loss.
        trace: The step's graph once more, for a loss, with the stack of every operation.
    """

    def __init__(self, gm: Transformed, loss_fn: LossFunction, trace: Callable[..., fx.GraphModule]) -> None:
        self._places = {node.name: place_of(node) for node in gm.graph.nodes}
        self._places[_LOSS] = Place("loss_fn", source=_source_of(loss_fn))
        self._loss_fn, self._trace = loss_fn, trace
        self._traced: dict[tuple[str, int], fx.Node] | None = None
        self._of_loss: set[fx.Node] = set()

    def __call__(self, node: fx.Node) -> Place:
        """The place of a node of the exported step."""
        if self._traced is None:
            self._traced = dict(_numbered(self._trace(self._noted_loss, keeps_stacks=True).graph))
            names = {node.name for node in self._of_loss}
            self._of_loss = {node for node in self._traced.values() if node.name in names}
        key = next((key for key, other in _numbered(node.graph) if other is node), None)
        traced = None if key is None else self._traced.get(key)
        name = "" if traced is None else self._node_of(traced) or self._undone_by(traced)
        return self._places.get(name, Place(node.name))

    def _noted_loss(self, output: Any, targets: Any) -> Any:
        """The loss; what is traced while it runs is noted."""
        mode = get_proxy_mode()
        assert mode is not None
        before = set(mode.tracer.graph.nodes)
        loss = self._loss_fn(output, targets)
        self._of_loss = set(mode.tracer.graph.nodes) - before
        return loss

    def _node_of(self, traced: fx.Node) -> str:
        """Name of the graph node that ran an operation, or that it was the loss; "" where none did."""
        if traced in self._of_loss:
            return _LOSS
        found = _LINE.search(traced.meta.get("stack_trace") or "")
        return found[1] if found else ""

    def _undone_by(self, traced: fx.Node) -> str:
        """Name of the graph node that an operation of the backward belongs to; "" where it cannot be told."""
        word = str(traced.target)
        readers = [user for read in traced.all_input_nodes for user in (*read.users, read) if user is not traced]
        placed = [(reader, name) for reader in readers if (name := self._node_of(reader))]
        undone = [name for reader, name in placed if word.startswith(str(reader.target).removesuffix(".default"))]
        return next(iter(undone or [name for _, name in placed]), "")


def _source_of(loss_fn: LossFunction) -> str:
    """File and line of a function of the user's; "" for others."""
    code = getattr(loss_fn, "__code__", None)
    return "" if code is None else f"{Path(code.co_filename).name}:{code.co_firstlineno}"


def _numbered(graph: fx.Graph) -> Iterator[tuple[tuple[str, int], fx.Node]]:
    """Calls by their operation, and the how-manieth of it they are: an export keeps them in order."""
    seen: dict[str, int] = defaultdict(int)
    for node in graph.nodes:
        if node.op == "call_function":
            word = str(node.target)
            yield (word, seen[word]), node
            seen[word] += 1


__all__ = ["StepPlaces"]
