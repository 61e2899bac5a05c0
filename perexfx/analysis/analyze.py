"""Analysis: which values carry examples, on which axis, from shapes alone.

Promises: every value of the graph is known to carry examples in one place, or none at all; a node that combines
examples is refused by name, whatever Python-level function hides it. Nothing is computed: the graph is recorded with
fake tensors for 3 and for 5 examples, and what differs depends on the batch size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from perexfx.analysis.counts import unknown_numbers
from perexfx.analysis.fake_run import Run, leaves, leaves_of, record
from perexfx.analysis.follow import Follower, Refusals, follow
from perexfx.analysis.in_place_writes import written_by
from perexfx.ir.inputs import Inputs
from perexfx.ir.layout import Layout
from perexfx.ir.node import info_of

SIZES = (3, 5)
"""The two batch sizes tried. Neither divides the other, so that no merged axis fits both by accident."""


@dataclass(frozen=True)
class TensorFacts:
    """One tensor, at every batch size.

    Attributes:
        shapes: Its shape at each of `SIZES`.
        layout: Where it carries examples; None where it carries none.
        dtype: Its dtype.
    """

    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    layout: Layout | None
    dtype: torch.dtype

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
        numbers: Its numbers at each of `SIZES`.
        is_tensor: Whether it is a tensor itself, and not something around one.
    """

    tensors: tuple[TensorFacts, ...]
    numbers_depend: bool
    numbers: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())
    is_tensor: bool = False

    @property
    def carries_examples(self) -> bool:
        """Whether it is different for every batch, or for every batch size."""
        return self.numbers_depend or any(t.layout is not None or t.depends_on_batch_size for t in self.tensors)


@dataclass(frozen=True)
class Analysis:
    """What is known about every value of a graph for one kind of input.

    Attributes:
        nodes: Node name -> facts.
        random: Names of the nodes that draw random numbers.
        written_by: Nodes whose memory another node writes into, and which.
    """

    nodes: Mapping[str, NodeFacts]
    random: frozenset[str]
    written_by: Mapping[str, tuple[str, ...]]

    def is_random(self, node: fx.Node) -> bool:
        """Whether a node draws random numbers."""
        return node.name in self.random

    def carries_examples(self, node: fx.Node) -> bool:
        """Whether a node's value depends on the examples or on their number."""
        return self.nodes[node.name].carries_examples

    def has_gradient(self, node: fx.Node) -> bool:
        """Whether there are floating-point numbers in a node's value."""
        return any(facts.dtype.is_floating_point or facts.dtype.is_complex for facts in self.nodes[node.name].tensors)

    def numbers_for(self, node: fx.Node, n: int) -> float | None:
        """The value of a node that is a number, for n examples; None for other nodes."""
        facts = self.nodes[node.name]
        if facts.tensors or len(facts.numbers[0]) != 1 or len(facts.numbers[1]) != 1:
            return None
        small, large = SIZES
        (at_small,), (at_large,) = facts.numbers
        value = at_small + (n - small) * (at_large - at_small) / (large - small)
        return int(value) if isinstance(at_small, int) else value

    def example_axis_of_output(self) -> int | None:
        """The axis on which the first returned tensor that carries examples does."""
        layouts = [facts.layout for facts in self.nodes["output"].tensors if facts.layout is not None]
        return layouts[0].axis if layouts else None

    def layouts_of_output(self) -> tuple[Layout | None, ...]:
        """Where each returned tensor, in pytree order, carries its examples; None where it carries none."""
        return tuple(facts.layout for facts in self.nodes["output"].tensors)

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
    runs = [record(graph, module, inputs, batch_dim, n) for n in SIZES]
    refusals = Refusals()
    _check_same_work(graph, runs, refusals)
    refusals.raise_if_any()
    first, second = (follow(run, twin, inputs, batch_dim, refusals) for run, twin in (runs, runs[::-1]))
    _check_agreement(runs, first, second, refusals)
    _check_overwritten(graph, runs[0], refusals)
    _check_reshaped(graph, runs[0], refusals)
    _check_output(graph, runs[0], first, refusals)
    refusals.raise_if_any()
    following, unknown = unknown_numbers(graph, runs, first)
    for node in graph.nodes:
        read = [n.name for n in node.all_input_nodes if n.name in unknown]
        if read and leaves_of(runs[0].values[node.name]):
            refusals.mixes(
                node, f"it computes with `{read[0]}`, which is not a fixed multiple of the number of examples"
            )
    refusals.raise_if_any()
    nodes = {node.name: _facts(runs, node.name, first.layouts, node.name in following) for node in graph.nodes}
    random = {call.node.name for call in runs[0].calls if torch.Tag.nondeterministic_seeded in call.func.tags}
    return Analysis(nodes, frozenset(random), written_by(graph, runs[0]))


def _check_same_work(graph: fx.Graph, runs: Sequence[Run], refusals: Refusals) -> None:
    """Both runs make the same calls, node by node."""
    first, second = ([(call.node, call.func) for call in run.calls] for run in runs)
    if first == second:
        return
    for node in graph.nodes:
        if [func for at, func in first if at is node] != [func for at, func in second if at is node]:
            refusals.mixes(node, "it does other work for another batch size")


def _check_agreement(runs: Sequence[Run], first: Follower, second: Follower, refusals: Refusals) -> None:
    """A layout that fits one batch size by accident (`reshape(6, -1)` of 3 examples) does not fit the other."""
    for call, twin in zip(runs[0].calls, runs[1].calls, strict=True):
        pairs = zip(call.results, twin.results, strict=False)
        if any(first.layouts.get(id(a)) != second.layouts.get(id(b)) for a, b in pairs):
            refusals.mixes(call.node, "it moves examples so that no axis holds all of them in order")


def _check_overwritten(graph: fx.Graph, run: Run, refusals: Refusals) -> None:
    """What was written in place keeps its shape and dtype, or torch itself would have refused or rounded."""
    for node in graph.nodes:
        if not info_of(node).overwrites:
            continue
        before, after = run.values[node.args[0].name], run.values[node.name]
        if (before.shape, before.dtype) != (after.shape, after.dtype):
            refusals.not_followed(
                node, f"it writes {after.dtype} {list(after.shape)} into {before.dtype} {list(before.shape)}"
            )


def _check_reshaped(graph: fx.Graph, run: Run, refusals: Refusals) -> None:
    """A value whose shape was changed in place is read through the operation that did so, or its shape is in doubt."""
    done: set[fx.Node] = set()
    for node in graph.nodes:
        for read in node.all_input_nodes:
            if run.reshaped.get(read.name) in done:
                by = run.reshaped[read.name].name
                refusals.not_followed(
                    node, f"it reads `{read.name}`, whose shape `{by}` has changed; read `{by}` instead"
                )
        done.add(node)


def _check_output(graph: fx.Graph, run: Run, follower: Follower, refusals: Refusals) -> None:
    """What is returned carries examples, or nothing that depends on their number."""
    output = next(node for node in graph.nodes if node.op == "output")
    returned = leaves_of(run.values[output.name])
    if any(id(leaf) in follower.lost for leaf in returned):
        return
    if any(id(leaf) in follower.varying or id(leaf) in follower.counting for leaf in returned):
        refusals.mixes(output, "it returns a value that depends on the number of examples")
    elif not any(id(leaf) in follower.layouts for leaf in returned):
        refusals.mixes(output, "none of what it returns has an axis of examples")


def _facts(runs: Sequence[Run], name: str, layouts: Mapping[int, Layout], numbers_follow: bool) -> NodeFacts:
    """What is known about one node's value."""
    small, large = (leaves(run.values[name]) for run in runs)
    tensors = tuple(
        TensorFacts((tuple(a.shape), tuple(b.shape)), layouts.get(id(a)), a.dtype)
        for a, b in zip(small, large, strict=False)
        if isinstance(a, Tensor)
    )
    numbers = tuple(tuple(leaf for leaf in found if isinstance(leaf, int | float)) for found in (small, large))
    depend = numbers_follow or len(small) != len(large)
    return NodeFacts(tensors, depend, (numbers[0], numbers[1]), isinstance(runs[0].values[name], Tensor))
