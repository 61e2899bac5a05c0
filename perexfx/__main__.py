"""`python -m perexfx`."""

import sys

from perexfx.cli import main

sys.exit(main())
