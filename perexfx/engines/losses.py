"""One forward of the batch, and a backward for each example's loss.

Promises: the forward runs once; each example's loss is that of its own part of the output, and its gradient is clipped
and added as it comes. Where an example is not finite, the others of its batch are run alone: in one graph its values
reach their gradients, multiplied by zero.
"""

from __future__ import annotations

import torch

from perexfx.engines.method import Method
from perexfx.engines.problem import Batch, ClippedSum, StepResult, one_of


class Losses(Method):
    """One forward, and a backward of each example's loss through all of it.

    References: `MultiLoss` of Lee & Kifer 2021, PoPETs 2021(1).
    """

    name = "losses"
    also = "MultiLoss (Lee & Kifer)"

    def run(self, batch: Batch) -> StepResult:
        """One backward for each example."""
        problem, total, losses = self.problem, ClippedSum(self.problem), []
        parameters = list(problem.trained.values())
        _, analysis = self.plan_for(batch)
        output = problem.model(*batch.args, **batch.kwargs)
        layouts = analysis.layouts_of_output()
        for at in range(batch.n):
            loss = problem.loss_of(one_of(output, layouts, at), batch.targets_of(at))
            is_last = at == batch.n - 1
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=not is_last)
            if not total.add(gradients, is_alone=False):  # another's infinity times zero is no number
                alone = problem.loss_of(batch.call(problem.model, at), batch.targets_of(at))
                total.add(torch.autograd.grad(alone, parameters, allow_unused=True))
            losses.append(loss.detach())
        return total.result(losses)


__all__ = ["Losses"]
