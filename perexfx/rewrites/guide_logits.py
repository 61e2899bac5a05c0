"""Guiding the logits of parallel pathways: each merge is made to lean on those that are weak at a class.

Promises: the model's own merge stays in the graph; with equal scores, and in eval, the guided one is equal to it to the
last bit. Where it is not clear what to guide nothing is, and the error shows the places.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from perexfx.capture import capture
from perexfx.ir.errors import ArgumentError, RefusedError
from perexfx.ir.inputs import GivenInputs, batch_sizes, bind_inputs, by_name, named_leaves
from perexfx.ir.node import NodeInfo, annotate, info_of, place_of
from perexfx.ir.refusal import Refusal
from perexfx.rewrites.guidance import Guidance
from perexfx.rewrites.guide import Guide, stack_pathways
from perexfx.rewrites.merges import Found, Logits, Merge, find_merges
from perexfx.rewrites.operands import writes
from perexfx.rewrites.rewritten import Change, Rewriting, Rewritten, rewritten
from perexfx.rewrites.subject import Subject, subject_of

GUIDE, TARGETS = "guide", "targets"
"""Names of the submodule and of the argument that a guided model has beside its own."""


def guide_logits(
    model: nn.Module,
    example_inputs: GivenInputs | None = None,
    *,
    num_classes: int,
    score: str = "loss",
    choose: str = "soft",
    per: str = "class",
    temperature: float = 1.0,
    momentum: float = 0.9,
    merge: str = "auto",
    table_from: str = "batch",
) -> Rewritten:
    """The model, with the merge of its pathways' logits guided: pathways learn most where they are weak.

    A reading of GuideBP (Mandal et al. 2021, arXiv:2104.11620), of which only the abstract is public.

    The result shares the model's parameters and takes its arguments and `targets`, the classes `[n]` of the examples:
    `g(x, targets=y)` in training. Its submodule `guide` holds the table `g.guide.weakness`, `[P, C]`: how badly each
    pathway alone does on each class. In training a table from the batch takes up the scores of every forward with
    targets, and they count from the next forward on; without targets it is used as it is. Targets that neither the
    table nor `per` asks for are left unread. In eval the merge is the plain one.

    Guided are sums (`a + b`, `sum([...])`, `torch.stack([...]).sum(0)`), means and weighted sums of pathways' logits.
    Of a model that returns its heads in a list, tuple or dict, their mean is guided and returned.

    Args:
        model: Any module that `perexfx.transform` can capture, with two pathways or more.
        example_inputs: A tensor, a tuple of positional inputs, or a dict of keyword inputs, examples first. With them
            logits are known by their shape, `[n, num_classes]`, wherever they are merged; without, the merge must be
            what the model returns.
        num_classes: C.
        score: What the table holds of pathway p and class c, over the examples of class c: "loss": the mean
            cross-entropy; "error": how often another class has the largest logit; "probability": the mean of one minus
            the probability of c.
        choose: "soft": a pathway's share is `softmax_p(log(W + 0.001) / temperature)`, at temperature 1 proportional to
            its score; "weakest": all is the weakest one's (it starves the others, and logs a warning).
        per: "class": logits of class c use column c of the table; the value stays the plain merge, and the gradient is
            routed. "target": all logits of an example use the column of its target, in the value too.
        temperature: Of "soft": higher is more even.
        momentum: m of the table's `W = m W + (1 - m) s`.
        merge: The graph's node to guide, or "auto": the only one there is. "output": the heads that are returned.
        table_from: "batch": from the targets that the forward is given. "given": from `g.guide.update(logits, targets)`
            alone, as `perexfx.transform` needs it.

    Returns:
        The guided module.

    Raises:
        ArgumentError: An argument is not what it should be, or the model has no room for `guide` and `targets`.
        CaptureError: The model cannot be captured.
        RefusedError: There is no merge, or there are several; `perexfx.visualize(error, path)` shows them.
    """
    guidance = Guidance(num_classes, score, choose, per, temperature, momentum, table_from)
    _check_model(model, merge)
    subject = subject_of(model, example_inputs)
    n = 0
    if example_inputs is not None:
        n = batch_sizes(named_leaves(by_name(bind_inputs(model, example_inputs, "example_inputs"))), 0)[0]
    logits = Logits(subject.shapes, (n, num_classes))
    found = _choose(subject, logits, merge)
    before = copy.deepcopy(subject.graph)
    guide = _guide_for(subject.twin, len(found.terms), guidance, model.training)
    subject.twin.add_module(GUIDE, guide)
    what = str(found)
    place = place_of(found.node)
    _insert(subject, found, guide)
    how = f"score {score}, {choose} choice, per {per}, table {'from the batch' if table_from == 'batch' else 'given'}"
    change = Change(place, what, f"guided: {how}")
    summary = f"The merge of {len(found.terms)} pathways, {what}, is guided."
    rewriting = Rewriting("guide_logits", summary, before, (change,), subject.sizes)
    return rewritten(subject.twin, subject.captured, rewriting)


def _check_model(model: nn.Module, merge: str) -> None:
    """Raises: ArgumentError, where a model has no room for what a guided one has beside its own."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"`model` should be a torch.nn.Module. Found {type(model).__name__}.")
    if not isinstance(merge, str):
        raise ArgumentError(f'`merge` should be "auto" or the name of a node of the graph. Found {merge!r}.')
    kind = type(model).__name__
    if "perexfx" in model._modules:
        raise ArgumentError("`model` was transformed already. Guide the original model, and transform the result.")
    if hasattr(model, GUIDE):
        already = isinstance(model._modules.get(GUIDE), Guide)
        raise ArgumentError(
            f"`{kind}` is guided already. Guide the original model instead."
            if already
            else f"`{kind}` has an attribute `{GUIDE}`, a name that guided models need for their guide. Rename it."
        )
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            stars = "*" if parameter.kind is inspect.Parameter.VAR_POSITIONAL else "**"
            raise ArgumentError(
                f"`{kind}.forward` takes `{stars}{name}`, beside which a guided forward cannot have its argument "
                f"`{TARGETS}`. Write its arguments out."
            )
        if name == TARGETS:
            raise ArgumentError(
                f"`{kind}.forward` has an argument `{TARGETS}`, which is the name of a guided forward's own. Rename it."
            )


def _choose(subject: Subject, logits: Logits, named: str) -> Merge:
    """The merge to guide.

    Raises:
        ArgumentError: No node has the name asked for.
        RefusedError: There is no merge, or there are several.
    """
    if named != "auto" and named not in [node.name for node in subject.graph.nodes]:
        there = _list(find_merges(subject.graph, subject.twin, logits).merges)
        raise ArgumentError(f'`merge` should be the name of a node of the graph, or "auto". Found {named!r}. {there}')
    found = find_merges(subject.graph, subject.twin, logits, None if named == "auto" else named)
    if len(found.merges) == 1:
        return found.merges[0]
    refusals = _several(found.merges) if found.merges else _none(subject, found, logits, named)
    error = RefusedError(refusals)
    error.graph, error.module = subject.graph, subject.twin
    raise error


def _several(merges: Sequence[Merge]) -> list[Refusal]:
    """A refusal for each merge, of which only one can be guided."""
    return [
        Refusal(
            f"{place_of(merge.node)} is one of {len(merges)} merges: {merge}.",
            "Only one merge is guided.",
            f'Pass `merge="{merge.node.name}"` to guide this one.',
            place_of(merge.node),
        )
        for merge in merges
    ]


_WANTED = "A merge adds or averages logits of parallel pathways, which are computed side by side."
_BY_SHAPES = (
    "Pass `example_inputs`, with which merges anywhere, and heads that are returned apart, are found by their shapes; "
    'or name a node, `merge="<node>"`.'
)


def _none(subject: Subject, found: Found, logits: Logits, named: str) -> list[Refusal]:
    """Why there is nothing to guide: near misses, or the output."""
    by_shapes = "" if logits.shapes else f" {_BY_SHAPES}"
    if found.misses:
        return [
            Refusal(
                f"{place_of(miss.node)} is no merge that can be guided: it {miss.reason}.",
                _WANTED,
                miss.remedy + by_shapes,
                place_of(miss.node),
            )
            for miss in found.misses
        ]
    values = "two or more values " + (
        "of shape [{}, {}]".format(*logits.shape) if logits.shapes else "that carry examples"
    )
    if named != "auto":
        there = find_merges(subject.graph, subject.twin, logits).merges
        place = place_of(next(node for node in subject.graph.nodes if node.name == named))
        return [Refusal(f"{place} neither adds nor averages {values}.", _WANTED, _list(there), place)]
    what, remedy = (
        f"nothing adds or averages {values}",
        "Check `num_classes`: it should be the size of their last axis.",
    )
    if logits.shapes is None:
        what, remedy = f"what the model returns neither adds nor averages {values}", _BY_SHAPES
    place = place_of(next(node for node in subject.graph.nodes if node.op == "output"))
    return [Refusal(f"No merge of pathways' logits was found: {what}.", _WANTED, remedy, place)]


def _list(merges: Sequence[Merge]) -> str:
    names = ", ".join(f"`{merge.node.name}`" for merge in merges)
    return f"Merges are at {names}." if names else "No merge was found."


def _guide_for(twin: nn.Module, pathways: int, guidance: Guidance, training: bool) -> Guide:
    """A guide where the model is, and as precise."""
    found = next((p for p in twin.parameters() if p.is_floating_point()), torch.empty(0))
    dtype = torch.float64 if found.dtype == torch.float64 else torch.float32
    return Guide(pathways, guidance, dtype=dtype, device=found.device).train(training)


def _insert(subject: Subject, merge: Merge, guide: Guide) -> None:
    """Puts a guide between a merge and its readers."""
    graph, readers, old = subject.graph, list(merge.node.users), set(subject.graph.nodes)
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        targets = graph.create_node("placeholder", TARGETS, (None,))
    with graph.inserting_before(merge.node if merge.kind == "heads" else merge.node.next):
        values = [_as_read(subject, merge, term.value, term.reader) for term in merge.terms]
        stacked = _stack(graph, values, guide)
        merged = graph.call_method("mean", (stacked, 0)) if merge.kind == "heads" else merge.node
        terms = _weighted(graph, values, stacked, merge, guide)
        if guide.guidance.table_from == "batch":
            alone = stacked
            if any(term.logits is not term.value for term in merge.terms):
                logits = [_as_read(subject, merge, term.logits, term.logits_reader) for term in merge.terms]
                alone = _stack(graph, logits, guide)
            guided = graph.call_module(GUIDE, (merged, terms, alone, targets))
        else:
            guided = _inlined(graph, guide, {"merged": merged, "terms": terms, "targets": targets})
    if merge.kind == "heads":
        merge.node.args = (guided,)
    for reader in readers:
        reader.replace_input_with(merge.node, guided)
    for node in set(graph.nodes) - old:
        annotate(node, NodeInfo() if node is targets else NodeInfo(GUIDE, info_of(merge.node).source))


def _as_read(subject: Subject, merge: Merge, value: fx.Node, reader: fx.Node) -> fx.Node:
    """A value as a merge reads it: a copy of it, where something may write over it until the merge is done."""
    nodes = list(subject.graph.nodes)
    between = nodes[nodes.index(reader) : nodes.index(merge.node) + 1]
    if not any(writes(node, subject.twin) for node in between if node.op != "output"):
        return value
    with subject.graph.inserting_before(reader):
        return subject.graph.call_method("clone", (value,))


def _weighted(graph: fx.Graph, values: list[fx.Node], stacked: fx.Node, merge: Merge, guide: Guide) -> fx.Node:
    """Stacked values, each times its factor."""
    factors = [term.factor for term in merge.terms]
    if factors == [factors[0]] * len(factors):
        return stacked if factors[0] == 1 else graph.call_function(operator.mul, (stacked, factors[0]))
    return _stack(graph, [graph.call_function(operator.mul, pair) for pair in zip(values, factors, strict=True)], guide)


def _stack(graph: fx.Graph, values: list[fx.Node], guide: Guide) -> fx.Node:
    return graph.call_function(stack_pathways, (values, guide.guidance.num_classes))


def _inlined(graph: fx.Graph, guide: Guide, given: Mapping[str, fx.Node]) -> fx.Node:
    """A guide's forward as nodes of a graph, in functional form.

    Args:
        graph: Where the nodes go, at its insertion point.
        guide: Is submodule `guide` of the module that the graph runs on.
        given: The guide's arguments.
    """
    wanted = ("merged", "terms", "targets") if guide.guidance.per == "target" else ("merged", "terms")
    captured = capture(guide, {name: torch.empty(0) for name in wanted})
    assert not captured.fixed_modes
    assert not captured.constants
    values: dict[fx.Node, Any] = {}
    for node in captured.graph.nodes:
        if node.op == "placeholder":
            values[node] = given.get(str(node.target))
        elif node.op != "output":
            values[node] = graph.node_copy(node, values.__getitem__)
            if node.op == "get_attr":
                values[node].target = f"{GUIDE}.{node.target}"
    output = next(node for node in captured.graph.nodes if node.op == "output")
    return values[output.args[0]]


__all__ = ["guide_logits"]
