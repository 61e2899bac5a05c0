"""The batch as groups: one call of the grouped convolution's kernel gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from perexfx.ir.convolution import Convolution, ConvolutionSignature
from perexfx.ir.cost import Cost, Work
from perexfx.ir.factors import Factors, Signature
from perexfx.ir.kept import Kept
from perexfx.ir.norms import squared_norms_of
from perexfx.ir.ordinary_gradient import parameter_elements
from perexfx.ir.shared_costs import kept_gradients, kernel_gradient_elements, read_for_norm


@dataclass(frozen=True)
class Grouped:
    """Per-example kernel gradients from ONE call: `[n, C, H, W]` viewed as `[1, n C, H, W]` with n times the groups.

    References: Rochette et al. 2019, arXiv:1912.06015, section 3 (there through a convolution of one dimension more).
    """

    name: str = "grouped"

    weighs_taps: ClassVar = True

    def refuses(self, signature: Signature) -> str | None:
        """All but convolutions."""
        return None if isinstance(signature, ConvolutionSignature) else "it is not a convolution"

    def cost(self, signature: Signature, itemsize: int) -> Cost:
        """The flops of the ordinary kernel gradient; n gradients are written, read and kept."""
        assert isinstance(signature, ConvolutionSignature)
        kept = signature.n * parameter_elements(signature)
        at_a_time = examples_at_a_time(signature, itemsize)
        parts = -(-signature.n // at_a_time)
        copied = itemsize * kernel_gradient_elements(signature, min(at_a_time, signature.n))
        flops = signature.weight_gradient_flops
        work = (Work("convolution_weight_grouped", flops, itemsize * kept, calls=parts),)
        if not signature.fills_vectors:
            moved = itemsize * (kept + signature.held_elements)
            kind = "convolution_weight_thin_groups" if signature.has_thin_groups else "convolution_weight_thin"
            work = (Work(kind, flops, moved, calls=parts),)
        if signature.channels_last:
            work = (*work, Work("memory", bytes=2 * itemsize * signature.held_elements, calls=2 * parts))
        return kept_gradients(signature, itemsize, (*work, read_for_norm(kept, itemsize)), copied)

    def squared_norms(self, factors: Factors) -> tuple[Tensor, Factors]:
        """Norms of the formed gradients, which are kept."""
        assert isinstance(factors, Convolution)
        step = examples_at_a_time(factors.signature, factors.layer_input.element_size())
        pieces = [part.gradients() for part in factors.split(step)]
        norms = [squared_norms_of(factors.weighed(piece)) for piece in pieces]
        return (norms[0] if len(norms) == 1 else torch.cat(norms)), Kept(tuple(pieces), factors.shape)


CHUNK_BYTES = 8 << 20
"""Images of as many examples at a time as fit the cache."""
KERNEL_ELEMENTS = 1 << 18
"""Kernels of as many groups as fit: oneDNN slows down beyond. Two examples are faster than one all the same."""


def examples_at_a_time(signature: ConvolutionSignature, itemsize: int) -> int:
    """How many examples share a call."""
    images = CHUNK_BYTES // max(1, signature.held_elements // max(1, signature.n) * itemsize)
    most = max(2, min(images, KERNEL_ELEMENTS // max(1, parameter_elements(signature))))
    return 1 << (most.bit_length() - 1)
