"""The measurements that anyone can repeat: `python -m perexfx bench`.

In come workloads, or layers, or other libraries by name; out go tables, plots and JSON. Open `suite.py` first: a file
for each command, `steps.py`, `measure.py` and `memory.py` for what they measure, `results.py` for what they write.
"""
