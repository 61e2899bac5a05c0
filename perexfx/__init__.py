"""perexfx: clipped per-example gradients at about the cost of an ordinary step, by rewriting PyTorch graphs."""

from perexfx import engines, schedules
from perexfx.api import transform
from perexfx.inspecting.check import check
from perexfx.inspecting.profile import profile
from perexfx.inspecting.proof import verify
from perexfx.ir.errors import (
    ArgumentError,
    BudgetError,
    CaptureError,
    CoverageError,
    ExportError,
    MixingError,
    ModeError,
    PerexError,
    ProofError,
    RefusedError,
    ShapeError,
    StrategyError,
)
from perexfx.ir.rule import Rule
from perexfx.ir.strategy import Strategy
from perexfx.passes.replace_batchnorm import replace_batchnorm
from perexfx.rewrites import downsample, guide_logits, interleave, parallel_columns
from perexfx.steps import compile_step, gradient_gram, per_example_grads, per_example_norms, step_graph
from perexfx.views.onnx import export_onnx
from perexfx.views.report import report
from perexfx.views.visualize import visualize

__all__ = [
    "ArgumentError",
    "BudgetError",
    "CaptureError",
    "CoverageError",
    "ExportError",
    "MixingError",
    "ModeError",
    "PerexError",
    "ProofError",
    "RefusedError",
    "Rule",
    "ShapeError",
    "Strategy",
    "StrategyError",
    "check",
    "compile_step",
    "downsample",
    "engines",
    "export_onnx",
    "gradient_gram",
    "guide_logits",
    "interleave",
    "parallel_columns",
    "per_example_grads",
    "per_example_norms",
    "profile",
    "replace_batchnorm",
    "report",
    "schedules",
    "step_graph",
    "transform",
    "verify",
    "visualize",
]
__version__ = "0.1.0"
