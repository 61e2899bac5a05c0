"""The dataflow of one clipped step, as a graph: every aten call of forward and backward, with fake tensors.

Promises: nothing is computed, and the module and its state are left as they are. Whatever a call might read of an
earlier one is an edge: memory is followed by its storage, so views and writes in place are too. The loss is not known,
and need not be: the step begins its backward with any gradient of the outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from perexfx.analysis.failures import without_numbers
from perexfx.analysis.fake_run import FakeInterpreter, fake_inputs, leaves_of
from perexfx.capture.quiet import quiet
from perexfx.capture.tracer import TRACING, same_einsums
from perexfx.ir.errors import CaptureError
from perexfx.ir.factors import Factors, Product
from perexfx.ir.inputs import Inputs, arguments_for
from perexfx.ir.node import place_of
from perexfx.ir.rule import Arguments, Backward, Fitted, Geometry, Wrapped
from perexfx.ir.schemas import arguments_by_name, names_written
from perexfx.ir.site import Key
from perexfx.planning.plan import Plan
from perexfx.runtime.rewrite import Transformed
from perexfx.sites.classify import passes_no_gradient


@dataclass(frozen=True)
class Operation:
    """A node of the dataflow.

    Attributes:
        name: Of the aten operation, or what the node stands for.
        where: The part of the step that it belongs to; "" where that is not known.
        site: The site in whose forward or backward it ran, or "".
        carries_gradient: Whether a gradient may pass through it.
        given: Per tensor argument its name in the schema and the nodes that it was made by.
        numbers: The arguments that are no tensors, by name.
    """

    name: str
    where: str = ""
    site: str = ""
    carries_gradient: bool = True
    given: tuple[tuple[str, frozenset[int]], ...] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name} ({self.where})" if self.where else self.name


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
    state = gm.perexfx
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    recorder = _Recorder()
    with TRACING, same_einsums(), state.rehearsed(), quiet(), torch.inference_mode(False):
        given = fake_inputs(fake, inputs, state.settings.batch_dim, plan.batch_size)
        state.plans[inputs, plan.batch_size] = _watched(plan, recorder)
        state.norms = state.clip_factors = None
        interpreter = _Interpreter(gm, gm.graph, fake, recorder)
        trained = {name: p for name, p in gm.named_parameters() if p.requires_grad}
        parameters = {name: interpreter.fake_of(value) for name, value in trained.items()}
        try:
            with fake, torch.enable_grad():
                sources = [recorder.add_source(value, f"input `{name}`") for name, value in given.items()]
                placed = {name: recorder.add_source(p, f"parameter `{name}`") for name, p in parameters.items()}
                with recorder:
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
            norms=recorder.add_sink(state.norms, "norms"),
            factors=_roots(recorder, state.clip_factors),
            is_per_layer=state.settings.clipping == "per_layer",
            handed_over=recorder.handed_over,
        )


def _gradients(outputs: list[Tensor], parameters: list[Tensor], seeds: list[Tensor]) -> Sequence[Tensor | None]:
    """Of each parameter; none at all where no output or no parameter has one."""
    if not outputs or not parameters:
        return [None for _ in parameters]
    return torch.autograd.grad(outputs, parameters, seeds, allow_unused=True)


def _roots(recorder: _Recorder, factors: Tensor | None) -> frozenset[int]:
    """The nodes of the clip factors; where they were stacked for `gm.perexfx.clip_factors`, of each row."""
    found = recorder.made(factors) if factors is not None else frozenset()
    rows = {row for node in found if recorder.operations[node].name == "stack" for row in recorder.graph.pred[node]}
    return frozenset(rows) or found


class _Interpreter(FakeInterpreter):
    """Tells the recorder which node of the rewritten graph is at work."""

    def __init__(self, module: Transformed, graph: fx.Graph, fake: FakeTensorMode, recorder: _Recorder) -> None:
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


class _Recorder(TorchDispatchMode):
    """Makes a node of every call that computes or writes something."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = nx.DiGraph()
        self.operations: dict[int, Operation] = {}
        self.handed_over: dict[Key, tuple[int, ...]] = {}
        self.where = ""
        self.site = ""
        self.carries_gradient = True
        self._made: dict[int, frozenset[int]] = {}  # storage -> who may have written what is in it
        self._alive: list[Any] = []  # a storage's address is its name: none may be used again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        named = arguments_by_name(func, args, kwargs)
        read = [] if _name(func) in _READ_SIZES_ALONE else list(named.items())
        if _name(func) in _OVERWRITE and _is_whole(args[0]):
            read = read[1:]
        given = [(name, self.made(tensor)) for name, value in read for tensor in leaves_of(value)]
        own = {_storage(tensor) for tensor in leaves_of((args, kwargs))}
        written = [tensor for name in names_written(func) for tensor in leaves_of(named.get(name))]
        result = func(*args, **kwargs)
        is_reread = _name(func) == "view" and func._overloadname == "dtype"  # other numbers in the same memory
        new = [tensor for tensor in leaves_of(result) if is_reread or _storage(tensor) not in own]
        if new or written:
            made = (*new, *written)
            passes = self.carries_gradient and any(t.is_floating_point() or t.is_complex() for t in made)
            numbers = {name: value for name, value in named.items() if not leaves_of(value)}
            node = self._add(Operation(_name(func), self.where, self.site, passes, tuple(given), numbers))
            for tensor in made:
                self._make(tensor, node)
        return result

    @contextmanager
    def at(self, site: str, where: str) -> Iterator[None]:
        """What runs inside belongs to a site."""
        before = self.where, self.site
        self.where, self.site = where, site
        yield
        self.where, self.site = before

    def made(self, tensor: Tensor) -> frozenset[int]:
        """The nodes that a tensor was made by; none for what was there before and is no source."""
        return self._made.get(_storage(tensor), frozenset())

    def add_source(self, tensor: Tensor, name: str) -> int:
        """A node for what was there before."""
        node = self._add(Operation(name))
        self._make(tensor, node)
        return node

    def add_sink(self, tensor: Tensor | None, name: str) -> int:
        """A node for what comes out."""
        made = frozenset() if tensor is None else self.made(tensor)
        return self._add(Operation(name, given=((name, made),)))

    def hand_over(self, key: Key, factors: Factors, known: dict[Any, Tensor]) -> Factors:
        """Factors in memory of their own, so that what is read of them can be told from all else.

        Args:
            key: Site and operand.
            factors: What the site's backward has left.
            known: Tensors of the same backward that have theirs.
        """
        is_shared = isinstance(factors, Product) and factors.right_gram is not None
        own = known if is_shared else {}  # else equal gradients of two operands could not be told apart
        copied = _with_tensors(factors, lambda tensor: _copy(tensor, own))
        nodes = {node for tensor in leaves_of(copied) for node in self.made(tensor)}
        self.handed_over[key] = tuple(sorted(nodes))
        return copied

    def _add(self, operation: Operation) -> int:
        node = len(self.operations)
        self.operations[node] = operation
        self.graph.add_node(node)
        self.graph.add_edges_from((before, node) for _, nodes in operation.given for before in nodes)
        return node

    def _make(self, tensor: Tensor, node: int) -> None:
        self._alive.append(tensor.untyped_storage())
        self._made[_storage(tensor)] = frozenset((node,))


_READ_SIZES_ALONE = frozenset(
    "new_empty new_empty_strided new_zeros new_ones new_full "
    "empty_like zeros_like ones_like full_like rand_like randn_like".split()
)
"""Operations that take nothing from a tensor but its size and dtype."""


_OVERWRITE = frozenset("zero_ fill_ copy_".split())
"""Operations after which nothing is left of the tensor that they are given first."""


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor is all that there is in its memory."""
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def _name(func: Any) -> str:
    return func._schema.name.removeprefix("aten::")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _copy(tensor: Tensor, known: dict[Any, Tensor]) -> Tensor:
    """The same numbers in memory of their own; once for all views that see the same."""
    seen = _storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride()
    if seen not in known:
        known[seen] = tensor.clone()
    return known[seen]


def _with_tensors(value: Any, change: Any) -> Any:
    """The same value with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_with_tensors(part, change) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {each.name: getattr(value, each.name) for each in fields(value) if each.init}
        changed = {name: _with_tensors(part, change) for name, part in parts.items()}
        return replace(value, **{name: part for name, part in changed.items() if part is not parts[name]})
    return value


@dataclass(frozen=True)
class _Watched(Wrapped):
    """A rule that tells the recorder when it runs, and what it leaves."""

    site: str
    recorder: _Recorder

    def forward(self, arguments: Arguments, geometry: Geometry) -> tuple[Any, tuple[Tensor, ...]]:
        """The rule's own, in the name of its site; what is a view of an argument is the site's from there on."""
        with self.recorder.at(self.site, f"forward of site `{self.site}`"):
            output, residuals = super().forward(arguments, geometry)
            own = {_storage(tensor) for tensor in leaves_of(arguments)}
            return pytree.tree_map_only(Tensor, lambda t: t.clone() if _storage(t) in own else t, output), residuals

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


def _watched(plan: Plan, recorder: _Recorder) -> Plan:
    """The plan with every rule watched."""
    fitted: dict[str, Fitted] = {
        name: replace(found, rule=_Watched(found.rule, name, recorder)) for name, found in plan.fitted.items()
    }
    return replace(plan, fitted=fitted)


__all__ = ["Dataflow", "Operation", "dataflow"]
