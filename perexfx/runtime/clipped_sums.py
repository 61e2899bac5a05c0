"""Clipped sums: what the clip node makes of what the sites have left on the tape.

Promises: each parameter's clipped sum is formed once, from what its sites hold, with the factors that the norms of all
of them give; examples that are not finite are left out by selection.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from perexfx.ir.factors import Factors
from perexfx.kernels.watched import is_watched
from perexfx.runtime.clip_factors import clip_factors_of
from perexfx.runtime.pull_back import add_pulled, pull_back, pull_back_each
from perexfx.runtime.replay import sums_again
from perexfx.runtime.small_gradients import together
from perexfx.runtime.tape import Tape

_logger = logging.getLogger("perexfx")


def clipped_sums(tape: Tape, total: Tensor | None) -> dict[str, Tensor]:
    """Each parameter's clipped sum, by name; norms and clip factors go to the tape's results.

    Args:
        tape: Of the forward; every site has left on it what it holds.
        total: Squared norms of the examples, shape `[B]`, without those of what waited; None: all waited.
    """
    waited = together(tape.waiting)
    tape.waiting = {}
    for small in waited:
        total = small.squared_norms() if total is None else total + small.squared_norms()
    assert total is not None
    norms = total.sqrt() * tape.scale
    lost = ~torch.isfinite(norms)
    is_traced = is_watched()  # a graph has no branches: it selects in any case
    drops = is_traced or bool(lost.any())
    if drops and not is_traced:
        _logger.warning(
            "%d of %d examples have gradients that are not finite; they count as zero.",
            int(lost.sum()),
            tape.n,
        )
    factors = clip_factors_of(tape, norms, lost)
    rows = list(factors.values())
    tape.results.leave(norms, torch.stack(rows) if tape.settings.clipping == "per_layer" else rows[0])
    if tape.options.gradients_to is not None:
        tape.options.gradients_to(_per_example_gradients(tape))

    def weighted_sum(group: str, held: Factors) -> Tensor:
        return (held.without(lost) if drops else held).weighted_sum(factors[group])

    sums: dict[str, Tensor] = {}
    for key in list(tape.held):
        held = tape.held.pop(key)
        if key in tape.reweighted:
            continue
        site = tape.sites.site(key[0]) if key[0] else tape.sites.first_user(key[1])
        add_pulled(tape, key, weighted_sum(site.group, held), pull_back, sums)
        del held
    for small in waited:
        for key, value in (small.without(lost) if drops else small).weighted_sums(rows[0]):
            add_pulled(tape, key, value, pull_back, sums)
    assert tape.plan is not None
    for rerun in tape.plan.reruns if tape.reweighted else ():  # when nothing else is held any more
        if tape.reweighted.isdisjoint(rerun.keys):
            continue
        with tape.options.around_rerun(rerun):
            found = sums_again(tape, rerun, weighted_sum, lost)
        for key, value in found.items():
            add_pulled(tape, key, value, pull_back, sums)
    return {name: value.to(tape.parameters[name].dtype) for name, value in sums.items()}


def _per_example_gradients(tape: Tape) -> dict[str, Tensor]:
    """Of each example's own loss, by parameter."""
    each: dict[str, Tensor] = {}
    for key, held in tape.held.items():
        add_pulled(tape, key, held.gradients() * tape.scale, pull_back_each, each)
    return each


__all__ = ["clipped_sums"]
