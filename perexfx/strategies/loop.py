"""The library's own kernel gradient on one example at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from perexfx.ir.convolution import Convolution, ConvolutionSignature, kernel_gradient
from perexfx.ir.cost import Cost, Work
from perexfx.ir.factors import Factors, Signature
from perexfx.ir.kept import Kept, axes_in_memory
from perexfx.ir.norms import squared_norms_of
from perexfx.ir.ordinary_gradient import parameter_elements
from perexfx.ir.shared_costs import (
    held_factors,
    kept_gradients,
    kernel_gradient_elements,
    read_for_norm,
)


@dataclass(frozen=True)
class Loop:
    """One kernel gradient per example: on large maps as cheap as the batched one.

    Attributes:
        keep: Keep the gradients for the clipped sum (`loop`), or only their norms, and compute the clipped sum by
            one batched kernel gradient after the clip node (`loop_norms`): the least memory of all.
    """

    keep: bool

    weighs_taps: ClassVar = True

    @property
    def name(self) -> str:
        """`loop` or `loop_norms`."""
        return "loop" if self.keep else "loop_norms"

    def refuses(self, signature: Signature) -> str | None:
        """All but convolutions."""
        return None if isinstance(signature, ConvolutionSignature) else "it is not a convolution"

    def cost(self, signature: Signature, itemsize: int) -> Cost:
        """The flops of the ordinary kernel gradient, in n calls."""
        assert isinstance(signature, ConvolutionSignature)
        one = parameter_elements(signature) * itemsize
        kind = "convolution_weight_thin_groups" if signature.has_thin_groups else "convolution_weight_single"
        work = Work(kind, signature.weight_gradient_flops, one * signature.n, calls=signature.n)
        norms = read_for_norm(signature.n * parameter_elements(signature), itemsize)
        copied = itemsize * kernel_gradient_elements(signature, 1)
        if self.keep:
            return kept_gradients(signature, itemsize, (work, norms), copied)
        return held_factors(signature, itemsize, (work, norms), copied + one)

    def squared_norms(self, factors: Factors) -> tuple[Tensor, Factors]:
        """Norms of the formed gradients, one after the other."""
        assert isinstance(factors, Convolution)
        norms, pieces = [], []
        memory_axes = tuple(range(len(factors.shape)))
        for x, g in zip(factors.layer_input, factors.grad_output, strict=True):
            gradient = kernel_gradient(x, g, factors.shape, factors.geometry)
            memory_axes = axes_in_memory(gradient)
            as_it_lies = gradient.permute(memory_axes)[None]
            norms.append(squared_norms_of(factors.weighed(gradient).permute(memory_axes)[None]))
            if self.keep:
                pieces.append(as_it_lies)
        if not norms:
            return factors.layer_input.new_zeros(0), factors
        return torch.cat(norms), Kept(tuple(pieces), factors.shape, memory_axes) if self.keep else factors
