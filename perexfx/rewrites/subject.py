"""What a rewrite starts from: a model's graph, and the shapes of its values.

Promises: the model is left as it was, and its Parameters, buffers and values are shared; nothing is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx, nn

from perexfx.analysis import Call, leaves_of, record, written_by
from perexfx.capture import OF_GRAPH_MODULES, Captured, capture, release_norms, twin_of
from perexfx.ir.errors import ArgumentError, RefusedError
from perexfx.ir.inputs import GivenInputs, Inputs, arguments_of, batch_sizes, bind_inputs, by_name, named_leaves

TAKEN = ("rewriting", "_captured")
"""Names of what a rewritten module has beside the attributes of its model."""


@dataclass(frozen=True)
class Subject:
    """A model to rewrite.

    Attributes:
        captured: Its graph, in functional form, and what that holds for.
        twin: A module tree of its own around the model's parameters and buffers.
        shapes: Of every node whose value is a tensor, for the batch of the example inputs; None without them.
        outputs: Shapes of the tensors that it returns.
        sizes: The kind of the example inputs, and their number of examples; None without them.
        pointwise: Names of the nodes that compute every entry from entries at its place.
        floating: Names of the nodes whose value is a tensor of floating-point numbers.
        written_by: Nodes whose memory another node writes into, and which.
    """

    captured: Captured
    twin: nn.Module
    shapes: Mapping[str, tuple[int, ...]] | None
    outputs: tuple[tuple[int, ...], ...] = ()
    sizes: tuple[Inputs, int] | None = None
    pointwise: frozenset[str] = frozenset()
    floating: frozenset[str] = frozenset()
    written_by: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        """The graph as it was captured."""
        return self.captured.graph


def subject_of(model: nn.Module, example_inputs: GivenInputs | None) -> Subject:
    """A model's graph and shapes.

    Args:
        model: Any module that `perexfx.transform` can capture.
        example_inputs: A tensor, a tuple of positional inputs, or a dict of keyword inputs, examples first. Their
            shapes count alone. None: no shapes are known.

    Raises:
        ArgumentError: `model` is no module, or the inputs do not fit it.
        CaptureError: The model cannot be captured.
        RefusedError: Its graph fails on these shapes.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"`model` should be a torch.nn.Module. Found {type(model).__name__}.")
    taken = [] if isinstance(model, fx.GraphModule) else [n for n in (*TAKEN, *OF_GRAPH_MODULES) if n in vars(model)]
    if taken:
        raise ArgumentError(
            f"`{type(model).__name__}` has an attribute `{taken[0]}`, a name that rewritten modules need for "
            "themselves. Rename it."
        )
    inputs = None if example_inputs is None else by_name(bind_inputs(model, example_inputs, "example_inputs"))
    captured = capture(model, inputs)
    live = release_norms(captured.graph)
    modes = {path: mode for path, mode in captured.fixed_modes.items() if path not in live}
    captured = replace(captured, fixed_modes=modes)
    twin = twin_of(model, captured.constants)
    if inputs is None:
        return Subject(captured, twin, None)
    leaves = named_leaves(arguments_of(captured.graph, inputs))
    kind, n = Inputs.of(leaves, 0, examples=next(iter(batch_sizes(leaves, 0)), None))
    try:
        with torch.no_grad():
            run = record(captured.graph, twin, kind, 0, n)
    except RefusedError as error:
        error.graph, error.module = captured.graph, twin
        raise
    shapes = {name: tuple(value.shape) for name, value in run.values.items() if isinstance(value, Tensor)}
    others = {call.node.name for call in run.calls if not _is_pointwise(call)}
    called = {node.name for node in captured.graph.nodes if node.op.startswith("call")}
    floating = {k for k, value in run.values.items() if isinstance(value, Tensor) and value.is_floating_point()}
    outputs = tuple(tuple(leaf.shape) for leaf in leaves_of(run.values["output"]))
    writes = written_by(captured.graph, run)
    known = (frozenset(called - others), frozenset(floating), writes)
    return Subject(captured, twin, shapes, outputs, (kind, n), *known)


def _is_pointwise(call: Call) -> bool:
    return torch.Tag.pointwise in call.func.tags or call.func._schema.name.split("::")[1] in _BY_ENTRY


_BY_ENTRY = frozenset(
    "device native_dropout bernoulli_ bernoulli clone detach alias _to_copy _prelu_kernel copy_ rrelu_with_noise "
    "empty_like rand_like log_sigmoid_forward hardswish mish".split()
)
"""Further operations that compute every entry from entries at its place."""


__all__ = ["Subject", "subject_of"]
