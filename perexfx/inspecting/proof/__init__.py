"""Proof: that nothing of an example reaches `.grad` unclipped, whatever the numbers and the loss.

In comes a transformed module with a plan; out goes a `Proof`, or the path that breaks it. Open `verify.py` first:
the claims; `dataflow.py` makes the graph that they are about, and `linear_operations.py` knows the operations.
"""

from perexfx.inspecting.proof.verify import Proof, verify

__all__ = ["Proof", "verify"]
