"""One example at a time: the method that all others are held against.

Promises: a forward and a backward of the model for each example, whose gradient is clipped and added as it comes; no
more than one example's gradients are held.
"""

from __future__ import annotations

import torch

from perexfx.engines.method import Method
from perexfx.engines.problem import Batch, ClippedSum, StepResult


class OneByOne(Method):
    """A forward and a backward for each example.

    References: `naive` of Rochette et al. 2019, arXiv:1912.06015; `nxBP` of Lee & Kifer 2021, PoPETs 2021(1).
    """

    name = "one_by_one"
    also = "naive (Rochette et al.), nxBP (Lee & Kifer)"

    def run(self, batch: Batch) -> StepResult:
        """Example by example."""
        problem, total, losses = self.problem, ClippedSum(self.problem), []
        parameters = list(problem.trained.values())
        for at in range(batch.n):
            loss = problem.loss_of(batch.call(problem.model, at), batch.targets_of(at))
            total.add(torch.autograd.grad(loss, parameters, allow_unused=True))
            losses.append(loss.detach())
        return total.result(losses)


__all__ = ["OneByOne"]
