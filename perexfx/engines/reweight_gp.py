"""Norms by one backward that forms no gradient of a parameter, then another of the losses, weighted.

Promises: one forward; its first backward stops at the layers' outputs and gives their squared norms, layer by layer,
the second goes through the same graph with every example's loss multiplied by its clip factor, and forms what an
ordinary backward forms. The norms are right where a parameter is used more than once, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from perexfx.engines.method import Method, item
from perexfx.engines.problem import Batch, Problem, StepResult, parts_of, refuse_other_joins
from perexfx.ir import Factors, Layout, squared_norms_of
from perexfx.ir.inputs import arguments_for
from perexfx.ir.node import info_of
from perexfx.ir.weighed import squared_norms_by
from perexfx.planning import Plan
from perexfx.runtime import ReceivingTape, Runtime, StepOptions, add_pulled, clip, pull_back, pull_back_each, weighed


class ReweightGP(Method):
    """One forward and two backwards: to the layers' outputs for norms, and of the weighted losses for the sums.

    References: `ReweightGP` of Lee & Kifer 2021, PoPETs 2021(1):128-144, algorithm 1.
    """

    name = "reweight_gp"
    also = "ReweightGP, fast per-example clipping (Lee & Kifer)"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._module: fx.GraphModule | None = None

    def run(self, batch: Batch) -> StepResult:
        """Forward, backward, factors, backward."""
        problem, gm, runtime = self.problem, self.transformed(), self.runtime
        plan, analysis = self.plan_for(batch)
        if self._module is None:
            self._module = fx.GraphModule(gm, without_clip_node(gm.graph))
        tape = TwoPasses(runtime, plan, batch.n, dict(problem.trained))
        token = next(iter(problem.trained.values())).new_zeros(batch.n).requires_grad_()
        given = [tape, token, tape.parameters, *arguments_for(runtime.captured.graph, batch.leaves)]
        output, layouts = self.run_graph(self._module, *given), analysis.layouts_of_output()
        parts = parts_of(output, layouts)
        # leaves in the outputs' places: one may be computed from another, whose gradient is not to have it twice
        leaves = [value.detach().requires_grad_(value.requires_grad) for value, _ in parts]
        left = iter(leaves)
        loss = problem.loss_of(pytree.tree_map_only(Tensor, lambda _: next(left), output), batch.targets)
        if self.is_first:
            problem.refuse_own_gradients(output, batch.targets)
            refuse_other_joins(problem, output, layouts, batch)
        gradients = torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad], allow_unused=True)
        ends = [
            (value, layout, gradient)
            for (value, layout), gradient in zip(
                [part for part in parts if part[0].requires_grad], gradients, strict=True
            )
            if gradient is not None and layout is not None
        ]
        del output, parts, leaves
        torch.autograd.grad([v for v, *_ in ends], token, [g for *_, g in ends], allow_unused=True, retain_graph=True)
        norms = tape.norms()
        factors, lost = problem.factors(norms), ~torch.isfinite(norms)
        tape.begin_sums(lost if bool(lost.any()) else None)
        weighted = [_weighted(g, layout, factors) for _, layout, g in ends]
        torch.autograd.grad([v for v, *_ in ends], token, weighted, allow_unused=True)
        return StepResult(loss.detach(), norms, tape.sums())


def _weighted(gradient: Tensor, layout: Layout, factors: Tensor) -> Tensor:
    """The gradient of the weighted losses: each example's part times its factor, and none of what is dropped."""
    apart = layout.apart(gradient)
    sizes = [1] * apart.dim()
    sizes[layout.axis + 1] = len(factors)
    weights = factors.to(gradient.dtype).reshape(sizes)
    return torch.where(weights == 0, 0, apart * weights).reshape(gradient.shape)


class TwoPasses(ReceivingTape):
    """Takes norms of what sites leave in the first backward, and sums of it in the second."""

    def __init__(self, runtime: Runtime, plan: Plan, n: int, trained: Mapping[str, Tensor]) -> None:
        super().__init__(
            runtime.sites, runtime.settings, StepOptions(), plan, n, results=runtime.results, last=runtime.last
        )
        self.parameters = {name: parameter.detach() for name, parameter in trained.items()}
        self.versions = {name: parameter._version for name, parameter in self.parameters.items()}
        self.activate(frozenset(trained))
        self._plan = plan
        self._strategies = {(d.site, d.operand): _for_norms(d) for d in plan.decisions}
        self._squares: list[Tensor] = []
        self._joined: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] | None = None
        self._lost: Tensor | None = None

    def add(self, site: str, factors: Mapping[str, Factors]) -> None:
        """Their norms, or their sums."""
        if self._sums is None:
            self._add_norms(site, factors)
            return
        for name in self.operands[site]:
            found = factors[name] if self._lost is None else factors[name].without(self._lost)
            ones = torch.ones(self.n, device=next(iter(self.parameters.values())).device)
            add_pulled(self, (site, name), found.weighted_sum(ones), pull_back, self._sums)

    def _add_norms(self, site: str, factors: Mapping[str, Factors]) -> None:
        is_joined = self.sites.is_joined(self.sites.site(site).group, self.active)
        for name in self.operands[site]:
            key = site, name
            if is_joined:
                add_pulled(self, key, factors[name].gradients(), pull_back_each, self._joined)
            else:
                found = weighed(self, key, self.sites.operand(key).expression, factors[name])
                self._squares.append(squared_norms_by(self._strategies[key], found)[0])

    def norms(self) -> Tensor:
        """Of each example, over all that was added. Shape `[B]`."""
        squares = [*self._squares, *(squared_norms_of(value) for value in self._joined.values())]
        like = next(iter(self.parameters.values()))
        total = torch.stack(squares).sum(0) if squares else like.new_zeros(self.n)
        self._squares, self._joined = [], {}
        return total.sqrt() * self.scale

    def begin_sums(self, lost: Tensor | None) -> None:
        """The second backward follows.

        Args:
            lost: Which examples are not finite; None: all are.
        """
        self._sums, self._lost = {}, lost

    def sums(self) -> dict[str, Tensor]:
        """Parameter name -> its clipped sum, or mean."""
        found = self._sums or {}
        return {
            name: found[name].to(p.dtype) if name in found else torch.zeros_like(p)
            for name, p in self.parameters.items()
        }


def _for_norms(decision: Any) -> Any:
    """The fastest strategy that keeps nothing but the factors; what was chosen where there is none."""
    holding = [a for a in decision.alternatives if a.cost is not None and a.cost.holds_factors and not a.is_second_run]
    return min(holding, key=lambda a: a.seconds, default=decision.chosen).strategy


def without_clip_node(graph: fx.Graph) -> fx.Graph:
    """A rewritten graph whose tape, token and parameters are given to it, in front of its own inputs."""
    found = fx.Graph()
    tape, token, parameters = (found.placeholder(name) for name in ("tape", "token", "parameters"))
    new: dict[fx.Node, Any] = {}
    names: Sequence[str] = ()
    for node in graph.nodes:
        role = info_of(node).role
        if role == "tape":
            new[node] = tape
        elif role == "norm":
            new[node] = token
        elif role == "clip":
            if node.target is clip:
                names = node.args[1]
            elif node.op == "call_function":
                at = node.args[1]
                new[node] = token if at == 0 else found.call_function(item, (parameters, names[at - 1]))
        else:
            new[node] = found.node_copy(node, new.__getitem__)
    return found


__all__ = ["ReweightGP"]
