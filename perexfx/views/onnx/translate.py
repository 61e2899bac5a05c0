"""An exported program to an ONNX model, by torch's own exporter.

Promises: nothing is printed and no warning of the exporter's own making comes out; a program with operations that have
no translation is refused, and every one of them is named. The model has no trace of this machine: what torch says about
files and objects is taken off, and the inputs' example axis is called `batch`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from perexfx.ir.errors import ArgumentError, ExportError
from perexfx.ir.refusal import Place, Refusal
from perexfx.ir.schemas import all_arguments

if TYPE_CHECKING:
    import onnx_ir as ir

PlaceOf = Callable[[fx.Node], Place]
"""Where a node of an exported program comes from."""

_SCOPES = "pkg.torch.onnx.name_scopes"
_REMEDY = (
    "Replace it in the model by operations that ONNX has, or take the part of the model that uses it out of what is "
    "exported."
)


def require_extra() -> None:
    """Raises: ArgumentError, where a package that the export needs is not installed."""
    for package in ("onnx", "onnx_ir", "onnxscript"):
        try:
            import_module(package)
        except ImportError as error:
            raise ArgumentError(
                f"`export_onnx` needs the package `{error.name or package}`, which is not installed. "
                "Install the extra: pip install 'perexfx[onnx]'."
            ) from error


def program_of(
    module: nn.Module, tensors: Sequence[Tensor], what: str, written_in: str, dynamic_shapes: Any = None
) -> ExportedProgram:
    """A module that takes tensors alone, as `torch.export` has it.

    Args:
        module: A `Plain` forward, or a step.
        tensors: Its inputs.
        what: The name of it in a refusal.
        written_in: What a user can rewrite, for the same.
        dynamic_shapes: As of `torch.export.export`.

    Raises:
        ExportError: It cannot be exported.
    """
    try:
        return torch.export.export(module, tuple(tensors), dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:  # an export may fail in any way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        refusal = Refusal(
            what=f"`torch.export` cannot export {what}: {reason}.",
            why="An ONNX file is made from its export.",
            remedy=f"Rewrite that part of {written_in} with tensor operations.",
        )
        raise ExportError([refusal]) from error


def to_onnx(program: ExportedProgram, place_of: PlaceOf) -> ir.Model:
    """The program as a model, unoptimized: its nodes say by `scopes_of` which modules they come from.

    Args:
        program: From `torch.export`.
        place_of: For refusals.

    Raises:
        ExportError: Operations have no translation, or one failed.
    """
    _refuse(program, place_of)
    try:
        exported = torch.onnx.export(program, (), dynamo=True, optimize=False, verbose=False)
    except Exception as error:  # the exporter's errors have no common base but this
        raise ExportError(_why_not(program, place_of, error)) from error
    assert exported is not None
    return exported.model


def scopes_of(node: ir.Node) -> list[str]:
    """Paths of the modules that a node of a fresh model was recorded in, the outermost first."""
    return ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))


def _refuse(program: ExportedProgram, place_of: PlaceOf) -> None:
    """Raises: ExportError, where the program has what a file would compute otherwise."""
    refusals = [
        Refusal(f"{place_of(node)} {problem}", "What is exported should compute what the module does.", remedy)
        for node in program.graph.nodes
        if node.op == "call_function"
        for problem, remedy in _problems_of(node)
    ]
    if refusals:
        raise ExportError(list(dict.fromkeys(refusals)))


def _problems_of(node: fx.Node) -> Iterator[tuple[str, str]]:
    """What a file would compute otherwise at a call, and what to do about it."""
    if _is_random(node):
        yield (
            f"draws random numbers (`{node.target}`), which a file cannot repeat.",
            "Call `gm.eval()` first, if that is dropout; else pass the random numbers with the inputs or targets.",
        )
    if node.target in (torch.ops.aten.as_strided_.default, torch.ops.aten.as_strided_scatter.default):
        yield (
            "lays memory out anew with `as_strided_` (as pooling to one pixel does with channels last): ONNX knows "
            "values alone.",
            "Give it inputs in the default memory format, or write the mean over the last axes.",
        )
    if node.target is torch.ops.aten.as_strided.default:
        read: Any = node.args[0]
        if not read.meta["val"].is_contiguous():
            yield (
                "reads memory with `as_strided` where it does not lie in order: ONNX knows values alone.",
                "Call `contiguous()` before it, or index instead.",
            )


def _is_random(node: fx.Node) -> bool:
    """Whether a call draws random numbers, by its operation and its arguments."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    given = all_arguments(node.target, node.args, node.kwargs)
    chance = given.get("p", given.get("dropout_p", given.get("dropout")))
    trains = given.get("train", given.get("training", True))
    return bool(trains) and (chance is None or chance > 0)


def _why_not(program: ExportedProgram, place_of: PlaceOf, error: Exception) -> list[Refusal]:
    """Every operation without a translation; or else the one whose translation failed."""
    missing = [
        Refusal(
            what=f"{place_of(node)} calls `{node.target}`, which has no translation to ONNX.",
            why="Every operation of an export must have one.",
            remedy=_REMEDY,
            place=place_of(node),
        )
        for node in _untranslated(program)
    ]
    if missing:
        return list(dict.fromkeys(missing))
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)  # pyright: ignore[reportArgumentType] (it is an Exception)
    named = re.search(r"translating node %(\w+)", " ".join(str(cause) for cause in causes))
    found = next((node for node in program.graph.nodes if named and node.name == named[1]), None)
    where = f"{place_of(found)} (`{found.target}`)" if found is not None else "The graph"
    reason = (str(causes[-1]).strip() or type(causes[-1]).__name__).splitlines()[0].rstrip(".")
    return [
        Refusal(
            what=f"{where} could not be translated to ONNX: {reason}.",
            why="Every operation of an export must be.",
            remedy=_REMEDY,
            place=None if found is None else place_of(found),
        )
    ]


def _untranslated(program: ExportedProgram) -> list[fx.Node]:
    """The calls of a program that torch's exporter has nothing for, also after its decompositions."""
    core = import_module("torch.onnx._internal.exporter._core")
    registry = import_module("torch.onnx._internal.exporter._registration").ONNXRegistry.from_torchlib()
    dispatch = import_module("torch.onnx._internal.exporter._dispatching").dispatch
    try:
        prepared = core._prepare_exported_program_for_export(program, registry=registry)
    except Exception:  # then it is a decomposition that failed, not a translation
        return []
    calls = (node for node in prepared.graph.nodes if node.op == "call_function")
    missing = {_origin(node) for node in calls if dispatch(node, registry)[0] is None}
    return [node for node in program.graph.nodes if node.name in missing]


def _origin(node: fx.Node) -> str:
    """Name of the node of a program that a node of its decomposition comes from."""
    name, sources = node.name, node.meta.get("from_node")
    while sources:
        name, sources = sources[-1].name, sources[-1].from_node
    return name


def clear(model: ir.Model) -> None:
    """Takes off what torch's exporter says about files and objects."""
    from onnx_ir.passes import common  # noqa: PLC0415 (an extra)

    common.ClearMetadataAndDocStringPass()(model)
    for graph in (model.graph, *model.functions.values()):
        graph.metadata_props.clear()
        for value in values_of(graph):
            value.metadata_props.clear()
    model.metadata_props.clear()


def values_of(graph: Any) -> Iterator[ir.Value]:
    """Inputs, initializers and results of a graph or function, those of inner graphs too."""
    yield from graph.inputs
    yield from getattr(graph, "initializers", {}).values()
    for node in graph.all_nodes():
        yield from node.outputs


def name_batch(model: ir.Model, symbol: str) -> None:
    """Calls the example axis `batch` in all shapes."""
    import onnx_ir as ir  # noqa: PLC0415 (an extra)

    pattern = re.compile(rf"(?<!\w){re.escape(symbol)}(?!\w)")
    for value in values_of(model.graph):
        if value.shape is not None:
            sizes = [d if isinstance(d, int) or d.value is None else pattern.sub("batch", d.value) for d in value.shape]
            value.shape = ir.Shape(sizes)


def rename(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Names inputs and outputs; others that have these names, or those of parameters, give way."""
    graph = model.graph
    taken = set(graph.initializers)
    ends = [*graph.inputs, *graph.outputs]
    for value, wanted in zip(ends, [*inputs, *outputs], strict=True):
        value.name = free_name(wanted, taken)
    for value in values_of(graph):
        if not any(value is end for end in ends) and value.name not in graph.initializers:
            value.name = free_name(value.name or "", taken)


def free_name(wanted: str, taken: set[str]) -> str:
    """A name that is not taken, and is then: the wanted one, or the same with underscores."""
    while wanted in taken:
        wanted += "_"
    taken.add(wanted)
    return wanted


def fold(model: ir.Model) -> None:
    """Computes what is constant in the graph, and leaves out what nothing reads; parameters stay as they are."""
    import onnx_ir as ir  # noqa: PLC0415 (an extra)
    from onnx_ir.passes import common  # noqa: PLC0415 (an extra)
    from onnxscript import optimizer  # noqa: PLC0415 (an extra)

    graph, named = model.graph, set(model.graph.initializers)

    def keeps_parameters(node: ir.Node) -> bool | None:
        return False if any(value is not None and value.name in named for value in node.inputs) else None

    optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=keeps_parameters)
    made: dict[Any, ir.Value] = {}
    for name in sorted(graph.initializers.keys() - named):
        value = graph.initializers.pop(name)
        assert value.const_value is not None
        numbers = value.const_value.numpy()
        key = name if value.is_graph_output() else (str(numbers.dtype), numbers.shape, numbers.tobytes())
        if key not in made:
            constant = ir.node("Constant", [], {"value": ir.tensor(numbers)})
            made[key] = constant.outputs[0]
            made[key].name, made[key].type, made[key].shape = name, value.type, value.shape
            graph.insert_before(graph[0], constant)
        value.replace_all_uses_with(made[key], replace_graph_outputs=True)
    common.RemoveUnusedNodesPass()(model)


__all__ = [
    "PlaceOf",
    "clear",
    "fold",
    "free_name",
    "name_batch",
    "program_of",
    "rename",
    "require_extra",
    "scopes_of",
    "to_onnx",
    "values_of",
]
