"""One vocabulary for both captures: torch's public functions and tensor methods.

Promises: a node is renamed only to a function that takes the same arguments and computes the same; every function that
a layer rule covers has one name and one signature afterwards, whichever way it was called. What has no public name
keeps its own.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from types import BuiltinFunctionType, MethodDescriptorType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._ops import OpOverload

from perexfx.ir.schemas import arguments_by_name

aten = torch.ops.aten


def to_public_names(graph: fx.Graph) -> None:
    """Renames aten overloads, and torch functions that have a twin in `torch.nn.functional`.

    Args:
        graph: Is changed.
    """
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if isinstance(node.target, OpOverload):
            _publish(node)
        if twin := _TWINS.get(node.target):
            parameters, adapt = twin
            given = {**dict(zip(parameters, node.args, strict=False)), **node.kwargs}
            node.target, node.args, node.kwargs = adapt(given)


def _publish(node: fx.Node) -> None:
    """The public function or method of an overload: torch generates both from the same schema."""
    overload = node.target
    assert isinstance(overload, OpOverload)
    if overload.namespace != "aten":
        return
    if special := _SPECIAL.get(overload):
        special(node)
        return
    name = overload._schema.name.split("::")[1]
    for owner in (torch, F):
        function = getattr(owner, name, None)
        if isinstance(function, BuiltinFunctionType):
            node.target = function
            return
    first = overload._schema.arguments[0].name if overload._schema.arguments else ""
    if first == "self" and isinstance(getattr(torch.Tensor, name, None), MethodDescriptorType):
        node.op, node.target = "call_method", name


def _slice(node: fx.Node) -> None:
    """`x[:, start:end:step]`; one that takes everything is left out."""
    value, dim, start, end, step = _padded(node.args, (None, 0, None, None, 1))
    if isinstance(dim, fx.Node) or dim < 0:
        return
    start = None if start == 0 else start
    end = None if end == sys.maxsize else end
    if start is None and end is None and step == 1:
        node.replace_all_uses_with(value)
        node.graph.erase_node(node)
        return
    node.target = operator.getitem
    node.args = (value, (*[slice(None)] * dim, slice(start, end, None if step == 1 else step)))
    node.kwargs = {}


def _padded(args: Any, defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    """Positional arguments, with defaults for those left out."""
    return (*args, *defaults[len(args) :])


def _index(node: fx.Node) -> None:
    """`x[:, ids]`."""
    value: Any
    indices: Any
    value, indices = node.args
    node.target = operator.getitem
    node.args = (value, tuple(slice(None) if index is None else index for index in indices))


def _index_put(node: fx.Node) -> None:
    """Stays an overload where some axes have no index: torch's method does not take those."""
    indices: Any = node.args[1]
    if None not in indices:
        node.op, node.target = "call_method", node.target._schema.name.split("::")[1]  # pyright: ignore[reportAttributeAccessIssue, reportFunctionMemberAccess]


def _size(node: fx.Node) -> None:
    """`x.size(dim)`."""
    node.op, node.target = "call_method", "size"


def _to(node: fx.Node) -> None:
    """`x.to(...)`; torch's method knows no layout."""
    given = arguments_by_name(node.target, node.args, node.kwargs)
    value = given.pop("self")
    kept = {name: given[name] for name in ("dtype", "device", "other", "non_blocking", "copy") if given.get(name)}
    node.op, node.target, node.args, node.kwargs = "call_method", "to", (value,), kept


def _alias(node: fx.Node) -> None:
    """A view of everything is left out."""
    node.replace_all_uses_with(node.all_input_nodes[0])
    node.graph.erase_node(node)


def _attention(node: fx.Node) -> None:
    """With its dropout said: the export leaves out what has its default, as it has in one mode and not in the other."""
    defaults = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False}
    given = {**defaults, **arguments_by_name(node.target, node.args, node.kwargs)}
    node.target = F.scaled_dot_product_attention
    node.args = tuple(given.pop(name) for name in ("query", "key", "value"))
    node.kwargs = dict(sorted(given.items()))


def _operator(function: Callable[..., Any]) -> Callable[[fx.Node], None]:
    def rename(node: fx.Node) -> None:
        node.target = function

    return rename


_SPECIAL: dict[Any, Callable[[fx.Node], None]] = {
    aten.alias.default: _alias,
    aten.slice.Tensor: _slice,
    aten.index.Tensor: _index,
    aten.index_put.default: _index_put,
    aten.index_put_.default: _index_put,
    aten.scaled_dot_product_attention.default: _attention,
    aten.sym_size.int: _size,
    aten.einsum.default: _operator(torch.einsum),
    aten.to.dtype: _to,
    aten.to.dtype_layout: _to,
    aten.to.device: _to,
    aten.to.other: _to,
    aten.__and__.Tensor: _operator(operator.and_),
    aten.__or__.Tensor: _operator(operator.or_),
    aten.__xor__.Tensor: _operator(operator.xor),
}


def _layer_norm(given: dict[str, Any]) -> Any:
    names = ("weight", "bias", "eps")
    options = {name: given[name] for name in names if name in given}
    return F.layer_norm, (given["input"], given["normalized_shape"]), options


def _rms_norm(given: dict[str, Any]) -> Any:
    options = {name: given[name] for name in ("weight", "eps") if name in given}
    return F.rms_norm, (given["input"], given["normalized_shape"]), options


def _group_norm(given: dict[str, Any]) -> Any:
    options = {name: given[name] for name in ("weight", "bias", "eps") if name in given}
    return F.group_norm, (given["input"], given["num_groups"]), options


def _instance_norm(given: dict[str, Any]) -> Any:
    names = ("running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
    return F.instance_norm, (given["input"], *(given.get(name) for name in names)), {}


def _batch_norm(given: dict[str, Any]) -> Any:
    names = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    return F.batch_norm, (given["input"], *(given.get(name) for name in names)), {}


def _embedding(given: dict[str, Any]) -> Any:
    padding_idx = given.get("padding_idx", -1)
    options: dict[str, Any] = {} if padding_idx == -1 else {"padding_idx": padding_idx}
    for name, public in (("scale_grad_by_freq", "scale_grad_by_freq"), ("sparse", "sparse")):
        if given.get(name):
            options[public] = given[name]
    return F.embedding, (given["indices"], given["weight"]), options


def _dropout(function: Callable[..., Any]) -> Callable[[dict[str, Any]], Any]:
    def adapt(given: dict[str, Any]) -> Any:
        return function, (given["input"], given["p"], given["train"]), {}

    return adapt


_CHANNELS = ("input", "weight", "bias", "running_mean", "running_var")
_STATISTICS = ("momentum", "eps", "cudnn_enabled")
_TWINS: dict[Any, tuple[tuple[str, ...], Callable[[dict[str, Any]], Any]]] = {
    torch.layer_norm: (("input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable"), _layer_norm),
    torch.rms_norm: (("input", "normalized_shape", "weight", "eps"), _rms_norm),
    torch.group_norm: (("input", "num_groups", "weight", "bias", "eps", "cudnn_enabled"), _group_norm),
    torch.instance_norm: ((*_CHANNELS, "use_input_stats", *_STATISTICS), _instance_norm),
    torch.batch_norm: ((*_CHANNELS, "training", *_STATISTICS), _batch_norm),
    torch.embedding: (("weight", "indices", "padding_idx", "scale_grad_by_freq", "sparse"), _embedding),
    torch.dropout: (("input", "p", "train"), _dropout(F.dropout)),
    torch.alpha_dropout: (("input", "p", "train"), _dropout(F.alpha_dropout)),
    torch.feature_alpha_dropout: (("input", "p", "train"), _dropout(F.feature_alpha_dropout)),
}
