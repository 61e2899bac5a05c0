"""Capture: a module's forward as an fx.Graph in functional form.

Promises: every use of a parameter is a `get_attr` node feeding a function or tensor method (modules with parameters are
traced through, so ties, padding modes and keyword calls need no special case). Parameter-free torch modules and
`self.training` stay live, so `train()` and `eval()` keep working. What tracing cannot record faithfully is an error.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from perexfx.capture.assemble import Exported
from perexfx.capture.attributes import Attributes
from perexfx.capture.captured import Captured
from perexfx.capture.custom_functions import custom_functions, no_tensor_hooks
from perexfx.capture.export import export
from perexfx.capture.functional import IN_PLACE_FUNCTIONS, out_of_place
from perexfx.capture.graph_module import CapturedModule
from perexfx.capture.lower_recurrent import lower_recurrent
from perexfx.capture.modes import different_work, fix_norms, fixed_by_statistics, make_live, other_mode
from perexfx.capture.places import line_of, reason_of
from perexfx.capture.traceable.recurrent import PACKED, packs_sequences
from perexfx.capture.tracer import TRACING, NoRandomConstants, Tracer, loose_sizes, record_custom, unchanged
from perexfx.capture.vocabulary import to_public_names
from perexfx.ir.errors import CaptureError
from perexfx.ir.inputs import named_leaves
from perexfx.ir.node import annotate, info_of


def capture(
    model: nn.Module, inputs: Mapping[str, Any] | None = None, batch_dim: int = 0, examples: int | None = None
) -> Captured:
    """The forward of `model` as a graph: traced symbolically, or else, where inputs are given, by `torch.export`.

    That of a `CapturedModule` is the graph that it has.

    Args:
        model: Any module.
        inputs: Arguments as callers will pass them, by name; None: a tensor for each argument without a default.
        batch_dim: The example axis of the inputs.
        examples: How many examples the inputs hold; None: as many as the first tensor.

    Raises:
        CaptureError: The forward cannot be captured, or not faithfully.
    """
    _refuse_hooks(model)
    if isinstance(model, CapturedModule):
        captured = model.captured
        return replace(captured, fixed_modes={**captured.fixed_modes, **fix_norms(captured.graph, model)})
    try:
        return _traced(model, inputs)
    except CaptureError as error:
        if inputs is None:
            raise CaptureError(
                f"{error} Or pass `example_inputs` to `transform`: with them `torch.export` captures what cannot be "
                "traced."
            ) from error.__cause__
        try:
            return _exported(model, inputs, batch_dim, examples)
        except CaptureError as other:
            if str(other) == str(error):
                raise
            raise CaptureError(f"{error}\nNor could it be exported: {other}") from other


def _traced(model: nn.Module, inputs: Mapping[str, Any] | None) -> Captured:
    baked = _baked_arguments(model, inputs)
    graph, constants = _trace(model, baked)
    fixed_modes = fixed_by_statistics(model)
    with other_mode(model):
        try:
            other, _ = _trace(model, baked)
        except CaptureError:
            other = None
    if other is None or make_live(graph, other, model):
        fixed_modes = _all_modes(model)
    return Captured(graph, fixed_modes, constants, {**baked, **_left_out(graph)})


def _left_out(graph: fx.Graph) -> dict[str, Any]:
    """The values of `*args` and `**kwargs` that a traced graph holds for: none were given."""
    targets = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
    none: dict[int, Any] = {1: (), 2: {}}
    return {target.lstrip("*"): none[target.count("*")] for target in targets if target.startswith("*")}


def _exported(model: nn.Module, inputs: Mapping[str, Any], batch_dim: int, examples: int | None) -> Captured:
    """By `torch.export`; once more for one example in the other mode, to see that the graph holds for both."""
    exported = export(model, inputs, batch_dim, examples)
    graph, numbers, conditions = exported.graph, exported.numbers, exported.conditions
    fixed_modes = fixed_by_statistics(model)
    with other_mode(model):
        other, problem = _try_export(model, inputs, batch_dim, examples, 1)
    if other is None or make_live(graph, other.graph, model, numbers, other.numbers):
        single, problem = _try_export(model, inputs, batch_dim, examples, 1)
        if single is not None:
            problem = different_work(graph, single.graph, numbers, single.numbers)
        conditions = replace(conditions, single=problem)
        with other_mode(model):
            other, problem = _try_export(model, inputs, batch_dim, examples, None)
        if other is None or make_live(graph, other.graph, model, numbers, other.numbers):
            fixed_modes = _all_modes(model)
    baked = {name: value for name, value in named_leaves(inputs).items() if not isinstance(value, torch.Tensor)}
    left_out = inspect.signature(model.forward).parameters.items()
    baked |= {n: p.default for n, p in left_out if n not in inputs and p.default is not inspect.Parameter.empty}
    _stop_gradients(graph)
    out_of_place(graph, model)
    lower_recurrent(graph)
    return Captured(graph, fixed_modes, exported.constants, baked, conditions)


def _try_export(
    model: nn.Module, inputs: Mapping[str, Any], batch_dim: int, examples: int | None, n: int | None
) -> tuple[Exported | None, str]:
    """An export, or why there is none."""
    try:
        return export(model, inputs, batch_dim, examples, n), ""
    except CaptureError as error:
        return None, str(error)


def _all_modes(model: nn.Module) -> dict[str, bool]:
    return {path: module.training for path, module in model.named_modules()}


def stop_gradient(value: Any) -> Any:
    """`value` with every tensor in it detached: what the end of a `torch.no_grad()` block does."""
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, value)


def _trace(model: nn.Module, baked: Mapping[str, Any]) -> tuple[fx.Graph, dict[str, torch.Tensor]]:
    known = set(model.__dict__)
    hidden = {name: _hide(value) for name, value in baked.items()}
    tracer = Tracer(model)
    try:
        with (
            TRACING,
            unchanged(model),
            torch.enable_grad(),
            loose_sizes(),
            NoRandomConstants(),
            custom_functions(record_custom),
            no_tensor_hooks(),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", message="Was not able to add assertion")  # `check_call` does instead
            attributes = Attributes(model)
            graph = tracer.trace(model, concrete_args=hidden)
            made = {name: model.__dict__[name] for name in set(model.__dict__) - known}
            constants = {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}
            _refuse_lost_buffers(model)
            attributes.refuse_numbers()
            attributes.refuse_kept(lambda: different_work(graph, Tracer(model).trace(model, concrete_args=hidden)))
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(_explain(model, error, tracer.inside)) from error
    _restore_names(graph, baked)
    to_public_names(graph)
    _stop_gradients(graph)
    out_of_place(graph, model)
    lower_recurrent(graph)
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


def _refuse_hooks(model: nn.Module) -> None:
    """Forward hooks of submodules are traced; those of the model itself run outside of its forward."""
    if model._forward_hooks or model._forward_pre_hooks:
        raise CaptureError(
            f"`{type(model).__name__}` has forward hooks of its own, which are not part of its forward: what they do "
            "would not be checked. Remove them, or make the model a submodule of another and transform that."
        )
    if "forward" in vars(model) and not type(model).__module__.startswith("torch._dynamo"):
        raise CaptureError(
            f"This `{type(model).__name__}` has a `forward` of its own beside that of its class, which would not be "
            "captured: it was assigned, by hand or by a library that wraps it. Transform the model before it is "
            "wrapped, or make it a submodule of another and transform that."
        )
    for path, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise CaptureError(
                f"Module `{path}` ({type(module).__name__}) has backward hooks, which a captured graph does not "
                "record: gradients would not pass through them. Remove them (`handle.remove()`), or write what they "
                "do as a `torch.autograd.Function` in the forward."
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
    for name, value in (inputs or {}).items():
        if isinstance(value, torch.Tensor) and name in parameters:
            continue
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


def _explain(model: nn.Module, error: Exception, inside: Sequence[tuple[str, str]]) -> str:
    """What failed, in which line of whose code, and what to do."""
    where = f" in module `{inside[-1][0]}` ({inside[-1][1]})" if inside else ""
    what = f"The forward of `{type(model).__name__}` could not be traced{where}{line_of(error)}"
    if "co_varnames" in str(error):
        return f"{what}: torch.fx does not trace a decorated forward that takes any number of arguments."
    if packs_sequences(error.__traceback__):
        return f"{what}: {PACKED}."
    return (
        f"{what}: {reason_of(error)}. "
        "A traced forward cannot branch on the values or ranks of tensors, call `.item()`, or leave torch. "
        "Rewrite that line with tensor operations, or move it outside the model; replace a module of a library that "
        "does so by one that can be traced."
    )
