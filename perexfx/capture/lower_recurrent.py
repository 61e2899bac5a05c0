"""Lowering: recurrent operations of several layers and directions to one node per layer and direction.

Promises: the graph computes what it did. Each new node says which module and line it comes from. What cannot be lowered
faithfully (packed sequences, layers whose number is not constant) is an error.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from perexfx.ir.errors import CaptureError
from perexfx.ir.node import annotate, info_of, place_of
from perexfx.ir.recurrent import gru_layer, lstm_layer, rnn_layer

_aten = torch.ops.aten
_LAYERS = {
    torch.lstm: "lstm",
    torch.gru: "gru",
    torch.rnn_tanh: "tanh",
    torch.rnn_relu: "relu",
    _aten.lstm.input: "lstm",
    _aten.gru.input: "gru",
    _aten.rnn_tanh.input: "tanh",
    _aten.rnn_relu.input: "relu",
}
_PACKED = {_aten.lstm.data, _aten.gru.data, _aten.rnn_tanh.data, _aten.rnn_relu.data}
_CELLS = {
    torch.lstm_cell: "lstm",
    torch.gru_cell: "gru",
    torch.rnn_tanh_cell: "tanh",
    torch.rnn_relu_cell: "relu",
    _aten.lstm_cell.default: "lstm",
    _aten.gru_cell.default: "gru",
    _aten.rnn_tanh_cell.default: "tanh",
    _aten.rnn_relu_cell.default: "relu",
}
_ZEROS = {torch.zeros, torch.zeros_like, "new_zeros", _aten.zeros.default, _aten.zeros_like.default}
_ARGUMENTS = "input hx params has_biases num_layers dropout train bidirectional batch_first".split()
_CELL_ARGUMENTS = "input hx w_ih w_hh b_ih b_hh".split()
_FUNCTIONS: dict[str, tuple[Callable[..., Any], dict[str, str]]] = {
    "lstm": (lstm_layer, {}),
    "gru": (gru_layer, {}),
    "tanh": (rnn_layer, {"nonlinearity": "tanh"}),
    "relu": (rnn_layer, {"nonlinearity": "relu"}),
}


def lower_recurrent(graph: fx.Graph) -> None:
    """Replaces the recurrent operations of a graph: layers by one node each, cells by elementary operations.

    Args:
        graph: Is changed.

    Raises:
        CaptureError: An operation cannot be lowered.
    """
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        new = _Nodes(node)
        if node.target in _CELLS:
            _replace(node, _lower_cell(node, new))
        elif node.target in _LAYERS or node.target in _PACKED:
            _replace(node, _lower_layers(node, new))
        else:
            continue
        read = [value for value in node.all_input_nodes if value.target in _ZEROS]
        graph.erase_node(node)
        for value in (*reversed(new.made), *read):
            if not value.users:
                graph.erase_node(value)


class _Nodes:
    """New nodes in front of another, with its place and the beginning of its name."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        self.made: list[fx.Node] = []

    def add(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """One call."""
        graph = self.node.graph
        with graph.inserting_before(self.node):
            made = graph.create_node("call_function", function, args, kwargs, name=f"{self.node.name}_{name}")
        self.made.append(annotate(made, info_of(self.node)))
        return made

    def unpack(self, value: Any, names: Sequence[str]) -> list[fx.Node]:
        """The parts of a tuple, which may itself be a node."""
        if not isinstance(value, fx.Node):
            return list(value)
        return [self.add(name, operator.getitem, value, at) for at, name in enumerate(names)]


def _lower_layers(node: fx.Node, new: _Nodes) -> tuple[fx.Node, ...]:
    """Output and last states of all layers."""
    given = _layer_arguments(node)
    kind, batch_first, dropout = _LAYERS[node.target], given["batch_first"], given["dropout"]
    function, named = _FUNCTIONS[kind]
    letters = "hc" if kind == "lstm" else "h"
    initial = new.unpack(given["hx"], ["h0", "c0"]) if kind == "lstm" else [given["hx"]]
    initial = [None if _is_zeros(state) else state for state in initial]
    directions = (False, True) if given["bidirectional"] else (False,)
    parameters = _parameters(given, given["num_layers"] * len(directions))
    last: list[list[fx.Node]] = []
    x = new.add("time_first", torch.transpose, given["input"], 0, 1) if batch_first else given["input"]
    for layer in range(given["num_layers"]):
        if layer and dropout:
            x = new.add(f"dropout_{layer}", F.dropout, x, dropout, given["train"])
        outputs = []
        for reverse in directions:
            name = f"{layer}_reverse" if reverse else f"{layer}"
            at = len(last)
            states = [
                None if state is None else new.add(f"{letter}0_{name}", torch.select, state, 0, at)
                for letter, state in zip(letters, initial, strict=True)
            ]
            called = new.add(f"layer_{name}", function, x, *states, *parameters[at], reverse=reverse, **named)
            output, *found = new.unpack(called, [f"{part}_{name}" for part in ("output", *letters)])
            outputs.append(output)
            last.append(found)
        x = new.add(f"output_{layer}", torch.cat, outputs, 2) if len(outputs) > 1 else outputs[0]
    if batch_first:
        x = new.add("batch_first", torch.transpose, x, 0, 1)
    stacked = ([found[at] for found in last] for at in range(len(letters)))
    return x, *(new.add(f"{letter}_n", torch.stack, found) for letter, found in zip(letters, stacked, strict=True))


def _layer_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a recurrent operation, by name."""
    given = {**dict(zip(_ARGUMENTS, node.args, strict=False)), **node.kwargs}
    if node.target in _PACKED or "batch_sizes" in given or not isinstance(given["has_biases"], bool):
        raise CaptureError(
            f"{place_of(node)} runs on a packed sequence: its rows follow the lengths of all examples, and no axis "
            "holds one after the other. Pass padded sequences, and mask what comes after their ends."
        )
    constant = ("num_layers", "dropout", "bidirectional", "batch_first")
    if computed := [name for name in constant if isinstance(given[name], fx.Node)]:
        raise CaptureError(f"{place_of(node)} has a `{computed[0]}` that the forward computes. Make it a constant.")
    return given


def _parameters(given: dict[str, Any], runs: int) -> list[tuple[fx.Node | None, ...]]:
    """Those of each layer and direction, in the order in which our functions take them."""
    each = len(given["params"]) // runs
    rows = [tuple(given["params"][at * each : (at + 1) * each]) for at in range(runs)]
    return rows if given["has_biases"] else [(*row[:2], None, None, *row[2:]) for row in rows]


def _is_zeros(state: fx.Node) -> bool:
    """Whether a state is zeros that nothing else sees: then it needs neither a layout nor a gradient."""
    return state.target in _ZEROS and all(user.target in _LAYERS for user in state.users)


def _lower_cell(node: fx.Node, new: _Nodes) -> fx.Node | tuple[fx.Node, ...]:
    """The state or states after one step, as torch computes them."""
    kind = _CELLS[node.target]
    given: dict[str, Any] = {**dict(zip(_CELL_ARGUMENTS, node.args, strict=False)), **node.kwargs}
    hidden, *cell = new.unpack(given["hx"], ["h0", "c0"]) if kind == "lstm" else [given["hx"]]
    of_input = new.add("of_input", F.linear, given["input"], given["w_ih"], given.get("b_ih"))
    of_hidden = new.add("of_hidden", F.linear, hidden, given["w_hh"], given.get("b_hh"))
    if kind == "gru":
        return _gru_cell(new, of_input, of_hidden, hidden)
    gates = new.add("gates", torch.add, of_input, of_hidden)
    return _lstm_cell(new, gates, cell[0]) if kind == "lstm" else new.add("h", getattr(torch, kind), gates)


def _lstm_cell(new: _Nodes, gates: fx.Node, cell: fx.Node) -> tuple[fx.Node, fx.Node]:
    i, f, g, o = new.unpack(new.add("chunks", torch.chunk, gates, 4, 1), ["i", "f", "g", "o"])
    kept = new.add("kept", torch.mul, new.add("forget", torch.sigmoid, f), cell)
    added = new.add("added", torch.mul, new.add("update", torch.sigmoid, i), new.add("candidate", torch.tanh, g))
    after = new.add("c", torch.add, kept, added)
    opened = new.add("opened", torch.sigmoid, o)
    return new.add("h", torch.mul, opened, new.add("squashed", torch.tanh, after)), after


def _gru_cell(new: _Nodes, of_input: fx.Node, of_hidden: fx.Node, hidden: fx.Node) -> fx.Node:
    x_r, x_z, x_n = new.unpack(new.add("input_chunks", torch.chunk, of_input, 3, 1), ["x_r", "x_z", "x_n"])
    h_r, h_z, h_n = new.unpack(new.add("hidden_chunks", torch.chunk, of_hidden, 3, 1), ["h_r", "h_z", "h_n"])
    reset = new.add("reset", torch.sigmoid, new.add("r", torch.add, x_r, h_r))
    update = new.add("update", torch.sigmoid, new.add("z", torch.add, x_z, h_z))
    candidate = new.add("candidate", torch.tanh, new.add("n", torch.add, x_n, new.add("seen", torch.mul, reset, h_n)))
    kept = new.add("kept", torch.mul, new.add("change", torch.sub, hidden, candidate), update)
    return new.add("h", torch.add, kept, candidate)


def _replace(node: fx.Node, results: Any) -> None:
    """Puts results in the place of a node: items of a tuple where they are taken, the tuple itself elsewhere."""
    for user in list(node.users):
        if user.target is operator.getitem and isinstance(results, tuple):
            index: Any = user.args[1]
            _replace(user, results[index])
            user.graph.erase_node(user)
        else:
            user.args, user.kwargs = fx.map_arg((user.args, dict(user.kwargs)), lambda n: results if n is node else n)
