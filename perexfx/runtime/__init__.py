"""Runtime: the rewritten graph, and what its nodes do.

In come a captured graph, sites and, at each forward, a plan; out goes a `Transformed` module, whose ordinary backward
fills `.grad` with clipped sums. Open `nodes.py` first: layers, norm nodes and the clip node, whose sums are formed in
`clipped_sums.py`. `rewrite.py` puts them into the graph, `tape.py` is what a forward shares with its backward,
`state.py` what a module knows, `face.py` what users see of it, `cuts.py` and `replay.py` are for second backwards.
"""

from perexfx.runtime.call_checks import check_trains
from perexfx.runtime.clip_factors import AUTOMATIC_STABILITY
from perexfx.runtime.cuts import cut
from perexfx.runtime.face import PerExample, planned, runtime_of, stepping
from perexfx.runtime.memory_formats import in_format
from perexfx.runtime.nodes import clip
from perexfx.runtime.pull_back import add_pulled, pull_back, pull_back_each, weighed
from perexfx.runtime.random_state import random_state_kept
from perexfx.runtime.rewrite import rewrite
from perexfx.runtime.settings import Settings, check_settings
from perexfx.runtime.state import Runtime
from perexfx.runtime.step_options import StepOptions
from perexfx.runtime.tape import ReceivingTape, Results
from perexfx.runtime.transformed import Transformed

__all__ = [
    "AUTOMATIC_STABILITY",
    "PerExample",
    "ReceivingTape",
    "Results",
    "Runtime",
    "Settings",
    "StepOptions",
    "Transformed",
    "add_pulled",
    "check_settings",
    "check_trains",
    "clip",
    "cut",
    "in_format",
    "planned",
    "pull_back",
    "pull_back_each",
    "random_state_kept",
    "rewrite",
    "runtime_of",
    "stepping",
    "weighed",
]
