"""What an ordinary backward does for a parameter's gradient: what every strategy is held against."""

from __future__ import annotations

import math

from perexfx.ir.convolution import ConvolutionSignature
from perexfx.ir.cost import Work
from perexfx.ir.factors import GradientSignature, ProductSignature, RowsSignature, Signature


def parameter_elements(signature: Signature) -> int:
    """Elements of the parameter."""
    return math.prod(signature.shape)


def ordinary_gradient(signature: Signature, itemsize: int) -> tuple[Work, ...]:
    """The parameter's gradient over all examples together, as an ordinary backward computes it."""
    if isinstance(signature, GradientSignature):
        return ()
    moved = itemsize * (signature.held_elements + parameter_elements(signature))
    if isinstance(signature, ConvolutionSignature):
        kind = "convolution_weight_thin_groups" if signature.has_thin_groups else "convolution_weight"
        return (Work(kind, signature.weight_gradient_flops, moved),)
    if isinstance(signature, ProductSignature):
        rows = signature.n * signature.g * signature.t
        return (Work("gemm", 2 * rows * signature.i * signature.o, moved),)
    assert isinstance(signature, RowsSignature)
    rows = signature.n * signature.t * signature.d
    return (Work("index", bytes=itemsize * (rows + parameter_elements(signature))),)
