"""Norms of an outer product: the product of the norms."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from perexfx.ir.cost import Cost, Work
from perexfx.ir.factors import Factors, Product, ProductSignature, Signature
from perexfx.ir.norms import squared_norms_of
from perexfx.ir.shared_costs import held_factors


@dataclass(frozen=True)
class Outer:
    """`||x_i g_i^T||^2 = ||x_i||^2 ||g_i||^2` where only one position is summed.

    References: Goodfellow 2015, arXiv:1510.01799.
    """

    name: str = "outer"

    def refuses(self, signature: Signature) -> str | None:
        """Unless the gradient is one outer product per example."""
        if not isinstance(signature, ProductSignature):
            return "its gradient is not a matrix product"
        if signature.t != 1 or signature.g != 1:
            groups = f" and {signature.g} groups" if signature.g != 1 else ""
            return f"its gradient is a sum over {signature.t} positions{groups}, not one outer product"
        return None

    def cost(self, signature: Signature, itemsize: int) -> Cost:
        """One read of both factors, and one product after the clip node."""
        held = signature.held_elements * itemsize
        norms = Work("reduce", flops=2 * signature.held_elements, bytes=held, calls=2)
        return held_factors(signature, itemsize, (norms,))

    def squared_norms(self, factors: Factors) -> tuple[Tensor, Factors]:
        """Exact; nothing is formed."""
        assert isinstance(factors, Product)
        return squared_norms_of(factors.left) * squared_norms_of(factors.right), factors
