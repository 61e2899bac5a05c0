"""`python -m perexfx`."""

import sys

from perexfx.cli import run

sys.exit(run())
