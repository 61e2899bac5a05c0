"""A parameter that is copied to every example: a class token through `expand` or `repeat`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perexfx.ir.factors import Factors, Gradient, GradientSignature, Signature
from perexfx.ir.rule import Arguments, Backward, Geometry, Rule, Target
from perexfx.layers.elementwise import reduce_to


@dataclass(frozen=True)
class Expand(Rule):
    """`p.expand(B, ...)`: the gradient of a copy is the gradient of its example."""

    kind = "expand"
    targets = ("expand", "expand_as", "repeat", "tile", torch.tile, torch.broadcast_to)
    operands = ("input",)
    inputs = ()

    def bind(self, target: Target, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The expanded value, and all the rest as it stands."""
        value, *sizes = args
        return {"target": target, "input": value, "sizes": tuple(sizes), "names": dict(kwargs)}

    def misfits(self, arguments: Arguments, geometry: Geometry) -> str | None:
        """Copies whose rows cannot be told apart."""
        shape, layout = geometry.shapes["input"], geometry.output_layout
        axis = layout.axis - len(geometry.output_shape) + len(shape)
        if axis >= 0 and layout.after % shape[axis]:
            return "the rows of its copies are spread over examples"
        return None

    def signatures(self, arguments: Arguments, geometry: Geometry) -> dict[str, Signature]:
        """Gradients at hand."""
        return {"input": GradientSignature(geometry.n, geometry.shapes["input"])}

    def forward(self, arguments: Arguments, geometry: Geometry) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The copies, each with its own memory: what follows may change them in place."""
        target, value = arguments["target"], arguments["input"]
        function = getattr(torch.Tensor, target) if isinstance(target, str) else target
        copies = function(value, *arguments["sizes"], **arguments["names"])
        return copies.clone(memory_format=torch.contiguous_format), ()

    def reads(self, arguments: Arguments, inputs: Collection[str], operands: Collection[str]) -> Collection[str]:
        """Nothing."""
        return ()

    def backward(self, call: Backward) -> tuple[dict[str, Tensor], dict[str, Factors]]:
        """Each example's own copies, summed."""
        shape = call.geometry.shapes["input"]
        return {}, {"input": Gradient(reduce_to(call.grad_output, call.geometry.output_layout, shape))}
