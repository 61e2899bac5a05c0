"""Costs that several strategies share."""

from __future__ import annotations

from perexfx.ir.convolution import ConvolutionSignature
from perexfx.ir.cost import Cost, Work
from perexfx.ir.factors import ProductSignature, RowsSignature, Signature
from perexfx.ir.kept import PIECE_BYTES
from perexfx.ir.ordinary_gradient import ordinary_gradient, parameter_elements
from perexfx.kernels.gemm import SMALL_EACH, mkl_is_slow


def finish_kept(signature: Signature, itemsize: int) -> Work:
    """The clipped sum of kept per-example gradients: one matrix-vector product, each element read once."""
    elements = signature.n * parameter_elements(signature)
    return Work("matrix_vector", flops=2 * elements, bytes=itemsize * elements)


def finish_product(signature: Signature, itemsize: int) -> tuple[Work, ...]:
    """The clipped sum from held factors: scale one of them, then one ordinary parameter gradient."""
    if isinstance(signature, ConvolutionSignature):
        scaled = min(signature.input_elements, signature.output_elements)
        if signature.is_sum_by_kernel:
            moved = 3 * itemsize * parameter_elements(signature)
            return (Work("direct", signature.weight_gradient_flops), Work("memory", bytes=moved))
        if signature.is_sum_by_product:
            unfolded = itemsize * signature.unfolded_elements
            return (
                Work("unfold", bytes=2 * unfolded),
                Work("memory", bytes=2 * itemsize * parameter_elements(signature)),
                Work("gemm", signature.weight_gradient_flops, unfolded + itemsize * parameter_elements(signature)),
            )
    elif isinstance(signature, ProductSignature):
        scaled = signature.n * signature.g * signature.t * signature.o
    else:
        assert isinstance(signature, RowsSignature)
        scaled = signature.n * signature.t * signature.d
    return (Work("memory", bytes=2 * itemsize * scaled), *ordinary_gradient(signature, itemsize))


def held_factors(signature: Signature, itemsize: int, work: tuple[Work, ...], bytes_transient: int = 0) -> Cost:
    """The cost of a strategy that holds the factors, from its work up to the norms."""
    return Cost(
        (*work, *finish_product(signature, itemsize)),
        bytes_held=signature.held_elements * itemsize,
        bytes_transient=bytes_transient,
        bytes_summing=itemsize * _summing_elements(signature),
        holds_factors=True,
    )


def kept_gradients(signature: Signature, itemsize: int, work: tuple[Work, ...], bytes_transient: int = 0) -> Cost:
    """The cost of a strategy that holds per-example gradients, from its work up to the norms."""
    size = parameter_elements(signature) * itemsize
    new = Work("first_touch", bytes=max(0, signature.n * size - HAD_BYTES))
    return Cost(
        (*work, finish_kept(signature, itemsize), new),
        bytes_held=signature.n * size,
        bytes_transient=bytes_transient,
        bytes_summing=size if signature.n * size > PIECE_BYTES else 0,
    )


HAD_BYTES = 4 << 20
"""So many bytes of kept gradients fit where activations were; the rest is memory that a step must ask for anew."""


def _summing_elements(signature: Signature) -> int:
    """Elements of the scaled factor, of what a library copies, and of the unfolded input where there is one."""
    if isinstance(signature, ConvolutionSignature):
        if signature.is_sum_by_kernel:
            return parameter_elements(signature)
        if signature.is_sum_by_product:
            return signature.unfolded_elements + 2 * signature.output_elements
        scaled = min(signature.input_elements, signature.output_elements)
        return scaled + kernel_gradient_elements(signature, signature.n)
    if isinstance(signature, ProductSignature):
        narrower = signature.n * signature.g * signature.t * min(signature.i, signature.o)
        if signature.g > 1 or not mkl_is_slow():
            return narrower
        return 2 * narrower + (signature.i * signature.o if signature.o > signature.i else 0)  # `transposed_product`
    assert isinstance(signature, RowsSignature)
    return signature.n * signature.t * signature.d


def kernel_gradient_elements(signature: ConvolutionSignature, examples: int) -> int:
    """Elements that oneDNN copies into its own formats for one kernel gradient of so many examples."""
    kernel, images = parameter_elements(signature), signature.held_elements * examples // max(1, signature.n)
    if signature.channels_last:
        return 3 * kernel if images >= kernel else kernel + 2 * images  # copied into the default format first
    return kernel + images


def batched_product(count: int, flops: int, moved: int) -> Work:
    """So many products of the same sizes: one call together, or one each where they are large.

    Args:
        count: How many.
        flops: Of all of them.
        moved: Bytes read and written by all of them.
    """
    return Work("batched_gemm", flops, moved, calls=count if flops >= SMALL_EACH * count else 1)


TILE_ROWS = 4
"""Of the tiles that the kernel makes Gram matrices of, with AVX-512: some of their entries lie above the diagonal."""


def gram_flops(t: int, features: int) -> int:
    """Of one Gram matrix of t rows by a kernel in C++, which makes what lies at and below the diagonal."""
    return t * (t + TILE_ROWS) * features


def read_for_norm(elements: int, itemsize: int) -> Work:
    """One pass over elements that were just written."""
    return Work("reduce", flops=2 * elements, bytes=itemsize * elements)
