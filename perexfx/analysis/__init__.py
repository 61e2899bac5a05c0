"""Analysis: which values carry examples, and on which axis.

In come a captured graph and the kind of its inputs; out goes an `Analysis`: for every node where its examples are, or
a refusal of what mixes them. Open `analyze.py` first: the graph runs with fake tensors (`fake_run.py`), and every aten
call is followed (`follow.py`) by the rules of `axes/`: a reshape is judged in `axes/moves.py`.
"""

from perexfx.analysis.analyze import Analysis, analyze
from perexfx.analysis.failures import without_numbers
from perexfx.analysis.fake_run import Call, FakeInterpreter, fake_inputs, leaves_of, record
from perexfx.analysis.in_place_writes import written_by

__all__ = [
    "Analysis",
    "Call",
    "FakeInterpreter",
    "analyze",
    "fake_inputs",
    "leaves_of",
    "record",
    "without_numbers",
    "written_by",
]
