"""Engines: the papers' whole-model methods to clipped per-example gradients, for comparison and as oracles.

In come a model, a loss, inputs and targets; out go loss, norms and clipped sums (`StepResult`), or a step that trains
(`NAME.step`). Open `method.py` first, which has what the methods share, then `one_by_one.py` (naive, nxBP): a file for
each, `copies.py` (multi), `chain_rule.py` (crb), `losses.py` (MultiLoss), `reweight_gp.py` (ReweightGP).
"""

from perexfx.engines.chain_rule import ChainRule
from perexfx.engines.copies import Copies
from perexfx.engines.engine import Engine, EngineStep
from perexfx.engines.losses import Losses
from perexfx.engines.one_by_one import OneByOne
from perexfx.engines.problem import StepResult
from perexfx.engines.reweight_gp import ReweightGP
from perexfx.ir.errors import ArgumentError

one_by_one = Engine(OneByOne)
copies = Engine(Copies)
chain_rule = Engine(ChainRule)
losses = Engine(Losses)
reweight_gp = Engine(ReweightGP)

ENGINES: tuple[Engine, ...] = (one_by_one, copies, chain_rule, losses, reweight_gp)
"""All of them: three of Rochette et al. 2019, and two more of Lee & Kifer 2021."""


def by_name(name: str) -> Engine:
    """The engine of a name. Raises: ArgumentError, where there is none."""
    for engine in ENGINES:
        if engine.name == name:
            return engine
    known = ", ".join(f"{engine.name} ({engine.also})" for engine in ENGINES)
    raise ArgumentError(f"There is no engine {name!r}. The engines are {known}.")


__all__ = [
    "ENGINES",
    "Engine",
    "EngineStep",
    "StepResult",
    "by_name",
    "chain_rule",
    "copies",
    "losses",
    "one_by_one",
    "reweight_gp",
]
