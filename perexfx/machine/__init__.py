"""Machine: what work takes on this one.

In come work by kind or the strategies themselves; out go cost models: the profile that is stored for this machine
(`on_disk.py`; `ir/cost_model.py` has the formula and the built-in one), or timings at the real sizes (`timings.py`).
Open `on_disk.py` first; `calibrate.py` makes such a profile, and is loaded only for that.
"""

from perexfx.machine.on_disk import current, processor, save
from perexfx.machine.timings import Measured, measure, random_factors, seconds_of

__all__ = ["Measured", "current", "measure", "processor", "random_factors", "save", "seconds_of"]
