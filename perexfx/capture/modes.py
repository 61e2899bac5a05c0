"""Modes: keeping `train()` and `eval()` alive in a captured graph.

Promises: an argument that differs between the modes follows the `training` flag of the module that it was recorded in;
where the two modes differ in anything else the graph is left as it is, and the difference is said.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils import _pytree as pytree

from perexfx.ir.node import annotate, info_of


def fixed_by_statistics(model: nn.Module) -> dict[str, bool]:
    """The mode of each layer that must keep it: its choice between batch and running statistics is in the graph."""
    return {
        path: module.training
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm | _InstanceNorm) and module.track_running_stats
    }


def release_norms(graph: fx.Graph) -> set[str]:
    """Has normalisations over the batch that keep statistics follow the mode of their layer.

    Args:
        graph: Is changed.

    Returns:
        Paths of the layers: they need no fixed mode any more.
    """
    paths = set()
    for node, given in _batch_norms(graph):
        if given.get("running_mean") is None:
            continue
        path = info_of(node).module
        with graph.inserting_before(node):
            flag = annotate(graph.create_node("get_attr", f"{path}.training" if path else "training"), info_of(node))
        given["training"] = flag
        node.args, node.kwargs = (given.pop("input"),), given
        paths.add(path)
    return paths


def fix_norms(graph: fx.Graph, model: nn.Module) -> dict[str, bool]:
    """Undoes `release_norms`: writes the mode of each layer into the graph.

    Args:
        graph: Is changed.
        model: Holds the layers.

    Returns:
        The layers' modes, by path.
    """
    modes: dict[str, bool] = {}
    for node, given in _batch_norms(graph):
        flag = given.get("training")
        if not isinstance(flag, fx.Node):
            continue
        path = str(flag.target).rpartition("training")[0].removesuffix(".")
        given["training"] = modes[path] = model.get_submodule(path).training
        node.args, node.kwargs = (given.pop("input"),), given
        if not flag.users:
            graph.erase_node(flag)
    return modes


def _batch_norms(graph: fx.Graph) -> list[tuple[fx.Node, dict[str, Any]]]:
    """The nodes that normalise over the batch, and their arguments by name."""
    return [
        (node, dict(inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs).arguments))
        for node in graph.nodes
        if node.target is F.batch_norm
    ]


@contextmanager
def modes_kept(*modules: nn.Module | None) -> Iterator[None]:
    """The training flag of every module inside is put back afterwards."""
    flags = [(inner, inner.training) for module in modules if module is not None for inner in module.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def other_mode(model: nn.Module) -> Iterator[None]:
    """Every module that may change its mode with its training flag inverted, and put back afterwards."""
    fixed = {id(model.get_submodule(path)) for path in fixed_by_statistics(model)}
    with modes_kept(model):
        for module in model.modules():
            if id(module) not in fixed:
                module.training = not module.training
        yield


def by_mode(training: bool, when_training: Any, when_evaluating: Any) -> Any:
    """One of two constants, as the mode says."""
    return when_training if training else when_evaluating


def make_live(
    graph: fx.Graph,
    other: fx.Graph,
    model: nn.Module,
    numbers: Collection[fx.Node] = (),
    other_numbers: Collection[fx.Node] = (),
) -> str:
    """Turns arguments that follow the training flag into reads of it.

    Args:
        graph: Captured in the modes that the modules are in. Is changed, if the graphs differ in such arguments alone.
        other: Captured in the other mode.
        model: Holds the flags.
        numbers: Nodes that compute sizes, which the other graph may have as constants.
        other_numbers: The same in the other graph.

    Returns:
        In what else the graphs differ; "" where they do not.
    """
    found = []
    for pair in align(graph, other, numbers, other_numbers):
        if isinstance(pair, str):
            return pair
        node, differing = pair.node, pair.differing
        if differing == {}:
            continue
        if differing is None or not all(_is_constant(a) and _is_constant(b) for a, b in differing.values()):
            return f"`{node.name}` has other arguments"
        found.append((node, {at: theirs for at, (_, theirs) in differing.items()}))
    for node, others in found:
        _follow_flag(node, others, model)
    return ""


@dataclass(frozen=True)
class Pair:
    """Two nodes of two graphs that do the same.

    Attributes:
        node: Of the first graph.
        differing: Position among the leaves of the arguments -> the two values; None where the structures differ.
    """

    node: fx.Node
    differing: dict[int, tuple[Any, Any]] | None


def align(
    graph: fx.Graph, other: fx.Graph, numbers: Collection[fx.Node] = (), other_numbers: Collection[fx.Node] = ()
) -> Iterator[Pair | str]:
    """The nodes of two graphs that do the same, in order; a text where they stop to.

    What makes no difference to values (`contiguous()`, and `expand()` of what has its size already) may be missing.
    """
    ours = [node for node in graph.nodes if node not in numbers]
    theirs = [node for node in other.nodes if node not in other_numbers]
    places: tuple[dict[fx.Node, int], dict[fx.Node, int]] = ({}, {})
    at, beside = 0, 0
    while at < len(ours) and beside < len(theirs):
        node, twin = ours[at], theirs[beside]
        if (node.op, str(node.target)) == (twin.op, str(twin.target)):
            places[0][node] = places[1][twin] = len(places[0]) + len(places[1])
            at, beside = at + 1, beside + 1
            yield Pair(node, _differing(_anonymous(node, places[0]), _anonymous(twin, places[1])))
        elif node.target in _TRANSPARENT:
            places[0][node], at = places[0][node.all_input_nodes[0]], at + 1
        elif twin.target in _TRANSPARENT:
            places[1][twin], beside = places[1][twin.all_input_nodes[0]], beside + 1
        elif "output" in (node.op, twin.op):
            break
        else:
            yield f"it computes `{node.name}` where it otherwise computes `{twin.name}`"
            return
    if left := [*ours[at:], *theirs[beside:]]:
        yield f"it computes `{left[0].name}` or not"


_TRANSPARENT = ("contiguous", "expand")


def different_work(
    graph: fx.Graph, other: fx.Graph, numbers: Collection[fx.Node] = (), other_numbers: Collection[fx.Node] = ()
) -> str:
    """The first node at which two graphs do different things; "" where there is none."""
    for pair in align(graph, other, numbers, other_numbers):
        if isinstance(pair, str):
            return pair
        if pair.differing != {}:
            return f"`{pair.node.name}` has other arguments"
    return ""


def _differing(mine: Any, yours: Any) -> dict[int, tuple[Any, Any]] | None:
    """The leaves in which two structures differ; None where they are built differently."""
    flat, spec = pytree.tree_flatten(mine)
    other, other_spec = pytree.tree_flatten(yours)
    if spec != other_spec:
        return None
    return {at: (a, b) for at, (a, b) in enumerate(zip(flat, other, strict=True)) if a != b}


class _Any:
    """Equal to everything."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


def _anonymous(node: fx.Node, places: dict[fx.Node, int]) -> Any:
    """Arguments with the places of nodes for nodes; sizes are equal to everything."""
    return fx.map_arg((node.args, node.kwargs), lambda n: f"node {places[n]}" if n in places else _Any())  # pyright: ignore[reportArgumentType, reportReturnType]


def _is_constant(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and value[:5] != "node ")


def _follow_flag(node: fx.Node, others: dict[int, Any], model: nn.Module) -> None:
    path = info_of(node).module
    training = model.get_submodule(path).training
    flat, spec = pytree.tree_flatten((node.args, node.kwargs))
    with node.graph.inserting_before(node):
        flag = node.graph.create_node("get_attr", f"{path}.training" if path else "training")
        annotate(flag, info_of(node))
        for at, other in others.items():
            pair = (flat[at], other) if training else (other, flat[at])
            if pair == (True, False):
                flat[at] = flag
            else:
                flat[at] = annotate(node.graph.call_function(by_mode, (flag, *pair)), info_of(node))
    node.args, node.kwargs = pytree.tree_unflatten(flat, spec)
