"""The whole step of a transformed module as a model: loss, norms, factors, and a clipped gradient per parameter."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from perexfx.inputs import GivenInputs, named_leaves
from perexfx.ir.errors import ExportError
from perexfx.ir.refusal import Refusal
from perexfx.quiet import quiet
from perexfx.rewrite import Transformed
from perexfx.step import LossFunction, functional_step, traced
from perexfx.views.onnx.decompositions import DECOMPOSITIONS
from perexfx.views.onnx.places import StepPlaces
from perexfx.views.onnx.plain import readable
from perexfx.views.onnx.translate import clear, fold, rename, to_onnx

if TYPE_CHECKING:
    import onnx_ir as ir


def step_model(
    gm: Transformed, loss_fn: LossFunction, x: GivenInputs, arguments: Mapping[str, Any], targets: Any
) -> ir.Model:
    """The step as a model, for the shapes of its inputs.

    Args:
        gm: The module.
        loss_fn: `(gm(x), y) -> scalar`.
        x: As users give it.
        arguments: The same by name.
        targets: Passed to `loss_fn`.

    Raises:
        ExportError: An operation has no translation.
        CaptureError: The step cannot be one graph.
        ArgumentError: The loss is not a scalar.
    """
    with quiet():
        trace = partial(traced, gm, functional_step(gm, loss_fn), x, targets, DECOMPOSITIONS)
        graph = trace()
        parameters, buffers = dict(gm.named_parameters()), dict(gm.named_buffers())
        module = _Flat(graph, (parameters, buffers, x, targets))
        given = [leaf.detach() for leaf in module.tensors]
        try:
            program = torch.export.export(module, tuple(given), strict=False)
        except Exception as error:  # an export may fail in any way
            raise ExportError([_not_exported(error)]) from error
        model = to_onnx(program, StepPlaces(gm, partial(trace, keeps_stacks=True)))
        names = [*parameters, *buffers, *_names(arguments, "targets", targets)]
        spec = program.call_spec.out_spec
        assert spec is not None
        rename(model, names, spec.context)
        clear(model)
        _give_defaults(model, {**parameters, **buffers})
        fold(model)
    return model


def _not_exported(error: Exception) -> Refusal:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return Refusal(
        what=f"`torch.export` cannot export the step: {reason}.",
        why="An ONNX file is made from its export.",
        remedy="Rewrite that part of the model or of the loss with tensor operations.",
    )


class _Flat(nn.Module):
    """A step graph of tensors alone, that returns tensors by name.

    Args:
        graph: `(params, buffers, x, y) -> (loss, norms, factors, grads)`.
        given: Its arguments.
    """

    def __init__(self, graph: fx.GraphModule, given: Any) -> None:
        super().__init__()
        self.graph = graph
        self.leaves, self.spec = pytree.tree_flatten(given)

    @property
    def tensors(self) -> list[Tensor]:
        """Those among its arguments."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def forward(self, *tensors: Tensor) -> dict[str, Tensor]:
        """Loss, norms, factors, and the gradients that there are."""
        left = iter(tensors)
        leaves = [next(left) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        loss, norms, factors, gradients = self.graph(*pytree.tree_unflatten(leaves, self.spec))
        found = {name: value for name, value in gradients.items() if value is not None}
        return {"loss": loss, "norms": norms, "clip_factors": factors, **{f"grad.{n}": v for n, v in found.items()}}


def _names(arguments: Mapping[str, Any], word: str, targets: Any) -> list[str]:
    """Of the tensors among the inputs, and of those among the targets."""
    leaves = {**named_leaves(arguments), **named_leaves({word: targets})}
    return [readable(name) for name, leaf in leaves.items() if isinstance(leaf, Tensor)]


def _give_defaults(model: ir.Model, values: Mapping[str, Tensor]) -> None:
    """The module's parameters and buffers as they are, where a caller gives no others."""
    from onnx_ir.tensor_adapters import TorchTensor  # noqa: PLC0415 (an extra)

    for value in model.graph.inputs:
        if value.name is not None and value.name in values:
            value.const_value = TorchTensor(values[value.name].detach(), name=value.name)
            model.graph.initializers[value.name] = value


__all__ = ["step_model"]
