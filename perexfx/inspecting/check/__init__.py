"""Check: a transformed module against one example at a time.

In come a transformed module and inputs; out goes a `CheckResult`. Open `pipeline.py` first: the reference
(`reference.py`), the two forwards (`forwards.py`), what is compared (`compare.py`), and whether examples mix
(`mixing.py`).
"""

from perexfx.inspecting.check.pipeline import check
from perexfx.inspecting.check.result import CheckResult

__all__ = ["CheckResult", "check"]
