"""Inspecting: what one may ask of a transformed module.

In comes a transformed module, with inputs or after a step; out go values that print: whether it agrees with one example
at a time (`check/`), that nothing goes around the clip node (`proof/`), what its steps take (`profile.py`). Open
`check/pipeline.py` first.
"""
