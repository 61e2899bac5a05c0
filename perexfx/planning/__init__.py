"""Planning: which strategy each site takes, from shapes alone.

In come sites at known sizes, strategies, a cost model and a memory budget; out goes a `Plan`, a plain value. A
strategy's time is predicted by `ir/cost_model.py`, which `candidates.py` asks. Open `make_plan.py` first, then
`plan.py`, what it makes, and `knapsack.py`, which keeps a budget.
"""

from perexfx.planning.candidates import Alternatives
from perexfx.planning.knapsack import Choice, total_bytes
from perexfx.planning.make_plan import check_forced, make_plan
from perexfx.planning.plan import Decision, Plan
from perexfx.planning.reruns import Cut, Rerun, cuts_of, reruns_of
from perexfx.planning.sizes import fit, operand_dtype, with_kernels, with_shared_inputs

__all__ = [
    "Alternatives",
    "Choice",
    "Cut",
    "Decision",
    "Plan",
    "Rerun",
    "check_forced",
    "cuts_of",
    "fit",
    "make_plan",
    "operand_dtype",
    "reruns_of",
    "total_bytes",
    "with_kernels",
    "with_shared_inputs",
]
