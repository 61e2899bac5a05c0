"""The library's own kernel gradient on one example at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perexfx.ir.convolution import Convolution, ConvolutionSignature, kernel_gradient
from perexfx.ir.cost import Cost, Work
from perexfx.ir.factors import Factors, Gradient, Signature, squared_norms_of
from perexfx.strategies.costs import (
    finish_kept,
    finish_product,
    fresh_memory,
    parameter_elements,
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
        work = Work(
            "convolution_weight_single",
            signature.weight_gradient_flops,
            one * signature.n,
            calls=signature.n,
        )
        norms = read_for_norm(signature.n * parameter_elements(signature), itemsize)
        if self.keep:
            copies = Work("memory", bytes=2 * one * signature.n, calls=signature.n)
            tail = (copies, fresh_memory(one * signature.n), norms, finish_kept(signature, itemsize))
            return Cost((work, *tail), bytes_held=one * signature.n, bytes_transient=one)
        finish = finish_product(signature, itemsize)
        return Cost((work, norms, *finish), bytes_held=signature.held_elements * itemsize, bytes_transient=one)

    def squared_norms(self, factors: Factors) -> tuple[Tensor, Factors]:
        """Norms of the formed gradients, one after the other."""
        assert isinstance(factors, Convolution)
        one_by_one = (
            kernel_gradient(x, g, factors.shape, factors.geometry)
            for x, g in zip(factors.layer_input, factors.grad_output, strict=True)
        )
        n = factors.layer_input.shape[0]
        if self.keep:
            kept = factors.layer_input.new_empty(n, *factors.shape)
            for row, gradient in zip(kept, one_by_one, strict=True):
                row.copy_(gradient)
            return squared_norms_of(kept), Gradient(kept)
        norms = [squared_norms_of(gradient[None]) for gradient in one_by_one]
        return (torch.cat(norms) if norms else factors.layer_input.new_zeros(0)), factors
