"""The whole step of a transformed module as a model: loss, norms, factors, and a clipped gradient per parameter."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from perexfx.capture import quiet
from perexfx.ir.inputs import GivenInputs, named_leaves
from perexfx.runtime import Transformed
from perexfx.steps import LossFunction, functional_step, traced
from perexfx.views.onnx.decompositions import DECOMPOSITIONS
from perexfx.views.onnx.places import StepPlaces
from perexfx.views.onnx.plain import readable
from perexfx.views.onnx.translate import clear, fold, program_of, rename, to_onnx

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

        def trace(loss_fn: LossFunction, **options: bool) -> fx.GraphModule:
            return traced(gm, functional_step(gm, loss_fn), x, targets, DECOMPOSITIONS, **options)

        graph = trace(loss_fn)
        parameters, buffers = dict(gm.named_parameters()), dict(gm.named_buffers())
        module = _Flat(graph, (parameters, buffers, x, targets))
        given = [leaf.detach() for leaf in module.tensors]
        program = program_of(module, given, "the step", "the model or of the loss")
        model = to_onnx(program, StepPlaces(gm, loss_fn, trace))
        constants = {f"constant.{at}": value for at, value in enumerate(module.constants.values())}
        held = [parameters, buffers, constants]
        names = [*itertools.chain(*held), *_names(arguments), *_names({"targets": targets})]
        spec = program.call_spec.out_spec
        assert spec is not None
        rename(model, names, spec.context)
        clear(model)
        _give_defaults(model, [tensor for values in held for tensor in values.values()], len(constants))
        fold(model)
    return model


class _Flat(nn.Module):
    """A step graph of tensors alone, that returns tensors by name.

    Args:
        graph: `(params, buffers, x, y) -> (loss, norms, factors, grads)`.
        given: Its arguments.
    """

    def __init__(self, graph: fx.GraphModule, given: tuple[Any, Any, Any, Any]) -> None:
        super().__init__()
        self.graph = graph
        self.constants = _constants_of(graph)
        (parameters, buffers, x, y), others = given, dict(self.constants)
        self.leaves, self.spec = pytree.tree_flatten((parameters, buffers, others, x, y))

    @property
    def tensors(self) -> list[Tensor]:
        """Those among its arguments, the constants after the buffers."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def forward(self, *tensors: Tensor) -> dict[str, Tensor]:
        """Loss, norms, factors, and the gradients that there are."""
        left = iter(tensors)
        leaves = [next(left) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        parameters, buffers, constants, x, y = pytree.tree_unflatten(leaves, self.spec)
        for name, value in constants.items():
            setattr(self.graph, name, value)
        found = named_step(*self.graph(parameters, buffers, x, y))
        for name in constants:
            delattr(self.graph, name)
        return found


def _constants_of(graph: fx.GraphModule) -> dict[str, Tensor]:
    """The tensors that a graph holds, taken off it: those that a loss or a forward closes over."""
    names = dict.fromkeys(str(node.target) for node in graph.graph.nodes if node.op == "get_attr")
    found = {name: value for name in names if isinstance(value := getattr(graph, name), Tensor)}
    for name in found:
        delattr(graph, name)
    return found


def named_step(
    loss: Tensor, norms: Tensor, factors: Tensor, gradients: Mapping[str, Tensor | None]
) -> dict[str, Tensor]:
    """What a step finds, by the names of an exported step's outputs."""
    found = {f"grad.{name}": value for name, value in gradients.items() if value is not None}
    return {"loss": loss, "norms": norms, "clip_factors": factors, **found}


def _names(arguments: Mapping[str, Any]) -> list[str]:
    """Of the tensors among some arguments."""
    return [readable(name) for name, leaf in named_leaves(arguments).items() if isinstance(leaf, Tensor)]


def _give_defaults(model: ir.Model, values: Sequence[Tensor], constants: int) -> None:
    """The first inputs' present values, where a caller gives no others; the last of these are no inputs any more.

    Args:
        model: Is changed.
        values: Of the first inputs.
        constants: How many of these no caller can give.
    """
    from onnx_ir.tensor_adapters import TorchTensor  # noqa: PLC0415 (an extra)

    inputs = list(model.graph.inputs)
    for value, tensor in zip(inputs, values, strict=False):
        value.const_value = TorchTensor(tensor.detach(), name=value.name)
        model.graph.initializers[value.name or ""] = value
    count = len(values)
    del model.graph.inputs[count - constants : count]


__all__ = ["named_step", "step_model"]
