"""Sites as functions with bodies: the nodes of each are cut out of a model and called in their place.

Promises: the model computes what it did. Functions with equal bodies are one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from perexfx.views.onnx.translate import fold, free_name

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "perexfx"

KeyOf = Callable[["ir.Node"], "str | None"]
"""Which part a node belongs to; None: to none that is cut out."""


def share_nothing(graph: ir.Graph, key_of: KeyOf) -> dict[ir.Node, str | None]:
    """The part of every node, after each part got constants of its own."""
    parts = {node: key_of(node) for node in graph}
    for node in list(graph):
        if node.op_type != "Constant" or node.domain:
            continue
        (value,) = node.outputs
        for part in sorted({parts[user] for user in value.consumers() if user in parts}, key=str):
            if part != parts[node]:
                copied = _copy_of(node)
                graph.insert_after(node, copied)
                parts[copied] = part
                for user, at in value.uses():
                    if user in parts and parts[user] == part:
                        user.replace_input_with(at, copied.outputs[0])
    return parts


def _copy_of(constant: ir.Node) -> ir.Node:
    import onnx_ir as ir  # noqa: PLC0415 (an extra)

    return ir.Node("", "Constant", (), constant.attributes)


class Functions:
    """The functions of a model, by their bodies.

    Args:
        model: To which they are added.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self._known: dict[bytes, str] = {}
        self._counts: dict[str, int] = {}
        model.opset_imports[DOMAIN] = 1

    def add(self, kind: str, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], nodes: Sequence[ir.Node]) -> str:
        """Name of the function with this body, which becomes its own: `kind`, or with a number where bodies differ."""
        import onnx_ir as ir  # noqa: PLC0415 (an extra)

        word = re.sub(r"\W+", "_", kind).strip("_")
        imports = {domain: version for domain, version in self.model.opset_imports.items() if domain != DOMAIN}
        outputs, nodes = _folded(inputs, outputs, nodes, imports)
        _name_body(inputs, outputs, nodes)
        graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports=imports, name=word)
        function = ir.Function(DOMAIN, word, graph=graph, attributes=())
        body = ir.to_proto(function).SerializeToString(deterministic=True)
        if body not in self._known:
            count = self._counts[word] = self._counts.get(word, 0) + 1
            function.name = self._known[body] = word if count == 1 else f"{word}_{count}"
            self.model.functions[function.identifier()] = function
        return self._known[body]


def _folded(
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    nodes: Sequence[ir.Node],
    imports: dict[str, int],
) -> tuple[list[ir.Value], list[ir.Node]]:
    """A body without what its arguments' shapes make constant: its results and nodes."""
    import onnx_ir as ir  # noqa: PLC0415 (an extra)
    from onnx_ir.passes import common  # noqa: PLC0415 (an extra)

    graph: Any = ir.Graph(inputs, outputs, nodes=nodes, opset_imports=imports, name="body")
    body = ir.Model(graph, ir_version=10)
    common.NameFixPass()(body)
    fold(body)
    for node in graph:
        _drop_zero_bias(node)
    common.RemoveUnusedNodesPass()(body)
    found, results = list(graph), []
    for value in graph.outputs:
        is_given = any(value is given for given in inputs)
        copied = ir.node("Identity", [value]) if is_given else None
        found += [copied] if copied else []
        results.append(copied.outputs[0] if copied else value)
    graph.outputs.clear()
    graph.inputs.clear()
    graph.remove(list(graph))
    return results, found


def _drop_zero_bias(node: ir.Node) -> None:
    """Torch's exporter gives convolutions without a bias one of zeros."""
    if node.op_type in ("Conv", "ConvTranspose") and len(node.inputs) == 3:
        bias = node.inputs[2].const_value if node.inputs[2] is not None else None
        if bias is not None and not bias.numpy().any():
            node.resize_inputs(2)


def _name_body(inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], nodes: Sequence[ir.Node]) -> None:
    """Names that say nothing of where a body comes from, so that equal bodies are equal. Inputs have theirs."""
    taken = {value.name or "" for value in inputs}
    results = [value for node in nodes for value in node.outputs]
    for value in inputs:
        value.type = value.shape = None
    for at, value in enumerate(outputs):
        value.name = free_name(f"output_{at}" if at else "output", taken)
    ends = {id(value) for value in outputs}
    at = 0
    for node in nodes:
        node.name = None
    for value in results:
        value.type = value.shape = None
        if id(value) not in ends:
            while f"value_{at}" in taken:
                at += 1
            value.name = f"value_{at}"
            at += 1
    for node in nodes:
        if node.op_type == "Constant" and "value" in node.attributes:
            node.attributes["value"].value.name = None


def cut_out(
    functions: Functions,
    nodes: Sequence[ir.Node],
    name: str,
    kind: str,
    words: Mapping[ir.Value, str],
    first: ir.Value,
) -> ir.Node:
    """The call that stands in the graph for some of its nodes.

    Args:
        functions: Of the model.
        nodes: In graph order.
        name: Of the call.
        kind: What its function is called.
        words: What the function calls its arguments, where they have a name of their own.
        first: The call's first argument, which the body does not read.
    """
    import onnx_ir as ir  # noqa: PLC0415 (an extra)

    graph: Any = functions.model.graph
    every = [inner for node in nodes for inner in (node, *_nested(node))]
    read, left = _border(nodes, every)
    given = [first, *read]
    inputs = _arguments(given, words)
    results = [ir.Value(name=value.name, type=value.type, shape=value.shape) for value in left]
    call = ir.Node(DOMAIN, "", given, outputs=results, name=name)
    graph.insert_after(nodes[-1], call)
    for value, result in zip(left, results, strict=True):
        _replace(value, result, {*every})
        for at, end in enumerate(graph.outputs):
            if end is value:
                graph.outputs[at] = result
    graph.remove(nodes)
    for node in every:
        for at, value in enumerate(node.inputs):
            if value in read:
                node.replace_input_with(at, inputs[given.index(value)])
    call.op_type = functions.add(kind, inputs, left, nodes)
    return call


def _border(nodes: Sequence[ir.Node], every: Sequence[ir.Node]) -> tuple[list[ir.Value], list[ir.Value]]:
    """What some nodes read from outside, and which of their results are read there; in graph order.

    Args:
        nodes: In graph order.
        every: The same, and those of their inner graphs.
    """
    own = set(every)
    made = {value for node in every for value in node.outputs} | _inner_inputs(nodes)
    read = dict.fromkeys(value for node in every for value in node.inputs if value is not None and value not in made)
    results = [value for node in nodes for value in node.outputs]
    left = [v for v in results if v.is_graph_output() or any(user not in own for user in v.consumers())]
    return list(read), left


def _nested(node: ir.Node) -> list[ir.Node]:
    """The nodes of a node's inner graphs."""
    found = []
    for attribute in node.attributes.values():
        if attribute.type.name in ("GRAPH", "GRAPHS"):
            for graph in attribute.value if attribute.type.name == "GRAPHS" else [attribute.value]:
                found += list(graph.all_nodes())
    return found


def _inner_inputs(nodes: Sequence[ir.Node]) -> set[ir.Value]:
    """What the inner graphs of some nodes take, or hold."""
    graphs: list[Any] = [inner.graph for node in nodes for inner in _nested(node)]
    return {v for graph in graphs for v in (*graph.inputs, *graph.initializers.values())}


def _replace(value: ir.Value, other: ir.Value, own: set[ir.Node]) -> None:
    """Puts a value in another's place, but for its own part."""
    for user, at in list(value.uses()):
        if user not in own:
            user.replace_input_with(at, other)


def _arguments(given: Sequence[ir.Value], words: Mapping[ir.Value, str]) -> list[ir.Value]:
    """Of a function, by the values it is called with."""
    import onnx_ir as ir  # noqa: PLC0415 (an extra)

    found, counts, taken = [], dict[str, int](), set[str]()
    for value in given:
        word = words.get(value, "input")
        count = counts[word] = counts.get(word, 0) + 1
        name = free_name(word if count == 1 else f"{word}_{count}", taken)
        found.append(ir.Value(name=name, type=value.type, shape=value.shape))
    return found


__all__ = ["DOMAIN", "Functions", "KeyOf", "cut_out", "share_nothing"]
