"""The dataflow of one clipped step, as a graph: every aten call of forward and backward, with fake tensors.

Promises: nothing is computed, and the module and its state are left as they are. Whatever a call might read of an
earlier one is an edge: memory is followed by its storage, so views and writes in place are too. The loss is not known,
and need not be: the step begins its backward with any gradient of the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from perexfx.analysis import FakeInterpreter, fake_inputs, leaves_of, without_numbers
from perexfx.capture import TRACING, quiet, same_einsums
from perexfx.inspecting.proof.operations import Operation, Recorder, storage_of
from perexfx.ir.errors import CaptureError
from perexfx.ir.factors import Factors
from perexfx.ir.inputs import Inputs, arguments_for
from perexfx.ir.node import place_of
from perexfx.ir.rule import Arguments, Backward, Fitted, Geometry, Wrapped
from perexfx.ir.site import Key
from perexfx.planning import Plan
from perexfx.runtime import StepOptions, Transformed, runtime_of
from perexfx.sites import passes_no_gradient


@dataclass(frozen=True)
class Dataflow:
    """One clipped step.

    Attributes:
        graph: Nodes are numbers; an edge is what may be read.
        operations: Node -> what it is.
        inputs: The inputs of the forward and the gradients of its outputs: all that is known of examples.
        outputs: The outputs of the forward.
        parameters: Name -> node, of trainable parameters.
        gradients: Name -> node of what is added to `.grad`; None where nothing is.
        norms: The norms of the examples.
        factors: The clip factors; with `clipping="per_layer"` those of every layer.
        is_per_layer: Whether each layer has factors of its own, made of its own norms.
        handed_over: (site, operand) -> what its backward left for norm and clip node.
    """

    graph: nx.DiGraph
    operations: Mapping[int, Operation]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    parameters: Mapping[str, int]
    gradients: Mapping[str, int | None]
    norms: int
    factors: frozenset[int]
    is_per_layer: bool
    handed_over: Mapping[Key, tuple[int, ...]]


def dataflow(gm: Transformed, plan: Plan, inputs: Inputs) -> Dataflow:
    """The dataflow of a step that follows a plan.

    Args:
        gm: The transformed module.
        plan: For the batch size.
        inputs: The kind of input.

    Raises:
        CaptureError: The step cannot be run without numbers.
    """
    runtime = runtime_of(gm)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    recorder = Recorder()
    with TRACING, same_einsums(), runtime.rehearsed(), quiet(), torch.inference_mode(False):
        given = fake_inputs(fake, inputs, runtime.settings.batch_dim, plan.batch_size)
        interpreter = _Interpreter(gm, gm.graph, fake, recorder)
        trained = {name: p for name, p in gm.named_parameters() if p.requires_grad}
        parameters = {name: interpreter.fake_of(value) for name, value in trained.items()}
        try:
            with fake, torch.enable_grad():
                sources = [recorder.add_source(value, f"input `{name}`") for name, value in given.items()]
                placed = {name: recorder.add_source(p, f"parameter `{name}`") for name, p in parameters.items()}
                with recorder, runtime.stepping(StepOptions({(inputs, plan.batch_size): _watched(plan, recorder)})):
                    results = leaves_of(interpreter.run(*arguments_for(gm.graph, given)))
                    interpreter.env.clear()
                    differentiable = [value for value in results if value.requires_grad]
                    seeds = [torch.empty_like(value) for value in differentiable]
                    sources += [recorder.add_source(seed, "gradient of an output") for seed in seeds]
                    recorder.where, recorder.site = "", ""
                    found = _gradients(differentiable, list(parameters.values()), seeds)
        except (RuntimeError, NotImplementedError) as error:
            raise CaptureError(f"The step cannot be followed. {without_numbers(error, 'a layer rule')}") from error
        return Dataflow(
            graph=recorder.graph,
            operations=recorder.operations,
            inputs=tuple(sources),
            outputs=tuple(node for value in results for node in recorder.made(value)),
            parameters=placed,
            gradients={
                name: None if value is None else recorder.add_sink(value, f"gradient of `{name}`")
                for name, value in zip(parameters, found, strict=True)
            },
            norms=recorder.add_sink(runtime.results.norms, "norms"),
            factors=_roots(recorder, runtime.results.clip_factors),
            is_per_layer=runtime.settings.clipping == "per_layer",
            handed_over=recorder.handed_over,
        )


def _gradients(outputs: list[Tensor], parameters: list[Tensor], seeds: list[Tensor]) -> Sequence[Tensor | None]:
    """Of each parameter; none at all where no output or no parameter has one."""
    if not outputs or not parameters:
        return [None for _ in parameters]
    return torch.autograd.grad(outputs, parameters, seeds, allow_unused=True)


def _roots(recorder: Recorder, factors: Tensor | None) -> frozenset[int]:
    """The nodes of the clip factors; where they were stacked for `gm.perexfx.clip_factors`, of each row."""
    found = recorder.made(factors) if factors is not None else frozenset()
    rows = {row for node in found if recorder.operations[node].name == "stack" for row in recorder.graph.pred[node]}
    return frozenset(rows) or found


class _Interpreter(FakeInterpreter):
    """Tells the recorder which node of the rewritten graph is at work."""

    def __init__(self, module: Transformed, graph: fx.Graph, fake: FakeTensorMode, recorder: Recorder) -> None:
        super().__init__(module, graph, fake, trains=True)
        self.recorder = recorder
        self.fetch_attributes()

    def run_node(self, n: fx.Node) -> Any:
        """One node; what it detaches is in memory of its own from there on."""
        self.recorder.where = str(place_of(n))
        value = super().run_node(n)
        if n.op == "placeholder" or not passes_no_gradient(n):
            return value
        self.recorder.carries_gradient = False
        value = pytree.tree_map_only(Tensor, torch.clone, value)
        self.recorder.carries_gradient = True
        return value

    def fake_of(self, parameter: Tensor) -> Tensor:
        """A parameter as a fake tensor; one that the graph does not name is its own."""
        return self.converted.get(id(parameter), parameter)


@dataclass(frozen=True)
class _Watched(Wrapped):
    """A rule that tells the recorder when it runs, and what it leaves."""

    site: str
    recorder: Recorder

    def forward(self, arguments: Arguments, geometry: Geometry) -> tuple[Any, tuple[Tensor, ...]]:
        """The rule's own, in the name of its site; what is a view of an argument is the site's from there on."""
        with self.recorder.at(self.site, f"forward of site `{self.site}`"):
            output, residuals = super().forward(arguments, geometry)
            own = {storage_of(tensor) for tensor in leaves_of(arguments)}
            return pytree.tree_map_only(Tensor, lambda t: t.clone() if storage_of(t) in own else t, output), residuals

    def backward(self, call: Backward) -> tuple[dict[str, Tensor], dict[str, Factors]]:
        """The rule's own, in the name of its site; hands over copies of the factors."""
        with self.recorder.at(self.site, f"backward of site `{self.site}`"):
            gradients, factors = super().backward(call)
        known: dict[Any, Tensor] = {}
        copied = {}
        for name, found in factors.items():
            with self.recorder.at(self.site, f"handed over by site `{self.site}`"):
                copied[name] = self.recorder.hand_over((self.site, name), found, known)
        return gradients, copied


def _watched(plan: Plan, recorder: Recorder) -> Plan:
    """The plan with every rule watched."""
    fitted: dict[str, Fitted] = {
        name: replace(found, rule=_Watched(found.rule, name, recorder)) for name, found in plan.fitted.items()
    }
    return replace(plan, fitted=fitted)


__all__ = ["Dataflow", "dataflow"]
