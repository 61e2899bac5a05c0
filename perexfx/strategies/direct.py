"""Per-example kernel gradients and their norms in one pass, by a kernel of our own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perexfx.ir import native
from perexfx.ir.convolution import Convolution, ConvolutionSignature
from perexfx.ir.cost import Cost, Work
from perexfx.ir.factors import Factors, Signature
from perexfx.ir.kept import PIECE_BYTES, Kept
from perexfx.ir.ordinary import parameter_elements
from perexfx.strategies.costs import kept_gradients
from perexfx.strategies.grouped import Grouped


@dataclass(frozen=True)
class Direct:
    """Per-example kernel gradients from one C++ kernel: one product per tap, which also adds up the squares.

    As many flops as the ordinary kernel gradient, and as fast; nothing is unfolded, copied or read again for its norm.
    Whoever traces sees the grouped convolution's gradient in its place.
    """

    name: str = "direct"

    def refuses(self, signature: Signature) -> str | None:
        """All that the kernel is not made for."""
        if not isinstance(signature, ConvolutionSignature):
            return "it is not a convolution"
        return None if signature.has_kernels else "there is no kernel in C++ for it here"

    def cost(self, signature: Signature, itemsize: int) -> Cost:
        """The flops of the ordinary kernel gradient, in whole vectors; n gradients are written, and kept."""
        assert isinstance(signature, ConvolutionSignature)
        kept = signature.n * parameter_elements(signature) * itemsize
        flops, calls = int(signature.weight_gradient_flops * _waste(signature, itemsize)), _pieces(signature.n, kept)
        images = itemsize * signature.held_elements
        kind, moved = ("direct_depthwise", images + kept) if signature.is_depthwise else ("direct", kept)
        work = [Work(kind, flops, moved, calls=calls)]
        if not signature.channels_last:
            work.append(Work("memory", bytes=images))
        return kept_gradients(signature, itemsize, tuple(work))

    def squared_norms(self, factors: Factors) -> tuple[Tensor, Factors]:
        """Norms of the formed gradients, which are kept."""
        assert isinstance(factors, Convolution)
        n = factors.layer_input.shape[0]
        kept = n * parameter_elements(factors.signature) * factors.layer_input.element_size()
        pieces, norms = [], []
        for part in factors.split(-(-n // _pieces(n, kept)) or 1):
            found = native.kernel_gradients(part.layer_input, part.grad_output, part.shape, part.geometry)
            if found is None:
                return Grouped().squared_norms(factors)
            pieces.append(found[0])
            norms.append(found[1])
        squared = norms[0] if len(norms) == 1 else torch.cat(norms)
        axes = (*range(2, len(factors.shape)), 1, 0)
        dtype = torch.promote_types(factors.layer_input.dtype, torch.float32)
        return squared.to(dtype), Kept(tuple(pieces), factors.shape, axes)


ROWS, VECTORS = 6, 4
"""Of a block of sums: input channels, and vectors of output channels."""


def _waste(signature: ConvolutionSignature, itemsize: int) -> float:
    """What the kernel takes / what it would with as many channels as it likes: few fill neither vectors nor blocks."""
    lanes = native.LANES * 4 // itemsize
    if signature.is_depthwise:
        return -(-signature.out_channels // lanes) * lanes / signature.out_channels
    outputs = max(1, signature.out_channels // signature.geometry.groups)
    vectors = -(-outputs // lanes)
    rows, columns = min(ROWS, max(1, signature.shape[1])), min(VECTORS, vectors)
    return vectors * lanes / outputs * max(1.0, 1 / rows + 1 / columns)


def _pieces(n: int, kept: int) -> int:
    """How many pieces the gradients of n examples, of so many bytes, are kept in."""
    return max(1, min(n, -(-kept // PIECE_BYTES)))
