"""Strategies: exact ways to get per-example squared norms and what the clipped sum is made of.

(The sum itself is formed when all norms are in, in runtime/clipped_sums.py.)

Adding one is one file here, one entry in `STRATEGIES`, and nothing else: every test of exactness runs over the table.
Open `outer.py` first, the smallest; what a strategy is, `perexfx.Strategy`, is in ir/strategy.py.
"""

from perexfx.ir.strategy import Strategy
from perexfx.strategies.direct import Direct
from perexfx.strategies.gram import Gram
from perexfx.strategies.gram_shift import GramShift
from perexfx.strategies.grouped import Grouped
from perexfx.strategies.loop import Loop
from perexfx.strategies.materialize import Materialize
from perexfx.strategies.outer import Outer
from perexfx.strategies.reweight import Reweight

STRATEGIES: tuple[Strategy, ...] = (
    Outer(),
    Materialize(keep=True),
    Materialize(keep=False),
    Gram(),
    Direct(keep=True),
    Direct(keep=False),
    Grouped(),
    Loop(keep=True),
    Loop(keep=False),
    GramShift(),
)
"""In the order in which ties between equal costs are decided. `Reweight` goes for whole segments of a graph, and so is
the planner's to offer."""

__all__ = ["STRATEGIES", "Direct", "Gram", "GramShift", "Grouped", "Loop", "Materialize", "Outer", "Reweight"]
