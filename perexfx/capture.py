"""Capture: a module's forward as an fx.Graph in functional form.

Promises: every use of a parameter is a `get_attr` node feeding a function or tensor method (modules with parameters are
traced through, so ties, padding modes and keyword calls need no special case). Parameter-free torch modules and
`self.training` stay live, so `train()` and `eval()` keep working. What tracing cannot record faithfully is an error.
"""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils import _pytree as pytree

from perexfx.functional import out_of_place
from perexfx.ir.errors import CaptureError
from perexfx.ir.node import NodeInfo, annotate, info_of

_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


@dataclass(frozen=True)
class Captured:
    """A captured forward.

    Attributes:
        graph: Functional form; parameters and buffers are `get_attr` nodes.
        fixed_modes: Modules (path -> training flag) whose mode was baked into the graph: it is right in this mode only.
        constants: Tensors that the forward makes out of numbers, by the name that `get_attr` nodes give them.
    """

    graph: fx.Graph
    fixed_modes: Mapping[str, bool]
    constants: Mapping[str, torch.Tensor]


def capture(model: nn.Module, given: frozenset[str] | None = None) -> Captured:
    """The forward of `model` as a graph.

    Args:
        model: Any module that torch.fx can trace.
        given: Names of the forward's arguments that callers will pass; None: those without a default.

    Raises:
        CaptureError: The forward cannot be traced.
    """
    graph, constants = _trace(model, given)
    fixed_modes = dict(_baked_statistics(model))
    fixed_modes.update(_make_modes_live(model, graph, given))
    return Captured(graph, fixed_modes, constants)


def stop_gradient(value: Any) -> Any:
    """`value` with every tensor in it detached: what the end of a `torch.no_grad()` block does."""
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, value)


class _Proxy(fx.Proxy):
    """Records augmented assignments as what they are: in place."""


def _record_in_place(name: str) -> Any:
    function = getattr(operator, name)

    def method(self: _Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in ("iadd", "isub", "imul", "itruediv"):
    setattr(_Proxy, f"__{_name}__", _record_in_place(_name))


class _Tracer(fx.Tracer):
    """Traces through every module that has parameters or buffers, and notes where each node comes from."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.autocast_outside = torch.is_autocast_enabled("cpu")

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Parameter-free torch modules stay modules."""
        if not super().is_leaf_module(m, module_qualified_name):
            return False
        return next(m.parameters(), None) is None and next(m.buffers(), None) is None

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A proxy that records in-place arithmetic faithfully."""
        return _Proxy(node, self)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Normalisation layers check ranks by control flow; their functional form does the same work."""
        if isinstance(m, _InstanceNorm | _BatchNorm):
            forward = _functional_norm(m)
        return super().call_module(m, forward, args, kwargs)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Adds the place, and what fx does not record: `torch.no_grad()` and autocast."""
        node = super().create_node(*args, **kwargs)
        source = _user_line()
        stack = node.meta.get("nn_module_stack") or {"": ("", None)}
        module = list(stack.values())[-1][0]
        if torch.is_autocast_enabled("cpu") != self.autocast_outside:
            raise CaptureError(
                f"The forward switches autocast at {source}, which a traced graph does not record. "
                "Switch it around the call of the transformed model instead."
            )
        return annotate(node, NodeInfo(module, source, stops_gradient=not torch.is_grad_enabled()))


def _functional_norm(module: _InstanceNorm | _BatchNorm) -> Any:
    def instance_norm(x: Any) -> Any:
        return F.instance_norm(
            x,
            module.running_mean,
            module.running_var,
            module.weight,
            module.bias,
            module.training or not module.track_running_stats,
            module.momentum if module.momentum is not None else 0.0,
            module.eps,
        )

    def batch_norm(x: Any) -> Any:
        uses_batch = module.training or not module.track_running_stats
        return F.batch_norm(
            x,
            module.running_mean,
            module.running_var,
            module.weight,
            module.bias,
            uses_batch,
            module.momentum if module.momentum is not None else 0.0,
            module.eps,
        )

    return instance_norm if isinstance(module, _InstanceNorm) else batch_norm


def _user_line() -> str:
    """`file.py:line` of the innermost frame that is neither torch's nor ours."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_LIBRARIES) and not name.startswith("<"):
            return f"{Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _trace(model: nn.Module, given: frozenset[str] | None) -> tuple[fx.Graph, dict[str, torch.Tensor]]:
    defaults = _defaults(model, given)
    before = set(model.__dict__)
    try:
        with torch.enable_grad():
            graph = _Tracer().trace(model, concrete_args=defaults)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(_explain(model, error)) from error
    finally:  # fx leaves tensor constants on the module that it traces
        constants = {name: model.__dict__.pop(name) for name in set(model.__dict__) - before}
    _restore_defaults(graph, defaults)
    _stop_gradients(graph)
    out_of_place(graph, model)
    return graph, constants


def _defaults(model: nn.Module, given: frozenset[str] | None) -> dict[str, Any]:
    """The forward's optional arguments that callers leave out: they are constants of the graph."""
    parameters = inspect.signature(model.forward).parameters
    if given is not None and (unknown := sorted(given - set(parameters))):
        kinds = {parameter.kind for parameter in parameters.values()}
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            raise CaptureError(
                f"`{type(model).__name__}.forward` has no argument {', '.join(f'`{name}`' for name in unknown)}. "
                f"It takes {', '.join(f'`{name}`' for name in parameters)}."
            )
    return {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.default is not inspect.Parameter.empty and (given is None or name not in given)
    }


def _restore_defaults(graph: fx.Graph, constants: Mapping[str, Any]) -> None:
    """Fx renames specialised arguments (`mask` becomes `mask_1`); callers know them by their own names."""
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        name = node.target.rsplit("_", 1)[0]
        if node.target not in constants and name in constants and node.target != name:
            node.target = name
            node.args = (constants[name],)


def _stop_gradients(graph: fx.Graph) -> None:
    """What leaves a `torch.no_grad()` block is detached."""
    for node in list(graph.nodes):
        if not info_of(node).stops_gradient or node.op in ("placeholder", "get_attr", "output"):
            continue
        outside = [user for user in node.users if not info_of(user).stops_gradient]
        if not outside:
            continue
        with graph.inserting_after(node):
            stopped = annotate(graph.call_function(stop_gradient, (node,)), replace(info_of(node)))
        for user in outside:
            user.replace_input_with(node, stopped)


def _baked_statistics(model: nn.Module) -> Iterator[tuple[str, bool]]:
    """Layers whose choice between batch and running statistics is an argument in the graph."""
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm | _InstanceNorm) and module.track_running_stats:
            yield path, module.training


def _make_modes_live(model: nn.Module, graph: fx.Graph, given: frozenset[str] | None) -> dict[str, bool]:
    """Turns arguments that follow `self.training` into reads of it, found by tracing in the other mode too.

    Returns: The modules whose mode stays baked in, because the forward takes another path in the other mode.
    """
    baked = {"": model.training}
    with _other_mode(model):
        try:
            other, _ = _trace(model, given)
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


def _explain(model: nn.Module, error: Exception) -> str:
    """What failed, in which line of whose code, and what to do."""
    line, trace = "", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if not name.startswith(_LIBRARIES) and not name.startswith("<"):
            line = f" at {Path(name).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"The forward of `{type(model).__name__}` could not be traced{line}: {reason} "
        "A traced forward cannot branch on the values or ranks of tensors, call `.item()`, or leave torch. "
        "Rewrite that line with tensor operations, or move it outside the model."
    )
