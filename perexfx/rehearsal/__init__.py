"""Rehearsal: what a step holds in memory at every moment, foreseen with fake tensors.

In come a transformed module and a plan; out goes by how many bytes the peak of a step grows, for every choice of
strategies. Open `dry_run.py` first, which runs the step; `peak.py` tells the peak of any choice from its `timeline.py`,
and `library_memory.py` knows what torch's libraries hold in no tensor.
"""

from perexfx.rehearsal.dry_run import Rehearsed

__all__ = ["Rehearsed"]
