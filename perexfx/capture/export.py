"""The second capture: `torch.export`, for what symbolic tracing cannot record.

Promises: the graph has the same vocabulary as a traced one, with its places; what it holds for (sizes that the capture
had to fix, relations between sizes) is stated as `Conditions`, which every call is checked against; what `torch.export`
would freeze without a word is an error.
"""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import Function
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import proxy
from torch.utils import _pytree as pytree

from perexfx.capture.assemble import Assembly, Exported
from perexfx.capture.attributes import Attributes, Slot, empty, refuse_kept
from perexfx.capture.conditions import Bounds, Conditions
from perexfx.capture.custom_functions import custom_functions, no_tensor_hooks
from perexfx.capture.outputs import OutputTemplate
from perexfx.capture.places import line_of, reason_of, user_frame, user_line
from perexfx.capture.quiet import quiet
from perexfx.capture.tracer import TRACING, same_einsums, states_outside_torch, unchanged
from perexfx.ir.errors import CaptureError
from perexfx.ir.inputs import Inputs, named_leaves


def export(
    model: nn.Module, arguments: Mapping[str, Any], batch_dim: int, examples: int | None = None, n: int | None = None
) -> Exported:
    """The forward of a model as `torch.export` records it, in the modes that its modules are in.

    Args:
        model: Is left as it is.
        arguments: Of the forward, by name.
        batch_dim: The example axis of the inputs.
        examples: How many examples the arguments hold; None: as many as the first tensor.
        n: The batch size to export for; None: any.

    Raises:
        CaptureError: It cannot be exported, or not faithfully.
    """
    leaves = {name: leaf for name, leaf in named_leaves(arguments).items() if isinstance(leaf, Tensor)}
    kind, _ = Inputs.of(leaves, batch_dim, examples=examples)
    size = n or _distinct_size(kind)
    sized = {name: _of_size(leaf, batch_dim, size) if name in kind.carrying else leaf for name, leaf in leaves.items()}
    axes = [None if n else _free_axes(leaf, batch_dim, name in kind.carrying) for name, leaf in sized.items()]
    flat = _Flat(model, arguments, tuple(leaves))
    program = _run(flat, tuple(sized.values()), tuple(axes))
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    specs = zip(placeholders, program.graph_signature.input_specs, strict=True)
    inputs = dict(zip(leaves, [node for node, spec in specs if spec.kind is InputKind.USER_INPUT], strict=True))
    conditions = Conditions() if n else _conditions(program, inputs, kind, batch_dim)
    return Assembly(model, program, arguments, inputs, flat.output).finish(conditions)


class _Flat(nn.Module):
    """A model as a function of the tensors among its arguments; all else is constant."""

    def __init__(self, model: nn.Module, arguments: Mapping[str, Any], names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.arguments, self.names = model, arguments, tuple(names)
        self.output = OutputTemplate()
        self.emptied: frozenset[Slot] = frozenset()

    def forward(self, *leaves: Tensor) -> tuple[Any, ...]:
        """The tensors and sizes of the model's output."""
        given = _replaced(self.arguments, dict(zip(self.names, leaves, strict=True)))
        bound = inspect.signature(self.model.forward).bind_partial()
        bound.arguments.update({name: given.pop(name) for name in bound.signature.parameters if name in given})
        attributes = Attributes(self.model)
        empty(self.model, self.emptied)
        result = self.model(*bound.args, **bound.kwargs, **given)
        attributes.refuse_numbers()
        assigned = attributes.tensors()
        if not assigned <= self.emptied:
            raise _AssignsTensors(assigned)
        return self.output.flatten(result)


class _AssignsTensors(Exception):  # noqa: N818
    """The forward assigns tensors to plain attributes: it is to be captured again with none in them."""


def _replaced(arguments: Mapping[str, Any], leaves: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments with other tensors."""

    def place(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return leaves[name]
        flat, spec = pytree.tree_flatten_with_path(value)
        found = [leaves.get(f"{name}{pytree.keystr(path)}", leaf) for path, leaf in flat]
        return pytree.tree_unflatten(found, spec)

    return {name: place(name, value) for name, value in arguments.items()}


def _distinct_size(kind: Inputs) -> int:
    """A batch size that no other size can be taken for."""
    taken = {size for shape in kind.shapes for size in shape}
    return next(size for size in range(3, 4 + len(taken)) if size not in taken)


def _of_size(value: Tensor, batch_dim: int, n: int) -> Tensor:
    """A tensor like `value` for n examples; only its shape is read."""
    return value.new_empty((*value.shape[:batch_dim], n, *value.shape[batch_dim + 1 :]))


def _free_axes(value: Tensor, batch_dim: int, carries: bool) -> dict[int, Any] | None:
    """The axes whose size is to stay free: examples, and those of sequences. Images keep their size."""
    is_sequence = not value.is_floating_point() or value.dim() <= 3
    axes = [axis for axis in range(value.dim()) if is_sequence or (carries and axis == batch_dim)]
    return dict.fromkeys(axes, Dim.AUTO) or None


def _run(model: _Flat, examples: tuple[Tensor, ...], axes: tuple[dict[int, Any] | None, ...]) -> ExportedProgram:
    outside, functions = states_outside_torch(), custom_functions(_refuse_custom)
    try:
        with (
            TRACING,
            unchanged(model),
            same_einsums(),
            quiet(),
            _short_traces(),
            torch.enable_grad(),
            no_tensor_hooks(),
            functions,
        ):
            program = torch.export.export(model, examples, dynamic_shapes=(axes,), strict=False)
    except CaptureError:
        raise
    except Exception as error:
        if isinstance(error, _AssignsTensors):
            model.emptied |= error.args[0]
            return _run(model, examples, axes)
        if model.emptied:
            refuse_kept(model.emptied)
        raise CaptureError(f"`torch.export` fails{line_of(error)}: {reason_of(error)}.") from error
    if states_outside_torch() != outside:
        raise CaptureError(
            "The forward draws random numbers from Python's `random` or from NumPy: a captured graph would use the "
            "same ones for ever. Draw them with `torch.rand_like(x)` or the like."
        )
    return program


def _refuse_custom(function: type[Function], _args: Any, _kwargs: Any) -> Any:
    raise CaptureError(
        f"The forward applies the torch.autograd.Function `{function.__name__}` at {user_line()}, whose own backward "
        "an exported graph does not record. Write it with torch's operations, or make the model one that can be traced."
    )


class _ShortTrace:
    """In place of torch's stack trace of each node, a fifth of the time of an export: the innermost line of a user."""

    @classmethod
    def extract(cls, **_: Any) -> _ShortTrace:
        return cls()

    def summary(self) -> traceback.StackSummary | None:
        found = user_frame()  # is called "forward" because torch drops all frames before one of that name
        return traceback.StackSummary.from_list([(*found, "forward", "-")]) if found else None


@contextmanager
def _short_traces() -> Iterator[None]:
    original = proxy.CapturedTraceback  # pyright: ignore[reportPrivateImportUsage]
    try:
        proxy.CapturedTraceback = _ShortTrace  # pyright: ignore[reportPrivateImportUsage]
        yield
    finally:
        proxy.CapturedTraceback = original  # pyright: ignore[reportPrivateImportUsage]


def _conditions(program: ExportedProgram, inputs: Mapping[str, fx.Node], kind: Inputs, batch_dim: int) -> Conditions:
    """What the export took for granted.

    Raises:
        CaptureError: It took the number of examples for granted.
    """
    sizes = {}
    for name in kind.names:
        shape = inputs[name].meta["val"].shape
        if name in kind.carrying and isinstance(shape[batch_dim], int):
            raise CaptureError(
                f"The forward fixes the number of examples: it holds for a size of {shape[batch_dim]} alone on axis "
                f"{batch_dim} of `{name}`. Read sizes off the input (`x.shape[{batch_dim}]`), or use -1."
            )
        sizes[name] = tuple(_bounds(program, size) for size in shape)
    conditions = Conditions(sizes, tuple(program._guards_code), batch_dim, kind.carrying)
    _refuse_fixed_size(conditions, kind)
    return conditions


def _refuse_fixed_size(conditions: Conditions, kind: Inputs) -> None:
    """Raises: CaptureError where the guards leave one number of examples alone."""
    held, broken = 0, ""
    for n in range(2, 18):
        shapes = zip(kind.names, kind.shapes, kind.carriers, strict=True)
        sizes = {
            name: (*shape[: conditions.batch_dim], n, *shape[conditions.batch_dim + 1 :]) if carries else shape
            for name, shape, carries in shapes
        }
        leaves = {name: torch.empty(size, device="meta") for name, size in sizes.items()}
        problem = conditions.broken_guard(leaves)
        held, broken = held + (not problem), broken or problem
    if held < 2:
        raise CaptureError(
            f"The forward fixes the number of examples: it takes another path unless `{broken}`. Read sizes off the "
            "input, and do not branch on their values."
        )


def _bounds(program: ExportedProgram, size: Any) -> Bounds:
    if isinstance(size, int):
        return size, size
    found = program.range_constraints.get(size.node.expr)
    if found is None:
        return 2, math.inf
    return int(found.lower), int(found.upper) if found.upper.is_Integer else math.inf
