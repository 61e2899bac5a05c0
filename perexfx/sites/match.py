"""Matching: graph and layer rules to sites.

Promises: every use of every trainable parameter belongs to exactly one site, or the model is refused with an error that
names parameter, node, module and line. All refusals are collected before one is raised.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import networkx as nx
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized

from perexfx.analysis import Analysis
from perexfx.capture import IN_PLACE_FUNCTIONS
from perexfx.ir.errors import CoverageError
from perexfx.ir.node import info_of, place_of
from perexfx.ir.refusal import Refusal
from perexfx.ir.rule import Rule, Target
from perexfx.ir.site import Expression, Operand, Site
from perexfx.sites.classify import State, classify
from perexfx.sites.row_lengths import row_lengths, shapes_without_inputs, transpose_of


def match(
    graph: fx.Graph,
    module: nn.Module,
    trainable: Collection[str],
    rules: Sequence[Rule],
    fallback: Rule,
    batch_dim: int,
    analysis: Analysis | None = None,
) -> tuple[Site, ...]:
    """The sites of a graph, in graph order.

    Args:
        graph: In functional form.
        module: Holds what the graph names.
        trainable: Names of the parameters that are trained; all others are constants.
        rules: The layer rules to match with; the first that covers a function wins.
        fallback: Covers what no rule covers.
        batch_dim: The example axis of the inputs.
        analysis: What is known about the values. Without it, `x.shape[batch_dim]` is taken to be the batch size and
            every other size to be constant; `confirm` checks that once shapes are known.

    Raises:
        CoverageError: A use that no rule covers.
    """
    states = classify(graph, trainable, batch_dim, analysis)
    matcher = _Matcher(graph, module, states, rules, fallback, analysis)
    for node in graph.nodes:
        if node.op == "output" or states[node] is State.EXAMPLE:
            matcher.visit(node)
    if analysis is not None:
        matcher.refuse_written(analysis.written_by)
    if matcher.refusals:
        raise CoverageError(matcher.refusals)
    return _with_groups(matcher.sites)


def confirm(assumed: Sequence[Site], found: Sequence[Site]) -> None:
    """That sites matched without shapes are those that the shapes give.

    Raises:
        CoverageError: They are not.
    """

    def parts(sites: Sequence[Site]) -> dict[str, tuple[tuple[str, str], ...]]:
        return {site.node: tuple((operand.name, operand.node) for operand in site.operands) for site in sites}

    before, after = parts(assumed), parts(found)
    places = {site.node: site.place for site in (*assumed, *found)}
    differing = [places[node] for node in places if before.get(node) != after.get(node)]
    if differing:
        raise CoverageError(
            [
                Refusal(
                    what=f"{place} has other operands than it seemed when the model was transformed.",
                    why="Without example inputs, every tensor input is taken to carry examples, and "
                    "`x.shape[batch_dim]`, and no other size, to be their number.",
                    remedy="Pass `example_inputs` to `transform`.",
                    place=place,
                )
                for place in differing
            ]
        )


class _Matcher:
    """Collects sites and refusals, node by node."""

    def __init__(
        self,
        graph: fx.Graph,
        module: nn.Module,
        states: Mapping[fx.Node, State],
        rules: Sequence[Rule],
        fallback: Rule,
        analysis: Analysis | None,
    ) -> None:
        self.graph, self.module, self.states, self.analysis = graph, module, states, analysis
        self.fallback = fallback
        self.rules: dict[Target, Rule] = {}
        for rule in rules:
            for target in rule.targets:
                self.rules.setdefault(target, rule)
        self.sites: list[Site] = []
        self.refusals: list[Refusal] = []
        self.names: set[str] = set()
        self.expressions: set[fx.Node] = set()
        self.shapes: Mapping[fx.Node, tuple[int, ...]] | None = None

    def visit(self, node: fx.Node) -> None:
        """Adds a site, or a refusal, where a node reads a parameter expression."""
        read = [n for n in node.all_input_nodes if self.states[n] is State.PARAMETER]
        if not read:
            return
        if node.op == "output":
            self._refuse(
                node,
                read,
                "it is returned by the forward, and a loss outside could then use it past clipping",
            )
            return
        if reason := self._beyond_rules(node):
            self._refuse(node, read, reason)
            return
        rule, arguments, operands = self._rule_for(node, read)
        if reason := rule.refuses(arguments) or self._random(operands.values()):
            self._refuse(node, read, reason)
            return
        self.expressions.update(*map(self._inside, operands.values()))
        self.sites.append(
            Site(
                name=self._name(node, list(operands.values())),
                rule=rule,
                target=node.target,
                operands=tuple(Operand(name, value.name, self._expression(value)) for name, value in operands.items()),
                place=place_of(node),
                group="",
            )
        )

    def refuse_written(self, written_by: Mapping[str, Sequence[str]]) -> None:
        """Refuses writes into what an expression is, or into what it has read: neither is seen when it is pulled back.

        A parameter itself may be changed under `torch.no_grad()`; `perexfx.runtime.pull_back` checks its version.
        """
        order = {node.name: at for at, node in enumerate(self.graph.nodes)}
        by_name = {node.name: node for node in self.graph.nodes}
        found: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            carries_gradient = self.states[node] is State.PARAMETER and not info_of(node).stops_gradient
            if node.op == "get_attr" or not (carries_gradient or node in self.expressions):
                continue
            for read in (node, *node.all_input_nodes):
                for writer in (by_name[name] for name in written_by.get(read.name, ())):
                    if self.states[read] is State.PARAMETER:
                        is_seen = info_of(writer).stops_gradient
                    else:
                        is_seen = order[writer.name] < order[node.name]
                    if not is_seen:
                        found.setdefault(writer, node)
        for writer, node in found.items():
            self._refuse(writer, [node], "it writes in place into what a parameter expression is made of")

    def _beyond_rules(self, node: fx.Node) -> str:
        """Why no rule can cover a node, the fallback neither; "" where one may."""
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node.op == "call_module":
            return f"it is passed to the module `{node.target}`, and no layer rule covers calls of modules"
        if node.target in (*IN_PLACE_FUNCTIONS, operator.setitem) or name.partition(".")[0].endswith("_"):
            return "it writes in place into a value that others may read"
        if node.kwargs.get("out") is not None:
            return "it writes into `out=`"
        if self._is_random(node) and node.target not in self.rules:
            return "it draws random numbers, which the fallback could not draw again"
        return ""

    def _rule_for(self, node: fx.Node, read: Sequence[fx.Node]) -> tuple[Rule, dict[str, Any], dict[str, fx.Node]]:
        """The rule that covers a node, its arguments, and those that are parameter expressions."""
        rule = self.rules.get(node.target, self.fallback)
        try:
            arguments = rule.bind(node.target, node.args, node.kwargs)
        except TypeError:
            rule = self.fallback
            arguments = rule.bind(node.target, node.args, node.kwargs)
        operands = self._operands(rule, arguments)
        if not set(read) <= set(operands.values()):
            rule = self.fallback
            arguments = rule.bind(node.target, node.args, node.kwargs)
            operands = self._operands(rule, arguments)
        return rule, arguments, operands

    def _operands(self, rule: Rule, arguments: Mapping[str, Any]) -> dict[str, fx.Node]:
        named = {name: arguments[name] for name in rule.operands_of(arguments)}
        return {
            name: value
            for name, value in named.items()
            if isinstance(value, fx.Node) and self.states[value] is State.PARAMETER
        }

    def _is_random(self, node: fx.Node) -> bool:
        return _draws_random_numbers(node, self.module) or bool(self.analysis and self.analysis.is_random(node))

    def _random(self, operands: Iterable[fx.Node]) -> str | None:
        """Why an operand cannot be computed once more in the backward."""
        for value in operands:
            for inner in self._inside(value):
                if self._is_random(inner):
                    return f"its parameter passes through `{inner.name}`, which draws random numbers"
        return None

    def _refuse(self, node: fx.Node, read: Iterable[fx.Node], why: str) -> None:
        place = place_of(node)
        names = dict.fromkeys(name for value in read for name in self._expression(value).parameters)
        many = len(names) > 1
        subject = f"{'Parameters' if many else 'Parameter'} {', '.join(f'`{name}`' for name in names)}"
        self.refusals.append(
            Refusal(
                what=f"{subject} {'are' if many else 'is'} used by {place}: {why}.",
                why="Every use of a trainable parameter must be covered.",
                remedy=f"Freeze {'them' if many else 'it'} (`requires_grad_(False)`), or rewrite that line"
                + ("." if self.analysis else "; where it reads a size, pass `example_inputs`, which tell sizes apart."),
                place=place,
            )
        )

    def _name(self, node: fx.Node, operands: Sequence[fx.Node]) -> str:
        path = info_of(node).module
        owner = self.module.get_submodule(path) if path else None
        is_layer = owner is not None and type(owner).__module__.startswith("torch.nn") and _has_weight(owner)
        name = path if is_layer else self._expression(operands[0]).parameters[0]
        unique, count = name, 1
        while unique in self.names:
            count += 1
            unique = f"{name}#{count}"
        self.names.add(unique)
        return unique

    def _expression(self, value: fx.Node) -> Expression:
        """What a parameter expression is made of: everything between its parameters and it."""
        if value.op == "get_attr":
            return Expression((str(value.target),))
        return self._extract(value, self._inside(value))

    def _inside(self, value: fx.Node) -> set[fx.Node]:
        """The nodes between an expression's parameters and its value, itself included."""
        inside: set[fx.Node] = set()
        stack = [value]
        while stack:
            node = stack.pop()
            if node not in inside and self.states[node] is State.PARAMETER and node.op != "get_attr":
                inside.add(node)
                stack.extend(node.all_input_nodes)
        return inside

    def _extract(self, value: fx.Node, inside: set[fx.Node]) -> Expression:
        """The sub-graph as a function of its parameters and constants."""
        nodes = [node for node in self.graph.nodes if node in inside]
        read = [n for node in nodes for n in node.all_input_nodes if n not in inside]
        parameters = list(dict.fromkeys(n for n in read if self.states[n] is State.PARAMETER))
        constants = list(dict.fromkeys(n for n in read if self.states[n] is not State.PARAMETER))
        inner = fx.Graph()
        copies = {n: inner.placeholder(n.name) for n in (*parameters, *constants)}
        for node in nodes:
            copies[node] = inner.node_copy(node, lambda n: copies[n])
            copies[node].meta = {}
        inner.output(copies[value])
        root = {str(n.target): self.module.get_submodule(str(n.target)) for n in nodes if n.op == "call_module"}
        return Expression(
            tuple(str(n.target) for n in parameters),
            tuple(n.name for n in constants),
            fx.GraphModule(root, inner, class_name="Expression"),
            row_lengths(value, nodes, parameters, constants, self._shape_of),
            transpose_of(value, constants),
        )

    def _shape_of(self, node: fx.Node) -> tuple[int, ...] | None:
        """Of a value that carries no examples, where it is known."""
        if self.analysis is not None:
            found = self.analysis.tensor(node)
            return None if found is None else found.shapes[0]
        if self.shapes is None:
            others = [node for node, state in self.states.items() if state is not State.EXAMPLE]
            self.shapes = shapes_without_inputs(others, self.module)
        return self.shapes.get(node)


def _has_weight(layer: nn.Module) -> bool:
    """Whether a layer has an attribute `weight`, without reading it: a parametrization that is read may move."""
    names = [*layer._parameters, *vars(layer)]
    if is_parametrized(layer):
        names += layer.get_submodule("parametrizations")._modules
    return "weight" in names


_RANDOM = frozenset(
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout bernoulli multinomial normal rrelu "
    "gumbel_softmax native_dropout".split()
)


def _draws_random_numbers(node: fx.Node, module: nn.Module) -> bool:
    """Whether a node is known by its name to be random; an analysis knows the others."""
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))).__module__ == "torch.nn.modules.dropout"
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.rstrip("_") in _RANDOM


def _with_groups(sites: Sequence[Site]) -> tuple[Site, ...]:
    """Sites that share parameters get one norm together: the connected components of sites and parameters."""
    links: nx.Graph[Any] = nx.Graph()
    for site in sites:
        links.add_node(("site", site.name))
        links.add_edges_from((("site", site.name), ("parameter", name)) for name in site.parameters)
    group = {}
    for component in nx.connected_components(links):
        members = [site.name for site in sites if ("site", site.name) in component]
        group.update(dict.fromkeys(members, members[0]))
    return tuple(replace(site, group=group[site.name]) for site in sites)
