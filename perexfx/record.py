"""Recording: what a graph does at the level of aten, with fake tensors, for one batch size.

Promises: nothing is computed, and the module is left as it is; every aten call is kept with the graph node at work, and
every node with its value. A graph that fails on these shapes is refused, naming the node.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from perexfx.inputs import Inputs
from perexfx.ir.errors import RefusedError
from perexfx.ir.node import place_of
from perexfx.ir.refusal import Refusal
from perexfx.tracer import TRACING


@dataclass(frozen=True)
class Call:
    """One recorded aten call, and the node at work."""

    node: fx.Node
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    def differing_numbers(self, twin: Call) -> set[str]:
        """Names of the arguments whose numbers are others in the other run."""
        ours, theirs = self._by_name(), twin._by_name()
        return {name for name, value in ours.items() if _numbers(value) != _numbers(theirs.get(name))}

    def _by_name(self) -> dict[str, Any]:
        names = [argument.name for argument in self.func._schema.arguments]
        return {**dict(zip(names, self.args, strict=False)), **self.kwargs}


def _numbers(value: Any) -> list[float]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, int | float)]


@dataclass
class Run:
    """One run with fake tensors: every aten call in order, and every node's value.

    Everything is kept alive, so that the `id` of a tensor stays its own.
    """

    n: int
    inputs: dict[str, Any] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    node: fx.Node | None = None


def leaves_of(value: Any) -> list[Tensor]:
    """The tensors in a value."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


class _Recording(TorchDispatchMode):
    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        assert self.run.node is not None
        self.run.calls.append(Call(self.run.node, func, args, kwargs, result))
        return result


class _FakeInterpreter(fx.Interpreter):
    """Runs a graph with fake tensors, noting which node is at work."""

    def __init__(self, module: nn.Module, graph: fx.Graph, fake: FakeTensorMode, run: Run) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.fake, self.run_record = fake, run
        self.converted: dict[int, Tensor] = {}
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        """One node."""
        self.run_record.node = n
        value = super().run_node(n)
        self.run_record.values[n.name] = value
        return value

    def fetch_attr(self, target: str) -> Any:
        """Parameters and buffers as fake tensors, each always the same one."""
        value = super().fetch_attr(target)
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self.converted:
            self.converted[id(value)] = self.fake.from_tensor(value.detach(), static_shapes=True)
        return self.converted[id(value)]


def record(graph: fx.Graph, module: nn.Module, inputs: Inputs, batch_dim: int, n: int) -> Run:
    """Runs a graph for a batch of n.

    Args:
        graph: In functional form.
        module: Holds the parameters, buffers and parameter-free modules that the graph names.
        inputs: The kind of input.
        batch_dim: The example axis of the inputs.
        n: Number of examples.

    Raises:
        RefusedError: A node fails on these shapes.
    """
    run = Run(n)
    values = run.inputs
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    rows = zip(inputs.names, inputs.shapes, inputs.dtypes, inputs.devices, inputs.carriers, strict=True)
    with fake, torch.no_grad():
        for name, shape, dtype, device, carries in rows:
            size = (*shape[:batch_dim], n, *shape[batch_dim + 1 :]) if carries else shape
            values[name] = torch.empty(size, dtype=dtype, device=device)
        interpreter = _FakeInterpreter(module, graph, fake, run)
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        arguments = [values.get(p.target, p.args[0] if p.args else None) for p in placeholders]
        torch_log = logging.getLogger("torch._subclasses.fake_tensor")
        level = torch_log.level
        torch_log.setLevel(logging.CRITICAL)
        try:
            with TRACING, _Recording(run), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the real run gives them too
                interpreter.run(*arguments)
        except Exception as error:
            assert run.node is not None
            raise RefusedError([_failed(run.node, n, error)]) from error
        finally:
            torch_log.setLevel(level)
    return run


def _failed(node: fx.Node, n: int, error: Exception) -> Refusal:
    place = place_of(node)
    reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
    return Refusal(
        what=f"{place} fails when its shapes are worked out for a batch of {n}: {reason}.",
        why="Either the inputs do not fit the model, or the graph does not hold for every batch size and every value.",
        remedy="Give sizes that follow the input's (`x.shape[0]`, or -1), and avoid `.item()`, `nonzero` and masks "
        "that select.",
        place=place,
    )
