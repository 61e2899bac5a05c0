"""What the papers' whole-model methods have in common: when they may run, and on what.

Promises: a method sees one batch at a time, with every example apart; models that mix examples, and whatever else
`perexfx.transform` refuses, are refused before anything is computed, and so is a model that is another than at the
first batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from perexfx.analysis import Analysis
from perexfx.api import transform
from perexfx.capture import check_call
from perexfx.engines.problem import Batch, Problem, StepResult
from perexfx.ir.errors import ModeError
from perexfx.ir.inputs import GivenInputs, Inputs, bind_inputs, by_name, named_leaves
from perexfx.planning import Plan
from perexfx.runtime import Runtime, Transformed, check_trains, runtime_of


@dataclass(frozen=True)
class Parts:
    """What a model was made of when its graph was captured.

    Attributes:
        modules: The modules of the model, and those of the transformed one that stand for them.
        tensors: Parameter name -> the parameter, and whether it is trained.
    """

    modules: Mapping[str, tuple[nn.Module, nn.Module]]
    tensors: Mapping[str, tuple[nn.Parameter, bool]]

    @classmethod
    def of(cls, model: nn.Module, gm: nn.Module) -> Parts:
        """Of a model, and what it was transformed to."""
        modules = {path: (module, gm.get_submodule(path)) for path, module in model.named_modules()}
        return cls(modules, {name: (p, p.requires_grad) for name, p in model.named_parameters()})

    def check(self, model: nn.Module) -> None:
        """Puts the transformed module in the modes of the model's.

        Raises:
            ModeError: A part of the model is another one now.
        """
        now = dict(model.named_modules())
        changed = [path for path, (own, _) in self.modules.items() if now.get(path) is not own] or sorted(
            now.keys() - self.modules.keys()
        )
        tensors = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
        if not changed:
            changed = [
                name
                for name in {**self.tensors, **tensors}
                if name not in self.tensors
                or name not in tensors
                or tensors[name][0] is not self.tensors[name][0]
                or tensors[name][1] != self.tensors[name][1]
            ]
        if changed:
            raise ModeError(
                f"`{changed[0]}` of the model was replaced, frozen or unfrozen since the first batch, for which the "
                "model was captured. Make a new step."
            )
        for own, twin in self.modules.values():
            twin.training = own.training


class Method(ABC):
    """One whole-model method, on one model.

    Attributes:
        name: Of the method.
        also: What the papers call it.
        problem: What it is to do.
        is_first: Whether the first batch is at hand: what holds for all is checked on it.
    """

    name: ClassVar[str]
    also: ClassVar[str]

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._transformed: Transformed | None = None
        self._parts: Parts | None = None
        self.is_first = True

    @abstractmethod
    def run(self, batch: Batch) -> StepResult:
        """One step on a batch of one example at least."""

    def __call__(self, x: GivenInputs, y: Any) -> StepResult:
        """One step."""
        with torch.inference_mode(False), torch.enable_grad():
            batch = self._batch(x, y)
            if batch.n == 0:
                return self._of_nothing()
            found = self.run(batch)
            self.is_first = False
            return found

    def transformed(self, x: GivenInputs | None = None) -> Transformed:
        """The model as `perexfx.transform` has it: its captured graph, and what is known of it."""
        if self._transformed is None:
            problem = self.problem
            self._transformed = transform(
                problem.model,
                x,
                clip_norm=problem.clip_norm,
                loss_reduction=problem.loss_reduction,
                batch_dim=problem.batch_dim,
            )
        return self._transformed

    @property
    def runtime(self) -> Runtime:
        """What is known of the transformed model."""
        return runtime_of(self.transformed())

    def plan_for(self, batch: Batch) -> tuple[Plan, Analysis]:
        """The plan and the analysis for a batch."""
        kind, n = self._kind_of(batch.arguments)
        plan = self.runtime.plans.get((kind, n)) or self.runtime.prepare(kind, n)
        analysis = self.runtime.known(kind)
        assert analysis is not None
        return plan, analysis

    def _kind_of(self, arguments: Mapping[str, Any]) -> tuple[Inputs, int]:
        return self.runtime.kind_of(named_leaves(arguments))

    def _batch(self, x: GivenInputs, y: Any) -> Batch:
        gm = self.transformed(x)
        if self._parts is None:
            self._parts = Parts.of(self.problem.model, gm)
        self._parts.check(self.problem.model)
        arguments = by_name(bind_inputs(gm, x, "x"))
        check_call(self.runtime.captured, gm, named_leaves(arguments))
        check_trains(gm, self.runtime.frozen)
        kind, n = self._kind_of(arguments)
        if kind not in {known for known, _ in self.runtime.plans}:
            self.runtime.prepare(kind, n)  # refuses what mixes at these shapes
        args, kwargs = ((), x) if isinstance(x, Mapping) else (x if isinstance(x, tuple) else (x,), {})
        return Batch(args, kwargs, arguments, y, n, kind.carrying, self.problem.batch_dim)

    def run_graph(self, module: fx.GraphModule, *given: Any) -> Any:
        """A graph of the method's own, in the mode that the model is in."""
        module.training = self.transformed().training
        return module(*given)

    def _of_nothing(self) -> StepResult:
        """A step without examples, as Poisson sampling makes some."""
        trained = self.problem.trained
        any_of_them = next(iter(trained.values()))
        zeros = {name: torch.zeros_like(p, requires_grad=False) for name, p in trained.items()}
        return StepResult(any_of_them.new_zeros(()).detach(), any_of_them.new_zeros(0).detach(), zeros)


def item(container: Any, key: Any) -> Any:
    """What graphs of methods take from a dict or a list."""
    return container[key]


__all__ = ["Method", "Parts", "item"]
