"""Steps: a whole training step, or a whole backward, as one call.

In come a model or a transformed module, a loss, inputs and targets; out go a static graph of the step (`graph.py`),
a callable that takes steps by the fastest way (`compiled.py`), or per-example norms and gradients (`per_example.py`).
Open `graph.py` first.
"""

from perexfx.steps.compiled import CompiledStep, compile_step
from perexfx.steps.graph import LossFunction, call, checked_loss, functional_step, step_graph, traced
from perexfx.steps.per_example import gradient_gram, per_example_grads, per_example_norms

__all__ = [
    "CompiledStep",
    "LossFunction",
    "call",
    "checked_loss",
    "compile_step",
    "functional_step",
    "gradient_gram",
    "per_example_grads",
    "per_example_norms",
    "step_graph",
    "traced",
]
