"""Analysis: which values carry examples, on which axis, from shapes alone.

Promises: every value of the graph is known to carry examples in one place, or none at all; a node that combines
examples is refused by name, whatever Python-level function hides it. Nothing is computed: the graph is recorded with
fake tensors for 3 and for 5 examples, and what differs depends on the batch size.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from perexfx.follow import Follower, Refusals, follow
from perexfx.inputs import Inputs
from perexfx.ir.layout import Layout
from perexfx.ir.node import info_of
from perexfx.record import Run, leaves_of, record

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
    """

    tensors: tuple[TensorFacts, ...]
    numbers_depend: bool

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
    """

    nodes: Mapping[str, NodeFacts]
    random: frozenset[str]

    def is_random(self, node: fx.Node) -> bool:
        """Whether a node draws random numbers."""
        return node.name in self.random

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
    runs = [record(graph, module, inputs, batch_dim, n) for n in SIZES]
    refusals = Refusals()
    _check_same_work(graph, runs, refusals)
    refusals.raise_if_any()
    followers = [follow(run, twin, inputs, batch_dim, refusals) for run, twin in (runs, runs[::-1])]
    layouts = [follower.layouts for follower in followers]
    _check_agreement(graph, runs, layouts, refusals)
    _check_overwritten(graph, runs[0], refusals)
    _check_output(graph, runs[0], followers[0], refusals)
    refusals.raise_if_any()
    nodes: dict[str, NodeFacts] = {}
    for node in graph.nodes:
        leaves = [pytree.tree_leaves(run.values[node.name]) for run in runs]
        picked_from = node.args[0] if node.target is operator.getitem else None  # one size of a shape may be constant
        counted = [n for n in node.all_input_nodes if nodes[n.name].numbers_depend and n is not picked_from]
        nodes[node.name] = _facts(leaves[0], leaves[1], layouts[0], bool(counted))
        if nodes[node.name].tensors and any(runs[0].values[n.name] == runs[1].values[n.name] for n in counted):
            refusals.mixes(node, "it computes with a number that depends on the number of examples")
    refusals.raise_if_any()
    random = {call.node.name for call in runs[0].calls if torch.Tag.nondeterministic_seeded in call.func.tags}
    return Analysis(nodes, frozenset(random))


def _check_same_work(graph: fx.Graph, runs: Sequence[Run], refusals: Refusals) -> None:
    """Both runs make the same calls, node by node."""
    first, second = ([(call.node, call.func) for call in run.calls] for run in runs)
    if first == second:
        return
    for node in graph.nodes:
        if [func for at, func in first if at is node] != [func for at, func in second if at is node]:
            refusals.mixes(node, "it does other work for another batch size")


def _check_agreement(
    graph: fx.Graph, runs: Sequence[Run], layouts: Sequence[Mapping[int, Layout]], refusals: Refusals
) -> None:
    """A layout that fits one batch size by accident (`reshape(6, -1)` of 3 examples) does not fit the other."""
    for node in graph.nodes:
        leaves = [pytree.tree_leaves(run.values[node.name]) for run in runs]
        for small, large in zip(*leaves, strict=True):
            if layouts[0].get(id(small)) != layouts[1].get(id(large)):
                refusals.mixes(node, "it moves examples so that no axis holds all of them in order")
                break


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


def _check_output(graph: fx.Graph, run: Run, follower: Follower, refusals: Refusals) -> None:
    """What is returned carries examples, or nothing that depends on their number."""
    output = next(node for node in graph.nodes if node.op == "output")
    leaves = leaves_of(run.values[output.name])
    if any(id(leaf) in follower.lost for leaf in leaves):
        return
    if any(id(leaf) in follower.varying for leaf in leaves):
        refusals.mixes(output, "it returns a value that depends on the number of examples")
    elif not any(id(leaf) in follower.layouts for leaf in leaves):
        refusals.mixes(output, "none of what it returns has an axis of examples")


def _facts(small: list[Any], large: list[Any], layouts: Mapping[int, Layout], counts: bool) -> NodeFacts:
    """Facts from the two values; `counts`: it is computed from a number that depends on the batch size."""
    tensors = []
    numbers_depend = len(small) != len(large)
    for a, b in zip(small, large, strict=False):
        if isinstance(a, Tensor):
            shapes = (tuple(a.shape), tuple(b.shape))
            tensors.append(TensorFacts(shapes, layouts.get(id(a)), a.dtype))
        elif isinstance(a, int | float) and a != b:
            numbers_depend = True
    if counts and not tensors:
        numbers_depend = True  # also where both sizes give the same, as `B % 2` does
    return NodeFacts(tuple(tensors), numbers_depend)
