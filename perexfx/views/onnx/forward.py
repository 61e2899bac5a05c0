"""The forward of a transformed module as a model: clip node, norm nodes, and a function with a body for every site."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram

from perexfx.capture import quiet
from perexfx.ir.errors import ArgumentError, ExportError
from perexfx.ir.inputs import named_leaves
from perexfx.ir.node import info_of, place_of
from perexfx.ir.refusal import Place
from perexfx.planning import Plan
from perexfx.runtime import Transformed, clip, runtime_of
from perexfx.views.onnx.metadata import of_clip, of_norm, of_site
from perexfx.views.onnx.outline import DOMAIN, Functions, cut_out, share_nothing
from perexfx.views.onnx.plain import Plain, example_sizes, node_name, own_name, readable
from perexfx.views.onnx.repairs import repaired
from perexfx.views.onnx.translate import (
    PlaceOf,
    clear,
    fold,
    free_name,
    name_batch,
    program_of,
    rename,
    scopes_of,
    to_onnx,
    values_of,
)

if TYPE_CHECKING:
    import onnx_ir as ir

_logger = logging.getLogger("perexfx")


def forward_model(gm: Transformed, arguments: Mapping[str, Any], carriers: tuple[bool, ...], plan: Plan) -> ir.Model:
    """The forward as a model; with the batch size as an axis of any size where the export can say it.

    Args:
        gm: The module.
        arguments: Of its forward, by name.
        carriers: Which of the tensors among them carry examples.
        plan: For these inputs.

    Raises:
        ExportError: It cannot be exported.
    """
    plain = Plain(gm, arguments)
    places = {node.name: place_of(node) for node in gm.graph.nodes}
    model, reason = None, _holds_not_for(gm, arguments, carriers)
    if not reason:
        try:
            model = _exported(plain, gm, carriers, plan.batch_size, places, is_dynamic=True)
        except ExportError as error:
            reason = str(error)
    if model is None:
        model = _exported(plain, gm, carriers, plan.batch_size, places, is_dynamic=False)
        _logger.warning("The ONNX file holds for batches of %d examples alone: %s", plan.batch_size, reason)
    with quiet():
        _add_perexfx(model, gm, carriers, plan)
        fold(model)
    return model


def _holds_not_for(gm: Transformed, arguments: Mapping[str, Any], carriers: tuple[bool, ...]) -> str:
    """Why the captured graph does not hold for batches of some sizes; "" where it holds for all that are tried."""
    batch_dim, leaves = gm.perexfx.settings.batch_dim, named_leaves(arguments)
    carrying = iter(carriers)
    carries = {name for name, leaf in leaves.items() if isinstance(leaf, Tensor) and next(carrying)}

    def of(n: int, value: Tensor) -> Tensor:
        size = (*value.shape[:batch_dim], n, *value.shape[batch_dim + 1 :])
        return torch.empty(size, dtype=value.dtype, device="meta")

    for n in _SIZES_TRIED:
        try:
            runtime_of(gm).captured.conditions.check({k: of(n, v) if k in carries else v for k, v in leaves.items()})
        except ArgumentError as error:
            return str(error)
    return ""


_SIZES_TRIED = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 17, 32, 33, 64, 100, 128, 1000, 4096)
"""Batch sizes that a file of any batch size should hold for."""


def _exported(
    plain: Plain,
    gm: Transformed,
    carriers: tuple[bool, ...],
    n: int,
    places: Mapping[str, Place],
    *,
    is_dynamic: bool,
) -> ir.Model:
    """The plain forward as a model, with the names that users know."""
    batch_dim = gm.perexfx.settings.batch_dim
    n = max(n, 2) if is_dynamic else n
    tensors = example_sizes(plain, batch_dim, carriers, n)
    sizes = [{batch_dim: Dim("batch")} if carries and is_dynamic else {} for carries in carriers]
    with quiet(), torch.enable_grad():
        program = repaired(program_of(plain, tensors, "the forward", "the model", (tuple(sizes),)))
        model = to_onnx(program, _places_in(program, places))
    _name_initializers(model, program, gm)
    spec = program.call_spec.out_spec
    assert spec is not None
    outputs = spec.context if spec.num_leaves else []
    rename(model, [readable(name) for name in plain.names], outputs)
    if is_dynamic:
        at = carriers.index(True)
        symbol = model.graph.inputs[at].shape
        assert symbol is not None
        name_batch(model, str(symbol[batch_dim]))
    return model


def _places_in(program: ExportedProgram, places: Mapping[str, Place]) -> PlaceOf:
    """Where the nodes of an exported `Plain` come from."""

    def place(node: fx.Node) -> Place:
        stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
        names = [name for path in stack if (name := node_name(path)) is not None]
        return places.get(names[-1] if names else "", Place(node.name))

    return place


def _name_initializers(model: ir.Model, program: ExportedProgram, gm: Transformed) -> None:
    """Parameters and buffers have the names that they have in the module, tied ones the first of theirs."""
    graph = model.graph
    first = {id(value): name for name, value in (*gm.named_buffers(), *gm.named_parameters())}
    for name, value in list(graph.initializers.items()):
        tensor = program.state_dict.get(name, program.constants.get(name))
        wanted = first.get(id(tensor), own_name(name))
        if wanted != name:
            del graph.initializers[name]
            value.name = wanted
            graph.initializers[wanted] = value


def _add_perexfx(model: ir.Model, gm: Transformed, carriers: tuple[bool, ...], plan: Plan) -> None:
    """Sites become functions; the clip node and the norm nodes, which compute nothing, are put in front of them."""
    sites, graph = gm.perexfx.sites, model.graph
    functions = Functions(model)
    taken = {value.name or "" for value in values_of(graph)}
    token, words = _insert_clip(model, functions, gm, model.graph.inputs[carriers.index(True)], taken)
    by_node = {site.node: site for site in sites}

    def key_of(node: ir.Node) -> str | None:
        names = [node_name(path) for path in scopes_of(node)]
        return next((name for name in names if name in by_node), None)

    parts = share_nothing(graph, key_of)
    nodes: dict[str, list[ir.Node]] = {}
    for node in graph:
        if (part := parts.get(node)) is not None:
            nodes.setdefault(part, []).append(node)
    clear(model)
    tokens: dict[str, ir.Value] = {}
    for site in sites:
        members = nodes.get(site.node, [])
        if not members:  # what returns its argument as it is has no node
            continue
        if site.group not in tokens:
            first = next((node for node in members if node.op_type != "Constant"), members[0])
            tokens[site.group] = _insert_norm(model, functions, first, token, site.group, taken)
        given = {**words, tokens[site.group]: "token"}
        call = cut_out(functions, members, site.name, site.kind, given, tokens[site.group])
        call.metadata_props.update(of_site(site, plan))
    clip_node = token.producer()
    assert clip_node is not None
    clip_node.metadata_props.update(of_clip(gm.perexfx.settings))


def _insert_clip(
    model: ir.Model, functions: Functions, gm: Transformed, batch: Any, taken: set[str]
) -> tuple[ir.Value, dict[ir.Value, str]]:
    """The token, and what functions call the parameters that come out of the clip node.

    Args:
        model: Is changed.
        functions: Of the model.
        gm: The module.
        batch: The input that the batch size is read from.
        taken: Names of values.
    """
    import onnx_ir as ir  # noqa: PLC0415 (an extra)

    graph: Any = model.graph
    (node,) = [node for node in gm.graph.nodes if node.target is clip and info_of(node).role == "clip"]
    names: Any = node.args[1]
    found = {name: _initializer(graph, name, gm) for name in names}
    batch_dim = gm.perexfx.settings.batch_dim
    given = [batch, *found.values()]
    is_double = any(gm.get_parameter(name).dtype is torch.float64 for name in names)
    dtype = ir.DataType.DOUBLE if is_double else ir.DataType.FLOAT
    taken |= set(graph.initializers)
    shape = ir.Shape([batch.shape[batch_dim]])
    token = ir.Value(name=free_name("token", taken), type=ir.TensorType(dtype), shape=shape)
    results = [
        ir.Value(name=free_name(f"clipped.{name}", taken), type=v.type, shape=v.shape) for name, v in found.items()
    ]
    for value, result in zip(found.values(), results, strict=True):
        for user, at in list(value.uses()):
            user.replace_input_with(at, result)
    call = ir.Node(DOMAIN, "clip", given, outputs=[token, *results], name="clip")
    first = next(iter(graph), None)
    graph.append(call) if first is None else graph.insert_before(first, call)
    inputs = [ir.Value(name="input"), *(ir.Value(name=f"parameter_{at}") for at in range(len(names)))]
    functions.add("clip", inputs, *_clip_body(inputs, batch_dim, dtype))
    return token, {value: name.rpartition(".")[2] for name, value in zip(found, results, strict=True)}


def _initializer(graph: Any, name: str, gm: Transformed) -> ir.Value:
    """A parameter's; one that nothing reads is not in the graph yet."""
    import onnx_ir as ir  # noqa: PLC0415 (an extra)
    from onnx_ir import tensor_adapters  # noqa: PLC0415 (an extra)

    if name not in graph.initializers:
        held = tensor_adapters.TorchTensor(gm.get_parameter(name).detach(), name=name)
        graph.register_initializer(
            ir.Value(name=name, type=ir.TensorType(held.dtype), shape=held.shape, const_value=held)
        )
    return graph.initializers[name]


def _clip_body(inputs: list[ir.Value], batch_dim: int, dtype: ir.DataType) -> tuple[list[ir.Value], list[ir.Node]]:
    import onnx_ir as ir  # noqa: PLC0415 (an extra)

    size = ir.node("Shape", [inputs[0]], {"start": batch_dim, "end": batch_dim + 1})
    zeros = ir.node("ConstantOfShape", [size.outputs[0]], {"value": ir.tensor([0.0], dtype=dtype)})
    same = [ir.node("Identity", [value]) for value in inputs[1:]]
    return [node.outputs[0] for node in (zeros, *same)], [size, zeros, *same]


def _insert_norm(
    model: ir.Model, functions: Functions, before: ir.Node, token: ir.Value, group: str, taken: set[str]
) -> ir.Value:
    """The token of one group of sites."""
    import onnx_ir as ir  # noqa: PLC0415 (an extra)

    result = ir.Value(name=free_name(f"token.{group}", taken), type=token.type, shape=token.shape)
    given = ir.Value(name="token")
    same = ir.node("Identity", [given])
    name = functions.add("norm", [given], [same.outputs[0]], [same])
    call = ir.Node(DOMAIN, name, [token], outputs=[result], name=f"norm.{group}", metadata_props=of_norm(group))
    model.graph.insert_before(before, call)
    return result


__all__ = ["forward_model"]
