"""Per-example gradients and their norms in one pass, by kernels of our own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from perexfx import kernels
from perexfx.ir.convolution import Convolution, ConvolutionSignature
from perexfx.ir.cost import Cost, Work
from perexfx.ir.factors import Factors, Product, ProductSignature, Signature
from perexfx.ir.kept import PIECE_BYTES, Kept
from perexfx.ir.ordinary_gradient import parameter_elements
from perexfx.ir.shared_costs import held_factors, kept_gradients
from perexfx.strategies.grouped import Grouped
from perexfx.strategies.materialize import Materialize


@dataclass(frozen=True)
class Direct:
    """Per-example gradients from one C++ kernel, which also adds up the squares: those of linear layers one block at a
    time, those of convolutions one tap at a time.

    As many flops as the ordinary gradient, and as fast; nothing is unfolded, copied or read again for its norm.
    Whoever traces sees torch's own operations in its place.

    Attributes:
        keep: Keep the gradients until the clip node (`direct`); or only their norms (`direct_norms`, linear layers
            alone), whose gradients never leave the cache, and compute the clipped sum by one product later.
    """

    keep: bool

    weighs_taps: ClassVar = True

    @property
    def name(self) -> str:
        """`direct` or `direct_norms`."""
        return "direct" if self.keep else "direct_norms"

    def refuses(self, signature: Signature) -> str | None:
        """All that the kernels are not made for."""
        if isinstance(signature, ConvolutionSignature) and not self.keep:
            return "a convolution's kernel writes what it makes"
        if not isinstance(signature, ConvolutionSignature | ProductSignature):
            return "its gradient is not a product of two factors"
        return None if signature.has_kernels else "there is no kernel in C++ for it here"

    def cost(self, signature: Signature, itemsize: int) -> Cost:
        """The flops of the ordinary gradient, in whole vectors; n gradients are written, and kept."""
        kept = signature.n * parameter_elements(signature) * itemsize
        calls = _pieces(signature.n, kept) if self.keep else 1
        if isinstance(signature, ProductSignature):
            flops = int(2 * signature.t * kept // itemsize * _product_waste(signature, itemsize))
            work = [Work("direct_product", flops, kept if self.keep else 0, calls=calls)]
            if not self.keep:
                return held_factors(signature, itemsize, tuple(work))
            return kept_gradients(signature, itemsize, tuple(work))
        assert isinstance(signature, ConvolutionSignature)
        flops = int(signature.weight_gradient_flops * _waste(signature, itemsize))
        images = itemsize * signature.held_elements
        kind, moved = ("direct_depthwise", images + kept) if signature.is_depthwise else ("direct", kept)
        work = [Work(kind, flops, moved, calls=calls)]
        if not signature.channels_last:
            work.append(Work("memory", bytes=images))
        return kept_gradients(signature, itemsize, tuple(work))

    def squared_norms(self, factors: Factors) -> tuple[Tensor, Factors]:
        """Norms of the formed gradients, a piece of the batch at a time."""
        if isinstance(factors, Product):
            return self._of_product(factors)
        assert isinstance(factors, Convolution)
        size, taps = _examples_at_a_time(factors.layer_input, factors.signature), factors.weight_of_each_tap
        found = [
            kernels.kernel_gradients(part.layer_input, part.grad_output, part.shape, part.geometry, taps)
            for part in factors.split(size)
        ]
        if (taken := _joined(found, factors.layer_input)) is None:
            return Grouped().squared_norms(factors)
        squared, pieces = taken
        return squared, Kept(pieces, factors.shape, (*range(2, len(factors.shape)), 1, 0))

    def _of_product(self, factors: Product) -> tuple[Tensor, Factors]:
        lanes = kernels.LANES * 4 // factors.left.element_size()
        turned = _is_turned(factors.left.shape[3], factors.right.shape[3], lanes)
        columns, rows = (factors.right, factors.left) if turned else (factors.left, factors.right)
        n = columns.shape[0]
        size = _examples_at_a_time(columns, factors.signature) if self.keep else max(1, n)
        found = [
            kernels.product_gradients(part, other, self.keep)
            for part, other in zip(columns.split(size), rows.split(size), strict=True)
        ]
        if (taken := _joined(found, columns)) is None:
            return Materialize(self.keep).squared_norms(factors)
        squared, pieces = taken
        return squared, Kept(pieces, factors.shape, factors.axes, turned) if self.keep else factors


_Found = tuple[Tensor | None, Tensor]


def _joined(found: Sequence[_Found | None], like: Tensor) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """Squared norms of all pieces, in float32 at least, and the gradients of each; None if a kernel was missing."""
    parts = [part for part in found if part is not None]
    if len(parts) < len(found):
        return None
    squares = parts[0][1] if len(parts) == 1 else torch.cat([squares for _, squares in parts])
    kept = tuple(gradients for gradients, _ in parts if gradients is not None)
    return squares.to(torch.promote_types(like.dtype, torch.float32)), kept


def _examples_at_a_time(factor: Tensor, signature: Signature) -> int:
    """Whose gradients are one piece."""
    n = factor.shape[0]
    return -(-n // _pieces(n, n * parameter_elements(signature) * factor.element_size())) or 1


ROWS, VECTORS = 6, 4
"""Of a block of sums, with AVX-512: rows, such as input channels, and vectors, such as of output channels."""


def _product_waste(signature: ProductSignature, itemsize: int) -> float:
    """As `_waste`."""
    lanes = kernels.LANES * 4 // itemsize
    rows, columns = signature.o, signature.i
    if _is_turned(columns, rows, lanes):
        rows, columns = columns, rows
    return _in_vectors(columns, lanes) * _stalls(rows, -(-columns // lanes))


def _is_turned(inputs: int, outputs: int, lanes: int) -> bool:
    """Whether vectors run over outputs, which fill them better."""
    return _in_vectors(inputs, lanes) > _in_vectors(outputs, lanes)


def _waste(signature: ConvolutionSignature, itemsize: int) -> float:
    """What the kernel takes / what it would with as many channels as it likes: few fill neither vectors nor blocks."""
    lanes = kernels.LANES * 4 // itemsize
    if signature.is_depthwise:
        return _in_vectors(signature.out_channels, lanes)
    outputs = max(1, signature.out_channels // signature.geometry.groups)
    return _in_vectors(outputs, lanes) * _stalls(signature.shape[1], -(-outputs // lanes))


def _in_vectors(features: int, lanes: int) -> float:
    """Elements of the vectors that some features fill / the features."""
    return -(-features // lanes) * lanes / max(1, features)


def _stalls(rows: int, vectors: int) -> float:
    """Loads / products of a block of sums where they are more than there is time for, else one."""
    return max(1.0, 1 / min(ROWS, max(1, rows)) + 1 / min(VECTORS, max(1, vectors)))


def _pieces(n: int, kept: int) -> int:
    """How many pieces the gradients of n examples, of so many bytes, are kept in."""
    return max(1, min(n, -(-kept // PIECE_BYTES)))
