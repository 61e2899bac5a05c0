"""perexfx: clipped per-example gradients at about the cost of an ordinary step, by rewriting PyTorch graphs."""

from perexfx.api import transform
from perexfx.ir.errors import (
    ArgumentError,
    BudgetError,
    CaptureError,
    CoverageError,
    MixingError,
    ModeError,
    PerexError,
    RefusedError,
    ShapeError,
    StrategyError,
)

__all__ = [
    "ArgumentError",
    "BudgetError",
    "CaptureError",
    "CoverageError",
    "MixingError",
    "ModeError",
    "PerexError",
    "RefusedError",
    "ShapeError",
    "StrategyError",
    "transform",
]
__version__ = "0.1.0"
