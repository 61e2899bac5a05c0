"""`export_onnx`: arguments to a file."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils import stateless
from torch.utils import _pytree as pytree

from perexfx.capture import quiet
from perexfx.ir.errors import ArgumentError, ExportError, PerexError
from perexfx.ir.inputs import GivenInputs, bind_inputs, by_name, named_leaves
from perexfx.ir.refusal import Refusal
from perexfx.runtime import Transformed, runtime_of
from perexfx.steps import LossFunction, call, functional_step
from perexfx.views.files import writing
from perexfx.views.onnx.compare import Trial, compare
from perexfx.views.onnx.forward import forward_model
from perexfx.views.onnx.metadata import of_model
from perexfx.views.onnx.plain import named_outputs
from perexfx.views.onnx.step import named_step, step_model
from perexfx.views.onnx.translate import require_extra

if TYPE_CHECKING:
    import onnx_ir as ir

_logger = logging.getLogger("perexfx")

GRAPHS = ("forward", "step")
"""What can be exported."""

LARGEST = 1_900_000_000
"""Bytes of parameters, at most, in the file itself: protobuf has a limit of 2 GB."""


def export_onnx(
    gm: Transformed,
    path: str | Path,
    example_inputs: GivenInputs,
    *,
    graph: str = "forward",
    loss_fn: LossFunction | None = None,
    targets: Any = None,
) -> Path:
    """Path of the ONNX file that it writes: the transformed module's forward, or its whole step.

    Before the file is written it is checked, and run by onnxruntime, on the example inputs and on others of their
    shapes: loss, norms, gradients or outputs that are not torch's are refused. (Where onnxruntime lacks an operation
    for a dtype, the log says that this was not done.) Parameters and buffers are in it under their own names; those of
    more than 1.9 GB are in a second file beside it, `<name>.data`.

    `graph="forward"`: what `gm(x)` computes, in the mode that `gm` is in. Clip node, norm nodes and sites are nodes of
    the domain `perexfx`, each a function with a body of ordinary operations; a site's metadata has its strategy and
    predicted costs, as in the report, and its source line. The batch may have any size, which is called `batch`, where
    `torch.export` finds that the forward has no other way for some; else the size is that of the example inputs, and
    the log says why. Inputs are called as the forward's arguments; in containers `batch.image` or `args.0`; outputs
    `output`, `output.0`, or by their keys. Where a parameter has that name already, an underscore follows.

    `graph="step"`: what an ordinary backward through `gm` finds, as `perexfx.step_graph`. Inputs are the parameters and
    buffers, with their present values as defaults, so that a training loop may give its own; then those of the
    forward, and `targets`. Outputs are `loss`, `norms`, `clip_factors`, and `grad.<name>` for every parameter that the
    loss reaches. All sizes are fixed, the batch size too. What draws random numbers, as dropout does in training, is
    refused in both.

    Args:
        gm: From `perexfx.transform`. Neither it nor what it knows is changed.
        path: Where to. The folder must exist; a file there is overwritten.
        example_inputs: A tensor, a tuple of positional inputs, or a dict of keyword inputs. Their shapes count, and
            what is not a tensor in them.
        graph: "forward" or "step".
        loss_fn: `(gm(x), y) -> scalar`, for the step.
        targets: Passed to `loss_fn`: a tensor, or any pytree of tensors.

    Raises:
        ArgumentError: An argument is not what it should be, the model or loss fails on the inputs, or the extra
            `perexfx[onnx]` is not installed.
        ExportError: Operations have no translation to ONNX, or draw random numbers; all are named.
        CaptureError: The step cannot be one graph: the model or the loss reads the value of a tensor.
    """
    file = _checked(gm, path, graph, loss_fn, targets)
    require_extra()
    arguments = by_name(bind_inputs(gm, example_inputs, "example_inputs"))
    runtime = runtime_of(gm)
    instead: dict[str, Any] = {"plans": dict(runtime.plans)}
    if loss_fn is not None:
        instead = {"regions": ()}  # a file knows no memory formats, and what only changes them has no translation
        example_inputs = pytree.tree_map_only(Tensor, Tensor.contiguous, example_inputs)
    with runtime.set_aside(**instead), torch.enable_grad():
        kind, n = runtime.kind_of(named_leaves(arguments))
        if graph == "step" and n == 0:
            raise ArgumentError("`example_inputs` should have one example at least for a step. Found none.")
        given = _tried(gm, loss_fn, example_inputs, targets)
        plan = runtime.begin(tuple(arguments), tuple(arguments.values())).plan
        assert plan is not None
        if loss_fn is None:
            model = forward_model(gm, arguments, kind.carriers, plan)
        else:
            model = step_model(gm, loss_fn, example_inputs, arguments, targets)
        model.metadata_props.update(of_model(graph, runtime.settings, plan))
        model.producer_name, model.producer_version = "perexfx", model.metadata_props["perexfx.version"]
        model.graph.name = graph
        _write(model, file, [given, *_others(gm, loss_fn, example_inputs, targets)])
    return Path(path)


def _tried(gm: Transformed, loss_fn: LossFunction | None, x: GivenInputs, targets: Any) -> Trial:
    """What torch finds on the example inputs. Raises: ArgumentError, where it fails on them."""
    try:
        return _trial(gm, loss_fn, dict(gm.named_parameters()), x, targets)
    except PerexError:
        raise
    except Exception as error:  # a model or loss may fail in any way
        what, given = ("step", "`example_inputs` and `targets`") if loss_fn else ("forward", "`example_inputs`")
        raise ArgumentError(
            f"The {what} fails on {given}: {type(error).__name__}: {str(error).rstrip('.')}."
        ) from error


def _others(gm: Transformed, loss_fn: LossFunction | None, x: GivenInputs, targets: Any) -> Iterator[Trial]:
    """What else a file is run on: other inputs of the same shapes, for a step with other parameters too."""
    parameters = dict(gm.named_parameters())
    generator = torch.Generator().manual_seed(0)

    def other(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
        width = value.detach().nan_to_num(0, 0, 0).std(correction=0) if value.numel() else 0
        return torch.where(value.isfinite(), value, 0).detach() + noise * (width or 1.0)

    changed = pytree.tree_map(other, x)
    if loss_fn is not None:
        parameters = {name: other(value) for name, value in parameters.items()}
    try:
        yield _trial(gm, loss_fn, parameters, changed, targets, gives_parameters=True)
    except Exception as error:  # the model may not take such inputs
        _logger.info("The ONNX file was compared with torch on the example inputs alone: %s", error)


def _trial(
    gm: Transformed,
    loss_fn: LossFunction | None,
    parameters: Mapping[str, Tensor],
    x: GivenInputs,
    targets: Any,
    *,
    gives_parameters: bool = False,
) -> Trial:
    """Values of a file's last inputs, and what torch finds for them."""
    buffers = {name: buffer.clone() for name, buffer in gm.named_buffers()}
    arguments = by_name(bind_inputs(gm, x, "example_inputs"))
    if loss_fn is None:
        with stateless._reparametrize_module(gm, buffers), torch.no_grad():
            return _tensors(arguments), named_outputs(call(gm, x))
    found = named_step(*functional_step(gm, loss_fn)(parameters, dict(buffers), x, targets))
    held = [parameters, dict(gm.named_buffers())] if gives_parameters else []
    return _tensors([*held, arguments, targets]), found


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _checked(gm: Any, path: Any, graph: Any, loss_fn: Any, targets: Any) -> Path:
    """The path. Raises: ArgumentError, naming the first argument that is not what it should be."""
    if not isinstance(gm, Transformed):
        raise ArgumentError(f"`gm` should come from `perexfx.transform`. Found {type(gm).__name__}.")
    if graph not in GRAPHS:
        raise ArgumentError(f'`graph` should be "forward" or "step". Found {graph!r}.')
    if graph == "step" and not callable(loss_fn):
        raise ArgumentError(
            f'`loss_fn` should be a function `(gm(x), y) -> scalar` for graph="step". Found {loss_fn!r}. Pass the loss '
            "that you train with."
        )
    if graph == "forward" and (loss_fn is not None or targets is not None):
        word = "targets" if loss_fn is None else "loss_fn"
        raise ArgumentError(
            f'`{word}` belongs to the step, and a forward has none. Pass graph="step", or leave it out.'
        )
    if not isinstance(path, str | Path):
        raise ArgumentError(f"`path` should be a str or a Path. Found {type(path).__name__}.")
    with writing(path):
        found = Path(path).resolve()
        has_folder, is_other = found.parent.is_dir(), found.exists() and not found.is_file()
    if not has_folder:
        raise ArgumentError(
            f"`path` should be a file in a folder that exists. Found {str(path)!r}. Make the folder first."
        )
    if is_other:
        kind = "a folder" if found.is_dir() else "something else"
        raise ArgumentError(f"`path` should be a file, or none yet. Found {str(path)!r}, which is {kind}.")
    return found


def _write(model: ir.Model, path: Path, trials: Sequence[Trial]) -> None:
    """Checks a model and writes it; a file that was there stays as it was where the model is not valid or not right."""
    import onnx  # noqa: PLC0415 (an extra)
    import onnx_ir as ir  # noqa: PLC0415 (an extra)

    held = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    data = f"{path.name}.data" if sum(tensor.nbytes for tensor in held) > LARGEST else None
    with writing(path), quiet(), tempfile.TemporaryDirectory(dir=path.parent, prefix=".perexfx-onnx-") as folder:
        written = Path(folder) / path.name
        ir.save(model, written, external_data=data)
        try:
            onnx.checker.check_model(str(written), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError([_not_valid(error)]) from error
        compare(written, [value.name or "" for value in model.graph.inputs], trials)
        for file in sorted(Path(folder).iterdir()):
            file.replace(path.parent / file.name)


def _not_valid(error: Exception) -> Refusal:
    reason = str(error).strip().splitlines()[0].rstrip(".")
    return Refusal(
        what=f"What torch's exporter made of the model is not valid ONNX: {reason}.",
        why="Nothing was written.",
        remedy="Replace that operation in the model, or report it with the versions of torch and onnxscript.",
    )


__all__ = ["GRAPHS", "export_onnx"]
