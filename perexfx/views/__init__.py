"""Views: what was decided, to read, to look at, to run elsewhere; read-only.

In comes a transformed module; out go reports (`report.py`, `sweep.py`), drawings (`visualize.py`) and ONNX (`onnx/`).
Open `decisions.py` first, which turns a plan into the values that reports show, or `drawing.py` for graphs.
"""
