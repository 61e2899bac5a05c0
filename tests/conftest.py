"""Every test plans by the built-in profile, whatever this machine's user has calibrated."""

from __future__ import annotations

import os
import tempfile

os.environ["PEREXFX_CACHE"] = tempfile.mkdtemp(prefix="perexfx-tests-")
