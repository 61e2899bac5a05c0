"""The batch as groups: one call of the grouped convolution's kernel gradient."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from perexfx.ir.convolution import Convolution, ConvolutionSignature
from perexfx.ir.cost import Cost, Work
from perexfx.ir.factors import Factors, Gradient, Signature, squared_norms_of
from perexfx.strategies.costs import finish_kept, fresh_memory, parameter_elements, read_for_norm


@dataclass(frozen=True)
class Grouped:
    """Per-example kernel gradients from ONE call: `[n, C, H, W]` viewed as `[1, n C, H, W]` with n times the groups.

    References: Rochette et al. 2019, arXiv:1912.06015, section 3 (there through a convolution of one dimension more).
    """

    name: str = "grouped"

    def refuses(self, signature: Signature) -> str | None:
        """All but convolutions."""
        return None if isinstance(signature, ConvolutionSignature) else "it is not a convolution"

    def cost(self, signature: Signature, itemsize: int) -> Cost:
        """The flops of the ordinary kernel gradient; n gradients are written, read and kept."""
        assert isinstance(signature, ConvolutionSignature)
        kept = signature.n * parameter_elements(signature)
        work = Work(
            "convolution_weight_grouped",
            signature.weight_gradient_flops,
            itemsize * kept,
            calls=signature.n,
        )
        tail = (
            fresh_memory(kept * itemsize),
            read_for_norm(kept, itemsize),
            finish_kept(signature, itemsize),
        )
        return Cost((work, *tail), kept * itemsize)

    def squared_norms(self, factors: Factors) -> tuple[Tensor, Factors]:
        """Norms of the formed gradients, which are kept."""
        assert isinstance(factors, Convolution)
        gradients = factors.gradients()
        return squared_norms_of(gradients), Gradient(gradients)
