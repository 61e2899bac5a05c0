"""As many copies of the model as there are examples, which share their parameters' memory: a rewrite of the graph.

Promises: one graph computes all examples, each by nodes of its own that read parameters of their own; those lie in the
model's memory, so that nothing is copied, and one backward of all losses gives each example's gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from perexfx.engines.method import Method, item
from perexfx.engines.problem import Batch, Problem, StepResult, norm_of
from perexfx.ir.inputs import argument_of


class Copies(Method):
    """B copies of the model in one graph, that share their parameters' memory; one backward.

    References: `multi` of Rochette et al. 2019, arXiv:1912.06015.
    """

    name = "copies"
    also = "multi (Rochette et al.)"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._copies: dict[int, fx.GraphModule] = {}

    def run(self, batch: Batch) -> StepResult:
        """All copies forward, all losses backward."""
        problem, n = self.problem, batch.n
        gm, captured = self.transformed(), self.runtime.captured
        module = self._copies.get(n)
        if module is None:
            self._copies.clear()  # one size at a time: the code of many copies is long
            module = self._copies[n] = fx.GraphModule(gm, copied(captured.graph, n, frozenset(problem.trained)))
        given = [value for at in range(n) for value in _inputs(captured.graph, batch.leaves_of(at))]
        own = [{name: p.detach().requires_grad_() for name, p in problem.trained.items()} for _ in range(n)]
        outputs = self.run_graph(module, own, *given)
        losses = [problem.loss_of(output, batch.targets_of(at)) for at, output in enumerate(outputs)]
        if self.is_first:
            problem.refuse_own_gradients(outputs[0], batch.targets_of(0))
        leaves = [leaf for parameters in own for leaf in parameters.values()]
        found = torch.autograd.grad(torch.stack(losses).sum(), leaves, allow_unused=True)
        return self._clipped(found, [loss.detach() for loss in losses])

    def _clipped(self, found: tuple[Tensor | None, ...], losses: list[Tensor]) -> StepResult:
        problem, n = self.problem, len(losses)
        names = list(problem.trained)
        each = [dict(zip(names, found[at * len(names) : (at + 1) * len(names)], strict=True)) for at in range(n)]
        like = next(iter(problem.trained.values())).detach()
        norms = torch.stack([norm_of([g for g in own.values() if g is not None], like) for own in each])
        factors, share = problem.factors(norms), problem.share(n)
        is_finite = torch.isfinite(norms).tolist()
        grads = {}
        for name, parameter in problem.trained.items():
            total = torch.zeros_like(parameter, requires_grad=False)
            for at, own in enumerate(each):
                if is_finite[at] and (gradient := own[name]) is not None:
                    total.addcmul_(gradient, factors[at].to(gradient.dtype))
            grads[name] = total.mul_(share)
        return StepResult(problem.joined(losses), norms, grads)


def copied(graph: fx.Graph, n: int, trained: frozenset[str]) -> fx.Graph:
    """A graph that computes n examples, each by nodes of its own.

    Its first input is a list of n dicts, from name to parameter; then come the inputs of the first example, of the
    second, and so on. It returns the list of their outputs.

    Args:
        graph: In functional form.
        n: Number of copies.
        trained: Names of the parameters that each copy has of its own.
    """
    found, outputs = fx.Graph(), []
    parameters = found.placeholder("parameters")
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    inputs = [[found.placeholder(f"{node.name}_of_{at}") for node in placeholders] for at in range(n)]
    for at in range(n):
        new: dict[fx.Node, fx.Node] = dict(zip(placeholders, inputs[at], strict=True))
        own = found.call_function(item, (parameters, at))
        for node in graph.nodes:
            if node.op == "output":
                outputs.append(fx.map_arg(node.args[0], new.__getitem__))
            elif node.op == "get_attr" and node.target in trained:
                new[node] = found.call_function(item, (own, node.target))
            elif node not in new:
                new[node] = found.node_copy(node, new.__getitem__)
    found.output(outputs)
    return found


def _inputs(graph: fx.Graph, leaves: Mapping[str, Any]) -> list[Any]:
    """The inputs of one copy; those of `*args` in one tuple, as a copy has one input for them."""
    empty: dict[int, Any] = {1: (), 2: {}}
    found = []
    for node in graph.nodes:
        if node.op == "placeholder":
            value = argument_of(node, leaves)
            found.append(empty.get(str(node.target).count("*")) if value is None else value)
    return found


__all__ = ["Copies", "copied"]
