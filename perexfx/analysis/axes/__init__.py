"""How tensor operations treat the example axis, at the level of aten: one rule per operation, or a probe.

In come a call and its arguments' layouts (`call.py`); out go the layouts of its results, or why it mixes examples.
Open `table.py` first: from rules to operations. `moves.py` has those that only move elements, a reshape among them,
`along.py` those that work along some axes, `products.py` products, `indexing.py` look-ups, `elementwise.py` the rest;
`propagate.py` asks the rule or, where there is none, the probe (`probe.py`).
"""
