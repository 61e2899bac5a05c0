"""Capture: a module's forward as an fx.Graph in functional form.

In comes any `nn.Module`, with example inputs where there are some; out goes `Captured`: a graph of torch's public
functions over `get_attr` parameters, and what it holds for (modes, baked arguments, sizes). What cannot be recorded
faithfully is an error. Open `forward.py` first: it traces (`tracer.py`), and where that fails exports (`export.py`);
`traceable/` has forwards for modules of torch that cannot be traced as they are. Whether a graph holds for a call, and
for the modes of that moment, is checked when it runs (`captured.py`).
"""

from perexfx.capture.captured import Captured, check_call
from perexfx.capture.conditions import Conditions
from perexfx.capture.custom_functions import CustomFunction, gradients_of, nonlinear_in
from perexfx.capture.forward import capture, stop_gradient
from perexfx.capture.functional import IN_PLACE_FUNCTIONS
from perexfx.capture.graph_module import OF_GRAPH_MODULES, CapturedModule, WholeGraphModule, twin_of
from perexfx.capture.leaf import LeafModule
from perexfx.capture.modes import modes_kept, release_norms
from perexfx.capture.places import line_of, reason_of
from perexfx.capture.quiet import quiet
from perexfx.capture.tracer import TRACING, same_einsums

__all__ = [
    "IN_PLACE_FUNCTIONS",
    "OF_GRAPH_MODULES",
    "TRACING",
    "Captured",
    "CapturedModule",
    "Conditions",
    "CustomFunction",
    "LeafModule",
    "WholeGraphModule",
    "capture",
    "check_call",
    "gradients_of",
    "line_of",
    "modes_kept",
    "nonlinear_in",
    "quiet",
    "reason_of",
    "release_norms",
    "same_einsums",
    "stop_gradient",
    "twin_of",
]
