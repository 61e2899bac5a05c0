"""`export_onnx`: arguments to a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from perexfx.inputs import GivenInputs, bind_inputs, by_name, named_leaves
from perexfx.ir.errors import ArgumentError, ExportError
from perexfx.ir.refusal import Refusal
from perexfx.rewrite import Transformed
from perexfx.step import LossFunction
from perexfx.views.onnx.forward import forward_model
from perexfx.views.onnx.metadata import of_model
from perexfx.views.onnx.step import step_model
from perexfx.views.onnx.translate import quiet, require_extra

if TYPE_CHECKING:
    import onnx_ir as ir

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
    """Path of the ONNX file that it writes.

    Args:
        gm: From `perexfx.transform`.
        path: Where to.
        example_inputs: A tensor, a tuple of positional inputs, or a dict of keyword inputs.
        graph: "forward" or "step".
        loss_fn: `(gm(x), y) -> scalar`, for the step.
        targets: Passed to `loss_fn`: a tensor, or any pytree of tensors.
    """
    require_extra()
    path = Path(path)
    bound = by_name(bind_inputs(gm, example_inputs, "example_inputs"))
    state = gm.perexfx
    plans = state.plans
    with state.set_aside():
        state.plans = dict(plans)
        with torch.enable_grad():
            tape = state(tuple(bound), *bound.values())
        kind, _ = state.kind_of(named_leaves(bound))
        plan = tape.plan
        if graph == "step":
            model = step_model(gm, loss_fn, example_inputs, bound, targets)
        else:
            model = forward_model(gm, bound, kind.carriers, plan)
    model.metadata_props.update(of_model(graph, state.settings, plan))
    model.producer_name, model.producer_version = "perexfx", model.metadata_props["perexfx.version"]
    model.graph.name = graph
    _write(model, path)
    return path


def _write(model: ir.Model, path: Path) -> None:
    import onnx  # noqa: PLC0415 (an extra)
    import onnx_ir as ir  # noqa: PLC0415 (an extra)

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    with quiet():
        ir.save(model, path, external_data=f"{path.name}.data" if size > LARGEST else None)
    onnx.checker.check_model(str(path), full_check=True)
