"""Capture: a module's forward as an fx.Graph in functional form.

Promises: every use of a parameter is a `get_attr` node feeding a function or tensor method (modules with parameters are
traced through, so ties, padding modes and keyword calls need no special case). Parameter-free torch modules and
`self.training` stay live, so `train()` and `eval()` keep working. What tracing cannot record faithfully is an error.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils import _pytree as pytree

from perexfx.functional import IN_PLACE_FUNCTIONS, out_of_place
from perexfx.ir.errors import CaptureError
from perexfx.ir.node import annotate, info_of
from perexfx.tracer import LIBRARIES, TRACING, NoRandomConstants, Tracer, loose_sizes


@dataclass(frozen=True)
class Captured:
    """A captured forward.

    Attributes:
        graph: Functional form; parameters and buffers are `get_attr` nodes.
        fixed_modes: Modules (path -> training flag) whose mode was baked into the graph: it is right in this mode only.
        constants: Tensors that the forward makes out of numbers, by the name that `get_attr` nodes give them.
        baked: Arguments that are no tensors, and the value that the graph is specialised to.
    """

    graph: fx.Graph
    fixed_modes: Mapping[str, bool]
    constants: Mapping[str, torch.Tensor]
    baked: Mapping[str, Any]


def capture(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> Captured:
    """The forward of `model` as a graph.

    Args:
        model: Any module that torch.fx can trace.
        inputs: Arguments as callers will pass them, by name; None: a tensor for each argument without a default.

    Raises:
        CaptureError: The forward cannot be traced, or not faithfully.
    """
    _refuse_own_hooks(model)
    baked = _baked_arguments(model, inputs)
    graph, constants = _trace(model, baked)
    fixed_modes = dict(_baked_statistics(model))
    fixed_modes.update(_make_modes_live(model, graph, baked))
    return Captured(graph, fixed_modes, constants, baked)


def stop_gradient(value: Any) -> Any:
    """`value` with every tensor in it detached: what the end of a `torch.no_grad()` block does."""
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, value)


def _trace(model: nn.Module, baked: Mapping[str, Any]) -> tuple[fx.Graph, dict[str, torch.Tensor]]:
    before = [(module, dict(module.__dict__), dict(module._buffers)) for module in model.modules()]
    hidden = {name: _hide(value) for name, value in baked.items()}
    tracer = Tracer(model)
    try:
        with TRACING, torch.enable_grad(), loose_sizes(), NoRandomConstants(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Was not able to add assertion")  # `PerExample` checks instead
            graph = tracer.trace(model, concrete_args=hidden)
        constants = {name: model.__dict__[name] for name in set(model.__dict__) - set(before[0][1])}
        constants = {name: value for name, value in constants.items() if isinstance(value, torch.Tensor)}
        _refuse_lost_buffers(model)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(_explain(model, error, tracer.inside)) from error
    finally:  # fx leaves its constants on the module, and a forward that assigns attributes leaves proxies
        for module, attributes, buffers in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
    _restore_names(graph, baked)
    _stop_gradients(graph)
    out_of_place(graph, model)
    return graph, constants


class _Tuple(tuple[Any, ...]):
    """A tuple that fx takes for one value."""


class _List(list[Any]):
    """A list that fx takes for one value."""


class _Dict(dict[Any, Any]):
    """A dict that fx takes for one value."""


def _hide(value: Any) -> Any:
    """A baked argument as one value: fx takes containers apart, and changes what the graph returns to match."""
    for kind, opaque in ((tuple, _Tuple), (list, _List), (dict, _Dict)):
        if type(value) is kind:
            return opaque(value)
    return value


def _refuse_own_hooks(model: nn.Module) -> None:
    """Hooks of submodules are traced; those of the model itself run outside of its forward."""
    if model._forward_hooks or model._forward_pre_hooks:
        raise CaptureError(
            f"`{type(model).__name__}` has forward hooks of its own, which are not part of its forward: what they do "
            "would not be checked. Remove them, or make the model a submodule of another and transform that."
        )


def _refuse_lost_buffers(model: nn.Module) -> None:
    """A buffer that the forward assigns anew would stay as it is; one that it changes in place is recorded."""
    for path, module in model.named_modules():
        for name, value in module._buffers.items():
            if not isinstance(value, fx.Proxy):
                continue
            written = value.node.args[0] if value.node.args else None
            full = f"{path}.{name}".removeprefix(".")
            in_place = value.node.target in IN_PLACE_FUNCTIONS or str(value.node.target).endswith("_")
            if not (in_place and isinstance(written, fx.Node) and written.target == full):
                raise CaptureError(
                    f"The forward assigns the buffer `{full}` at {info_of(value.node).source}, which a traced graph "
                    "does not record. Change it in place (`copy_`, `add_`), or update it outside of the forward."
                )


def _baked_arguments(model: nn.Module, inputs: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments that become constants: those left out, and those that are no tensors."""
    parameters = inspect.signature(model.forward).parameters
    defaults = {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.default is not inspect.Parameter.empty and (inputs is None or name not in inputs)
    }
    given = {name: value for name, value in (inputs or {}).items() if not isinstance(value, torch.Tensor)}
    for name, value in given.items():
        kind = parameters[name].kind if name in parameters else None
        leaves = pytree.tree_leaves(value)
        if kind not in _NAMED or any(isinstance(leaf, torch.Tensor) for leaf in leaves):
            raise CaptureError(
                f"Argument `{name}` of `{type(model).__name__}.forward` should be a tensor or a plain value. "
                f"Found {type(value).__name__}. Pass tensors as arguments of their own."
            )
    return {**defaults, **given}


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_ONLY)


def _restore_names(graph: fx.Graph, baked: Mapping[str, Any]) -> None:
    """Fx renames specialised arguments (`mask` becomes `mask_1`) and asserts their values without saying what to do."""
    for node in list(graph.nodes):
        if node.op != "placeholder":
            continue
        name = node.target.rsplit("_", 1)[0]
        if node.target not in baked and name in baked:
            node.target = name
            node.args = (baked[name],)
            for user in reversed(_descendants(node)):
                graph.erase_node(user)


def _descendants(node: fx.Node) -> list[fx.Node]:
    """Everything computed from a node, in graph order."""
    found = {node}
    later = []
    for other in node.graph.nodes:
        if found.intersection(other.all_input_nodes):
            found.add(other)
            later.append(other)
    return later


def _stop_gradients(graph: fx.Graph) -> None:
    """What leaves a `torch.no_grad()` block is detached."""
    for node in list(graph.nodes):
        if not info_of(node).stops_gradient or node.op in ("placeholder", "get_attr", "output"):
            continue
        outside = [user for user in node.users if not info_of(user).stops_gradient]
        if not outside:
            continue
        with graph.inserting_after(node):
            stopped = annotate(graph.call_function(stop_gradient, (node,)), info_of(node))
        for user in outside:
            user.replace_input_with(node, stopped)


def _baked_statistics(model: nn.Module) -> Iterator[tuple[str, bool]]:
    """Layers whose choice between batch and running statistics is an argument in the graph."""
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm | _InstanceNorm) and module.track_running_stats:
            yield path, module.training


def _make_modes_live(model: nn.Module, graph: fx.Graph, baked_arguments: Mapping[str, Any]) -> dict[str, bool]:
    """Turns arguments that follow `self.training` into reads of it, found by tracing in the other mode too.

    Returns: The modules whose mode stays baked in, because the forward takes another path in the other mode.
    """
    baked = {path: module.training for path, module in model.named_modules()}
    with _other_mode(model):
        try:
            other, _ = _trace(model, baked_arguments)
        except CaptureError:
            return baked
    ours, theirs = list(graph.nodes), list(other.nodes)
    if [(node.op, node.name, str(node.target)) for node in ours] != [
        (node.op, node.name, str(node.target)) for node in theirs
    ]:
        return baked
    for node, twin in zip(ours, theirs, strict=True):
        path = info_of(node).module
        if node.target in (F.batch_norm, F.instance_norm):
            continue  # `_baked_statistics` names them
        if not _follow_mode(graph, node, twin, model.get_submodule(path).training, path):
            return baked
    return {}


def _follow_mode(graph: fx.Graph, node: fx.Node, twin: fx.Node, training: bool, path: str) -> bool:
    """Replaces arguments equal to the training flag in both modes by the flag; False where others differ."""
    flat, spec = pytree.tree_flatten((node.args, node.kwargs))
    named, named_spec = pytree.tree_flatten(fx.map_arg((node.args, node.kwargs), lambda n: n.name))
    other, other_spec = pytree.tree_flatten(fx.map_arg((twin.args, twin.kwargs), lambda n: n.name))
    if named_spec != other_spec:
        return False
    differing = [at for at, (a, b) in enumerate(zip(named, other, strict=True)) if a != b]
    if not differing:
        return True
    if any(flat[at] is not training or other[at] is not (not training) for at in differing):
        return False
    with graph.inserting_before(node):
        flag = graph.create_node("get_attr", f"{path}.training" if path else "training")
        annotate(flag, info_of(node))
    for at in differing:
        flat[at] = flag
    node.args, node.kwargs = pytree.tree_unflatten(flat, spec)
    return True


@contextmanager
def _other_mode(model: nn.Module) -> Iterator[None]:
    """Every module with its training flag inverted, and put back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, flag in flags:
            module.training = not flag
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def _explain(model: nn.Module, error: Exception, inside: Sequence[tuple[str, str]]) -> str:
    """What failed, in which line of whose code, and what to do."""
    line, trace = "", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if not name.startswith(LIBRARIES) and not name.startswith("<"):
            line = f" at {Path(name).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    where = f" in module `{inside[-1][0]}` ({inside[-1][1]})" if inside else ""
    reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
    return (
        f"The forward of `{type(model).__name__}` could not be traced{where}{line}: {reason}. "
        "A traced forward cannot branch on the values or ranks of tensors, call `.item()`, or leave torch. "
        "Rewrite that line with tensor operations, or move it outside the model; replace a module of a library that "
        "does so by one that can be traced."
    )
