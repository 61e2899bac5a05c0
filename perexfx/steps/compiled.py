"""A training step by the fastest way there is: eager, as one static graph, or that graph compiled.

Promises: every call leaves loss, norms, factors and `.grad` as an eager step does, to rounding. For each kind of batch
the ways are tried on the first batch: one that fails, or whose norms or gradients differ from the eager step's, is
dropped and the log says why; of the others the fastest is kept.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from perexfx.ir.errors import CaptureError
from perexfx.ir.inputs import bind_inputs, by_name, named_leaves
from perexfx.runtime import Transformed, random_state_kept, runtime_of
from perexfx.steps.graph import LossFunction, Step, call, functional_step, traced

_logger = logging.getLogger("perexfx")

COMPILED_NODES = 800
"""Graphs of more nodes are not compiled: it takes minutes, and what is left to gain is small beside large layers."""
KINDS = 8
"""Kinds of batches that ways are tried for; others run eagerly: Poisson sampling makes a size for every batch."""
TRIES = 7


class CompiledStep:
    """`step(x, y) -> loss`: forward, loss, backward, clipping, and the optimizer's step where there is one.

    Attributes:
        ways: Kind of batch -> "eager", "graph", "compiled" or, on a GPU, "cuda graph".
    """

    def __init__(self, gm: Transformed, loss_fn: LossFunction, optimizer: torch.optim.Optimizer | None) -> None:
        self.gm, self.loss_fn, self.optimizer = gm, loss_fn, optimizer
        self.ways: dict[Any, str] = {}
        self._runs: dict[Any, Step | None] = {}
        self._modules = list(gm.modules())
        self._step = functional_step(gm, loss_fn)

    def __call__(self, x: Any, y: Any) -> Tensor:
        """One step on one batch. Returns: its loss, without a graph.

        Args:
            x: A tensor, a tuple of positional inputs, or a dict of keyword inputs.
            y: Targets, passed to the loss function.
        """
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        params, buffers = dict(self.gm.named_parameters()), dict(self.gm.named_buffers())
        kind = self._kind(params, x, y)
        if kind not in self._runs:
            ways = self._ways(x, y) if len(self._runs) < KINDS else {"eager": self._step}
            self.ways[kind] = self._fastest(ways, x, y)
            self._runs[kind] = None if self.ways[kind] == "eager" else ways[self.ways[kind]]
        run = self._runs[kind]
        if run is None:
            loss = self.loss_fn(call(self.gm, x), y)
            loss.backward()
            loss = loss.detach()
        else:
            with torch.no_grad():
                given = {name: parameter.detach() for name, parameter in params.items()}
                loss, norms, factors, gradients = run(given, buffers, x, y)
            runtime_of(self.gm).results.leave(norms, factors)
            _accumulate({params[name]: gradient for name, gradient in gradients.items() if gradient is not None})
        if self.optimizer is not None:
            self.optimizer.step()
        return loss

    def _kind(self, params: Mapping[str, Tensor], x: Any, y: Any) -> Any:
        """All that a graph holds for."""
        leaves, spec = pytree.tree_flatten((x, y))
        sizes = tuple((v.shape, v.dtype, v.device) if isinstance(v, Tensor) else v for v in leaves)
        of_parameters = tuple((p.requires_grad, p.dtype, p.device) for p in params.values())
        autocast = tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))  # which eager steps refuse
        return spec, sizes, of_parameters, autocast, tuple(module.training for module in self._modules)

    def _ways(self, x: Any, y: Any) -> dict[str, Step]:
        """The ways that find for one batch what the eager step finds, by name."""
        ways: dict[str, Step] = {"eager": self._step}
        expected = self._tried(self._step, x, y)
        for name, way in self._candidates(x, y).items():
            found = self._attempt(name, way, x, y)
            if found is None:
                continue
            if difference := _difference(expected, found):
                _logger.warning("The step as %s differs from the eager one, and is not used: %s", name, difference)
            else:
                ways[name] = way
        return ways

    def _candidates(self, x: Any, y: Any) -> dict[str, Step]:
        """The ways beside the eager one that there are for a batch, by name."""
        runtime = runtime_of(self.gm)
        plan = runtime.plans.get(runtime.kind_of(named_leaves(by_name(bind_inputs(self.gm, x, "x")))))
        if runtime.settings.memory_budget is not None and plan is not None and plan.reruns:
            _logger.info("The step stays eager: a graph has no second backward, which the memory budget asks for.")
            return {}
        try:
            graph = traced(self.gm, self._step, x, y)
        except CaptureError as error:
            _logger.info("The step stays eager: %s", error)
            return {}
        candidates: dict[str, Step] = {"graph": graph}
        if len(graph.graph.nodes) <= COMPILED_NODES:
            options: dict[str, str | int | bool | Callable[..., Any]] = {"fallback_random": True}
            candidates["compiled"] = torch.compile(graph, fullgraph=True, dynamic=False, options=options)
            if all(parameter.device.type == "cuda" for parameter in self.gm.parameters()):
                replays = {**options, "triton.cudagraphs": True}
                replayed = torch.compile(graph, fullgraph=True, dynamic=False, options=replays)
                candidates["cuda graph"] = _with_results_of_their_own(replayed)
        return candidates

    def _fastest(self, ways: Mapping[str, Step], x: Any, y: Any) -> str:
        """The name of the way that takes least."""
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(TRIES if len(ways) > 1 else 0):
            for name, way in ways.items():
                start = time.perf_counter()
                self._tried(way, x, y)
                taken[name].append(time.perf_counter() - start)
        return min(taken, key=lambda name: statistics.median(taken[name] or [0.0]))

    def _attempt(self, name: str, way: Step, x: Any, y: Any) -> Any:
        """What a way finds; None, and a warning, where it fails."""
        try:
            return self._tried(way, x, y)
        except Exception as error:  # a compiler may fail in any way
            _logger.warning("The step as %s fails, and is not used: %s", name, error)
            return None

    def _tried(self, way: Step, x: Any, y: Any) -> Any:
        """What a way finds; random numbers, buffers and what the module remembers are as before."""
        params = {name: parameter.detach() for name, parameter in self.gm.named_parameters()}
        buffers = {name: buffer.clone() for name, buffer in self.gm.named_buffers()}
        devices = {parameter.device for parameter in params.values()}
        with random_state_kept(devices), torch.no_grad(), runtime_of(self.gm).results_kept():
            found = way(params, buffers, x, y)
            for device in devices:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
        return found


def _with_results_of_their_own(way: Step) -> Step:
    """A way whose results are not overwritten by its next run, as those of a CUDA graph are."""

    def step(params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], x: Any, y: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return pytree.tree_map_only(Tensor, torch.clone, way(params, buffers, x, y))

    return step


def _accumulate(gradients: Mapping[Tensor, Tensor]) -> None:
    """As autograd does: into what is there, else as memory of its own in the parameter's layout.

    A compiler may return one tensor for gradients that are equal.
    """
    taken: set[int] = set()
    for parameter, gradient in gradients.items():
        if parameter.grad is not None:
            parameter.grad.add_(gradient)
            continue
        memory = gradient.untyped_storage()._cdata
        is_own = memory not in taken and gradient.stride() == parameter.stride()
        parameter.grad = gradient if is_own else torch.empty_like(parameter).copy_(gradient)
        taken.add(memory)


def _difference(expected: Any, found: Any) -> str:
    """By how much norms or gradients differ, beyond rounding; "" where they do not."""
    _, norms, factors, gradients = expected
    _, found_norms, found_factors, found_gradients = found
    pairs = {"norms": (norms, found_norms), "factors": (factors, found_factors)}
    pairs |= {name: (value, found_gradients[name]) for name, value in gradients.items() if value is not None}
    for name, (a, b) in pairs.items():
        tolerance = max(1e-9, 1e3 * torch.finfo(a.dtype).eps)
        finite = torch.isfinite(a)
        scale = a[finite].abs().amax() if bool(finite.any()) else a.new_zeros(())
        if not torch.equal(finite, torch.isfinite(b)):
            return f"`{name}` is finite in other places"
        error = (a - b)[finite].abs().amax() if bool(finite.any()) else a.new_zeros(())
        if error > tolerance * scale:
            return f"`{name}` by {float(error):.1e}, its largest entry being {float(scale):.1e}"
    return ""


def compile_step(
    gm: Transformed, loss_fn: LossFunction, optimizer: torch.optim.Optimizer | None = None
) -> CompiledStep:
    """A callable `step(x, y) -> loss` that takes whole training steps, by the fastest way there is.

    Without an optimizer it adds to `.grad`, as `loss_fn(gm(x), y).backward()` does; with one it also forgets the
    gradients first and steps at the end. `gm.perexfx` has norms and factors as ever. The first batch of each kind
    (shapes, modes, what is trainable) takes longer: the step is made a graph and compiled where that may pay (a C++
    compiler is needed on a CPU), each is compared with the eager step, and timed; see `step.ways` for what was taken.
    Hooks on parameters or modules, and DistributedDataParallel, need
    eager steps.

    Args:
        gm: From `perexfx.transform`.
        loss_fn: `(gm(x), y) -> scalar`.
        optimizer: Of the module's parameters, or None.

    Raises:
        ArgumentError: `gm` is not transformed.
    """
    return CompiledStep(gm, loss_fn, optimizer)


__all__ = ["CompiledStep", "compile_step"]
