"""Analysis: which values carry examples, on which axis, from shapes alone.

Promises: every value of the graph is known to carry examples in one place, or none at all; a node that combines
examples is refused by name, whatever Python-level function hides it. Nothing is computed: the graph is run twice with
fake tensors, for 3 and for 5 examples, and what differs depends on the batch size.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from perexfx.axes import Mixing, OpCall, Unknown, propagate
from perexfx.ir.errors import ArgumentError, MixingError, RefusedError
from perexfx.ir.layout import Layout
from perexfx.ir.node import place_of
from perexfx.ir.refusal import Refusal

SIZES = (3, 5)
"""The two batch sizes tried. Neither divides the other, so that no merged axis fits both by accident."""


@dataclass(frozen=True)
class TensorFacts:
    """One tensor, at every batch size.

    Attributes:
        shapes: Its shape at each of `SIZES`.
        layout: Where it carries examples; None where it carries none.
        itemsize: Bytes per element.
    """

    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    layout: Layout | None
    itemsize: int

    def shape(self, n: int) -> tuple[int, ...]:
        """Its shape for n examples."""
        small, large = SIZES
        return tuple(a + (n - small) * (b - a) // (large - small) for a, b in zip(*self.shapes, strict=True))

    @property
    def depends_on_batch_size(self) -> bool:
        """Whether its shape changes with the batch size."""
        return self.shapes[0] != self.shapes[1]


@dataclass(frozen=True)
class NodeFacts:
    """What is known about a node's value.

    Attributes:
        tensors: Its tensors, in pytree order.
        numbers_depend: Whether a number in it changes with the batch size.
    """

    tensors: tuple[TensorFacts, ...]
    numbers_depend: bool

    @property
    def carries_examples(self) -> bool:
        """Whether it is different for every batch, or for every batch size."""
        return self.numbers_depend or any(t.layout is not None or t.depends_on_batch_size for t in self.tensors)


@dataclass(frozen=True)
class Inputs:
    """The shapes of one kind of input: all a plan depends on besides the batch size.

    Attributes:
        names: Of the tensors among the forward's arguments.
        shapes: With 0 in place of the batch size, where a tensor carries examples.
        dtypes: Their dtypes.
        devices: Their devices.
        carriers: Which of them carry examples.
        others: The arguments that are not tensors.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    devices: tuple[torch.device, ...]
    carriers: tuple[bool, ...]
    others: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, arguments: Mapping[str, Any], batch_dim: int) -> tuple[Inputs, int]:
        """The kind of some inputs, and their batch size.

        Raises:
            ArgumentError: No tensor has an axis `batch_dim`.
        """
        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        others = tuple((name, value) for name, value in arguments.items() if not isinstance(value, Tensor))
        sizes = [value.shape[batch_dim] for value in tensors.values() if value.dim() > batch_dim]
        if not sizes:
            raise ArgumentError(
                f"No input has an axis {batch_dim} for the examples. Found inputs "
                + (", ".join(f"`{name}` of shape {list(value.shape)}" for name, value in tensors.items()) or "none")
                + ". Pass at least one tensor with an example axis, and its position as `batch_dim`."
            )
        carriers = tuple(t.dim() > batch_dim and t.shape[batch_dim] == sizes[0] for t in tensors.values())
        shapes = tuple(
            (*t.shape[:batch_dim], 0, *t.shape[batch_dim + 1 :]) if carries else tuple(t.shape)
            for t, carries in zip(tensors.values(), carriers, strict=True)
        )
        kind = cls(
            tuple(tensors),
            shapes,
            tuple(t.dtype for t in tensors.values()),
            tuple(t.device for t in tensors.values()),
            carriers,
            others,
        )
        return kind, sizes[0]


@dataclass(frozen=True)
class Analysis:
    """What is known about every value of a graph for one kind of input."""

    nodes: Mapping[str, NodeFacts]

    def carries_examples(self, node: fx.Node) -> bool:
        """Whether a node's value depends on the examples or on their number."""
        return self.nodes[node.name].carries_examples

    def tensor(self, node: fx.Node) -> TensorFacts | None:
        """The facts of a node whose value is one tensor."""
        tensors = self.nodes[node.name].tensors
        return tensors[0] if len(tensors) == 1 else None


def analyze(graph: fx.Graph, module: nn.Module, inputs: Inputs, batch_dim: int) -> Analysis:
    """Follows the examples through a captured graph.

    Args:
        graph: In functional form.
        module: Holds the parameters, buffers and parameter-free modules that the graph names.
        inputs: The kind of input to analyze for.
        batch_dim: The example axis of the inputs.

    Raises:
        MixingError: Nodes that combine examples, each by name.
        RefusedError: An operation that cannot be followed, or that fails on these shapes.
    """
    runs = [_record(graph, module, inputs, batch_dim, n) for n in SIZES]
    refusals = _Refusals()
    layouts = _follow(graph, runs, inputs, batch_dim, refusals)
    nodes = {}
    for node in graph.nodes:
        leaves = [pytree.tree_leaves(run.values[node.name]) for run in runs]
        nodes[node.name] = _facts(leaves[0], leaves[1], layouts)
    _check_output(graph, runs[0], layouts, refusals)
    refusals.raise_if_any()
    return Analysis(nodes)


@dataclass
class _Run:
    """One run with fake tensors: every aten call in order, and every node's value."""

    n: int
    calls: list[tuple[fx.Node, Any, tuple[Any, ...], dict[str, Any], Any]] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    node: fx.Node | None = None


class _Recording(TorchDispatchMode):
    def __init__(self, run: _Run) -> None:
        super().__init__()
        self.run = run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        assert self.run.node is not None
        self.run.calls.append((self.run.node, func, args, kwargs, result))
        return result


class _FakeInterpreter(fx.Interpreter):
    """Runs a graph with fake tensors, noting which node is at work."""

    def __init__(self, module: nn.Module, graph: fx.Graph, fake: FakeTensorMode, run: _Run) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.fake, self.run_record = fake, run
        self.converted: dict[int, Tensor] = {}
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        """One node."""
        self.run_record.node = n
        value = super().run_node(n)
        self.run_record.values[n.name] = value
        return value

    def fetch_attr(self, target: str) -> Any:
        """Parameters and buffers as fake tensors, each always the same one."""
        value = super().fetch_attr(target)
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self.converted:
            self.converted[id(value)] = self.fake.from_tensor(value.detach(), static_shapes=True)
        return self.converted[id(value)]


def _record(graph: fx.Graph, module: nn.Module, inputs: Inputs, batch_dim: int, n: int) -> _Run:
    run = _Run(n)
    values: dict[str, Any] = dict(inputs.others)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    rows = zip(inputs.names, inputs.shapes, inputs.dtypes, inputs.devices, inputs.carriers, strict=True)
    with fake, torch.no_grad():
        for name, shape, dtype, device, carries in rows:
            size = (*shape[:batch_dim], n, *shape[batch_dim + 1 :]) if carries else shape
            values[name] = torch.empty(size, dtype=dtype, device=device)
        interpreter = _FakeInterpreter(module, graph, fake, run)
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        arguments = [values[p.target] for p in placeholders if p.target in values]
        torch_log = logging.getLogger("torch._subclasses.fake_tensor")
        level = torch_log.level
        torch_log.setLevel(logging.CRITICAL)
        try:
            with _Recording(run), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the real run gives them too
                interpreter.run(*arguments)
        except Exception as error:
            assert run.node is not None
            raise RefusedError([_failed(run.node, n, error)]) from error
        finally:
            torch_log.setLevel(level)
    return run


def _failed(node: fx.Node, n: int, error: Exception) -> Refusal:
    place = place_of(node)
    reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
    return Refusal(
        what=f"{place} fails when its shapes are worked out for a batch of {n}: {reason}.",
        why="The graph must hold for every batch size, and no shape or branch may depend on the values of tensors.",
        remedy="Give sizes that follow the input's (`x.shape[0]`, or -1), and avoid `.item()`, `nonzero` and masks "
        "that select.",
        place=place,
    )


class _Refusals:
    """Reasons, one per node."""

    def __init__(self) -> None:
        self.mixing: dict[str, Refusal] = {}
        self.unknown: dict[str, Refusal] = {}

    def mixes(self, node: fx.Node, how: str) -> None:
        place = place_of(node)
        self.mixing.setdefault(
            node.name,
            Refusal(
                what=f"{place} combines different examples: {how}.",
                why="An example's gradient must not depend on the other examples of its batch, "
                "or it has no gradient of its own to clip.",
                remedy="Compute it per example, or outside the model.",
                place=place,
            ),
        )

    def not_followed(self, node: fx.Node, why: str) -> None:
        place = place_of(node)
        self.unknown.setdefault(
            node.name,
            Refusal(
                what=f"{place} cannot be followed: {why}.",
                why="Every operation on examples must be known to keep them apart.",
                remedy="Write it with other operations, or compute it outside the model.",
                place=place,
            ),
        )

    def raise_if_any(self) -> None:
        if self.mixing:
            raise MixingError([*self.mixing.values(), *self.unknown.values()])
        if self.unknown:
            raise RefusedError(list(self.unknown.values()))


def _follow(
    graph: fx.Graph, runs: Sequence[_Run], inputs: Inputs, batch_dim: int, refusals: _Refusals
) -> dict[int, Layout]:
    """Where each recorded tensor of the first run carries its examples, by `id`."""
    first, second = runs
    layouts: dict[int, Layout] = {}
    lost: set[int] = set()
    for node in graph.nodes:
        if node.op == "placeholder" and node.target in inputs.names:
            value = first.values[node.name]
            if inputs.carriers[inputs.names.index(node.target)]:
                layouts[id(value)] = Layout(batch_dim)
    sharing: dict[int, list[Tensor]] = {}
    twins = iter(second.calls)
    at = 0
    for node in graph.nodes:
        while at < len(first.calls) and first.calls[at][0] is node:
            call, twin = first.calls[at], next(twins, None)
            at += 1
            if twin is None or twin[0] is not node or twin[1] is not call[1]:
                refusals.mixes(node, "it does other work for another batch size")
                return layouts
            _follow_call(node, call, twin, first.n, layouts, lost, sharing, refusals)
    return layouts


def _follow_call(
    node: fx.Node,
    call: tuple[Any, ...],
    twin: tuple[Any, ...],
    n: int,
    layouts: dict[int, Layout],
    lost: set[int],
    sharing: dict[int, list[Tensor]],
    refusals: _Refusals,
) -> None:
    _, func, args, kwargs, result = call
    op = OpCall(func, args, kwargs, result, layouts, n)
    results = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if any(id(tensor) in lost for tensor in given):
        lost.update(id(tensor) for tensor in results)
        return
    try:
        if torch.Tag.pointwise in func.tags and _numbers(args, kwargs) != _numbers(twin[2], twin[3]):
            raise Mixing("it computes with the number of examples")
        found = propagate(op)
        for tensor, layout in zip(results, found, strict=True):
            _check_written(tensor, layout, given, layouts, sharing)
    except Mixing as reason:
        refusals.mixes(node, str(reason))
        lost.update(id(tensor) for tensor in results)
        return
    except Unknown as reason:
        refusals.not_followed(node, str(reason))
        lost.update(id(tensor) for tensor in results)
        return
    larger = [leaf for leaf in pytree.tree_leaves(twin[4]) if isinstance(leaf, Tensor)]
    for tensor, other, layout in zip(results, larger, found, strict=True):
        layout = layout or layouts.get(id(tensor)) or _created(tensor, other)  # noqa: PLW2901
        if layout is not None:
            layouts[id(tensor)] = layout
        sharing.setdefault(_storage(tensor), []).append(tensor)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _check_written(
    tensor: Tensor,
    layout: Layout | None,
    given: list[Tensor],
    layouts: Mapping[int, Layout],
    sharing: Mapping[int, list[Tensor]],
) -> None:
    """An in-place result must not bring examples into memory that other values know to be free of them."""
    if layout is None or not any(tensor is argument for argument in given) or layouts.get(id(tensor)) == layout:
        return
    if any(id(other) not in layouts for other in sharing.get(_storage(tensor), ()) if other is not tensor):
        raise Unknown("it writes examples into a part of a value that carried none")


def _numbers(args: Any, kwargs: Any) -> list[Any]:
    return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, int | float)]


def _created(small: Tensor, large: Tensor) -> Layout | None:
    """A value that reads no example but has one row per example (`cls.expand(B, ..)`) carries them on that axis.

    Which row goes with which example is not known from its shape, but it is checked: where such a value meets another,
    both must have their examples in the same place.
    """
    grown = [axis for axis, sizes in enumerate(zip(small.shape, large.shape, strict=True)) if sizes[0] != sizes[1]]
    if len(grown) == 1 and (small.shape[grown[0]], large.shape[grown[0]]) == SIZES:
        return Layout(grown[0])
    return None


def _facts(small: list[Any], large: list[Any], layouts: Mapping[int, Layout]) -> NodeFacts:
    tensors = []
    numbers_depend = len(small) != len(large)
    for a, b in zip(small, large, strict=False):
        if isinstance(a, Tensor):
            shapes = (tuple(a.shape), tuple(b.shape))
            tensors.append(TensorFacts(shapes, layouts.get(id(a)), a.element_size()))
        elif isinstance(a, int | float) and a != b:
            numbers_depend = True
    return NodeFacts(tuple(tensors), numbers_depend)


def _check_output(graph: fx.Graph, run: _Run, layouts: Mapping[int, Layout], refusals: _Refusals) -> None:
    """Nothing to check beyond what was followed, but that some output carries examples at all."""
    output = next(node for node in graph.nodes if node.op == "output")
    leaves = [leaf for leaf in pytree.tree_leaves(run.values[output.name]) if isinstance(leaf, Tensor)]
    if not refusals.mixing and not refusals.unknown and not any(id(leaf) in layouts for leaf in leaves):
        refusals.mixes(output, "none of what it returns has an axis of examples")
