"""Writes in place: whose memory changes after it was made.

Promises: read off the recorded aten calls, so that no spelling of a write and no view is missed.
"""

from __future__ import annotations

from torch import Tensor, fx

from perexfx.analysis.fake_run import Call, Run, leaves_of
from perexfx.ir.schemas import names_written


def written_by(graph: fx.Graph, run: Run) -> dict[str, tuple[str, ...]]:
    """Names of the nodes whose memory another node writes into, and of those that do.

    Args:
        graph: In functional form.
        run: Of that graph.
    """
    makers: dict[int, fx.Node] = {}
    for node in graph.nodes:
        if node.op in ("get_attr", "placeholder"):
            makers.update((_memory(tensor), node) for tensor in leaves_of(run.values[node.name]))
    writers: dict[int, dict[str, None]] = {}
    for call in run.calls:
        for tensor in _written_into(call):
            if makers.get(_memory(tensor)) is not call.node:
                writers.setdefault(_memory(tensor), {})[call.node.name] = None
        for tensor in call.results:
            makers.setdefault(_memory(tensor), call.node)
    return {
        node.name: tuple(writers[memory])
        for node in graph.nodes
        for memory in map(_memory, leaves_of(run.values[node.name]))
        if memory in writers
    }


def _written_into(call: Call) -> list[Tensor]:
    names = names_written(call.func)
    if not names:
        return []
    given = call.named_arguments()
    return [tensor for name in names for tensor in leaves_of(given.get(name))]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
