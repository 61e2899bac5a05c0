"""The nouns of the compiler: frozen values that the passes hand to each other.

What is named here is what a layer rule or a strategy of one's own needs, beside `perexfx.Rule` and `perexfx.Strategy`;
docs/extending.md shows whole ones. Open `site.py` first, then `factors.py`.
"""

from perexfx.ir.convolution import Convolution, ConvolutionSignature
from perexfx.ir.cost import Cost, Work
from perexfx.ir.factors import (
    Factors,
    Gradient,
    GradientSignature,
    Product,
    ProductSignature,
    Rows,
    RowsSignature,
    Signature,
)
from perexfx.ir.layout import Layout
from perexfx.ir.norms import squared_norms_of
from perexfx.ir.rule import Arguments, Backward, Geometry, Rule
from perexfx.ir.shared_costs import held_factors, kept_gradients
from perexfx.ir.strategy import Strategy

__all__ = [
    "Arguments",
    "Backward",
    "Convolution",
    "ConvolutionSignature",
    "Cost",
    "Factors",
    "Geometry",
    "Gradient",
    "GradientSignature",
    "Layout",
    "Product",
    "ProductSignature",
    "Rows",
    "RowsSignature",
    "Rule",
    "Signature",
    "Strategy",
    "Work",
    "held_factors",
    "kept_gradients",
    "squared_norms_of",
]
