"""Tests, laid out like the package: `tests/WING/test_NAME.py` tests `perexfx/WING/NAME.py`, or the folder NAME."""
