"""Recording: what a graph does at the level of aten, with fake tensors, for one batch size.

Promises: nothing is computed, and the module is left as it is; every aten call is kept with the graph node at work, and
every node with its value. A graph that fails on these shapes is refused, naming the node.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
)
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from perexfx.analysis.failures import failed, not_linear
from perexfx.capture import TRACING, CustomFunction, gradients_of, nonlinear_in, same_einsums
from perexfx.ir.errors import RefusedError
from perexfx.ir.inputs import Inputs, arguments_for
from perexfx.ir.schemas import arguments_by_name


@dataclass(frozen=True)
class Call:
    """One recorded aten call, and the node at work."""

    node: fx.Node
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    @cached_property
    def given(self) -> list[Tensor]:
        """The tensors among its arguments."""
        return leaves_of((self.args, self.kwargs))

    @cached_property
    def results(self) -> list[Tensor]:
        """The tensors that it returned."""
        return leaves_of(self.result)

    def differing_numbers(self, twin: Call) -> set[str]:
        """Names of the arguments whose numbers are others in the other run."""
        ours, theirs = self.named_arguments(), twin.named_arguments()
        pairs = {
            name: (numbers_of(value), numbers_of(theirs.get(name)))
            for name, value in ours.items()
            if not isinstance(value, FakeTensor)
        }
        shown = {name: (repr(own), repr(other)) for name, (own, other) in pairs.items() if own or other}
        return {name for name, (own, other) in shown.items() if own != other}  # as text, where NaN equals itself

    def named_arguments(self) -> dict[str, Any]:
        """Its arguments by their names in the operation's schema."""
        return arguments_by_name(self.func, self.args, self.kwargs)


def leaves(value: Any) -> list[Any]:
    """The leaves of a value: of containers, and of dataclasses whether torch knows them or not."""
    if value is None or isinstance(value, Tensor | int | float | str):  # most are; the general way is slow
        return [value]
    if type(value) in (list, tuple):
        return [leaf for part in value for leaf in leaves(part)]
    found = []
    for leaf in pytree.tree_leaves(value):
        if is_dataclass(leaf) and not isinstance(leaf, type):
            found += leaves([getattr(leaf, each.name) for each in fields(leaf)])
        else:
            found.append(leaf)
    return found


def leaves_of(value: Any) -> list[Tensor]:
    """The tensors in a value."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]


def numbers_of(value: Any) -> list[float]:
    """The numbers in a value, those in tensors that were made of numbers included."""
    found: list[float] = []
    for leaf in leaves(value):
        if isinstance(leaf, int | float):
            found.append(leaf)
        elif isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor):
            found += leaf.flatten().tolist()
    return found


@dataclass
class Run:
    """One run with fake tensors: every aten call in order, and every node's value.

    Everything is kept alive, so that the `id` of a tensor stays its own.

    Attributes:
        n: Number of examples.
        inputs: The tensors among the graph's inputs, by name.
        calls: The aten calls, in order.
        values: Each node's value, by name.
        reshaped: Nodes whose value was given another shape in place, and the node that did so.
        node: The node at work.
    """

    n: int
    inputs: dict[str, Any] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    reshaped: dict[str, fx.Node] = field(default_factory=dict)
    node: fx.Node | None = None

    def swap(self, old: Tensor, new: Tensor) -> None:
        """Puts one tensor in another's place in all that was recorded so far."""

        def swapped(value: Any) -> Any:
            return pytree.tree_map(lambda leaf: new if leaf is old else leaf, value)

        assert self.node is not None
        self.reshaped |= {
            name: self.node for name, value in self.values.items() if any(leaf is old for leaf in leaves_of(value))
        }
        self.inputs, self.values = swapped(self.inputs), swapped(self.values)
        self.calls = [
            replace(call, args=swapped(call.args), kwargs=swapped(call.kwargs), result=swapped(call.result))
            for call in self.calls
        ]


_RESHAPING = {
    "unsqueeze_": torch.ops.aten.unsqueeze,
    "squeeze_": torch.ops.aten.squeeze,
    "transpose_": torch.ops.aten.transpose,
    "t_": torch.ops.aten.t,
}
"""Operations that give a value another shape in place, and what they are out of place."""


def _same_places(value: Tensor, size: Any, stride: Any, storage_offset: int | None = None) -> bool:
    """Whether `as_strided_` leaves every entry where it is, and says a memory format: pooling to one pixel does."""
    same_start = storage_offset is None or storage_offset == value.storage_offset()
    steps = zip(value.shape, value.stride(), stride, strict=False)
    return tuple(size) == tuple(value.shape) and same_start and all(n == 1 or old == new for n, old, new in steps)


class Recording(TorchDispatchMode):
    """Keeps every aten call made under it."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before: Tensor | None = None
        packet = _RESHAPING.get(func._schema.name.removeprefix("aten::"))
        if packet is not None:  # what was recorded so far keeps the shape that it had
            alias = torch.ops.aten.alias.default(args[0])
            self.run.swap(args[0], alias)
            before = alias
        only_restrides = func is torch.ops.aten.as_strided_.default and _same_places(*args)
        result = func(*args, **kwargs)
        if only_restrides:
            return result
        assert self.run.node is not None
        if packet is not None:
            overload = "int" if func._schema.name == "aten::transpose_" else func._overloadname or "default"
            func, args = getattr(packet, overload), (before, *args[1:])
        self.run.calls.append(Call(self.run.node, func, args, kwargs, result))
        return result


class FakeInterpreter(fx.Interpreter):
    """Runs a graph with fake tensors.

    Args:
        module: Holds what the graph names.
        graph: To run.
        fake: The mode whose tensors they are.
        trains: Whether parameters have gradients, and values are forgotten after their last use: as in a step.

    Attributes:
        converted: Parameters and buffers as fake tensors, by the `id` of the real one.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph, fake: FakeTensorMode, *, trains: bool) -> None:
        super().__init__(module, garbage_collect_values=trains, graph=graph)
        self._given, self.fake, self.trains = graph, fake, trains
        self.converted: dict[int, Tensor] = {}
        self.extra_traceback = False

    def placeholder(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An argument; keyword arguments without a name of their own are none, which every call is checked for."""
        if target.startswith("**"):
            return {}
        value = super().placeholder(target, args, kwargs)
        return tuple(value) if target.startswith("*") else value

    def fetch_attr(self, target: str) -> Any:
        """Parameters and buffers as fake tensors, each always the same one."""
        value = super().fetch_attr(target)
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self.converted:
            found = self.fake.from_tensor(value.detach(), static_shapes=True)
            self.converted[id(value)] = found.requires_grad_(self.trains and value.requires_grad)
        return self.converted[id(value)]

    def fetch_attributes(self) -> list[Tensor]:
        """All that the graph names, as fake tensors."""
        found = [self.fetch_attr(str(node.target)) for node in self._given.nodes if node.op == "get_attr"]
        return [value for value in found if isinstance(value, Tensor)]


class _RecordingInterpreter(FakeInterpreter):
    """Notes which node is at work."""

    def __init__(self, module: nn.Module, graph: fx.Graph, fake: FakeTensorMode, run: Run) -> None:
        super().__init__(module, graph, fake, trains=False)
        self.run_record = run
        self.of_inputs: set[fx.Node] = set()
        self.fetch_attributes()  # before anything is recorded: making them fake reads them
        for node in graph.nodes:
            if node.op == "placeholder" or self.of_inputs.intersection(node.all_input_nodes):
                self.of_inputs.add(node)

    def run_node(self, n: fx.Node) -> Any:
        """One node."""
        self.run_record.node = n
        value = super().run_node(n)
        self.run_record.values[n.name] = value
        return value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call; of a custom function its backward too."""
        if not isinstance(target, CustomFunction):
            return super().call_function(target, args, kwargs)
        run, start = self.run_record, len(self.run_record.calls)
        assert run.node is not None
        of_inputs = [
            t for node in run.node.all_input_nodes if node in self.of_inputs for t in leaves_of(self.env[node])
        ]
        found = gradients_of(target, args, kwargs, of_inputs or leaves_of((args, kwargs)))
        if name := nonlinear_in(run.calls[start:], found.seeds):
            raise RefusedError([not_linear(run.node, name)])
        # a gradient belongs to the examples of its input, or these additions are refused
        sums = [torch.add(*pair) for pair in found.gradients if of_inputs]
        # what was computed for gradients of parameters is theirs to sum
        run.calls[start:] = _needed(run.calls[start:], [*leaves_of(found.result), *sums])
        return found.result


def _needed(calls: list[Call], results: Sequence[Any]) -> list[Call]:
    """Those calls that some results are computed by."""
    wanted, kept = {id(result) for result in results}, []
    for call in reversed(calls):
        if any(id(tensor) in wanted for tensor in call.results):
            wanted.update(id(tensor) for tensor in call.given)
            kept.append(call)
    return kept[::-1]


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
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    run = Run(n, fake_inputs(fake, inputs, batch_dim, n))
    interpreter = _RecordingInterpreter(module, graph, fake, run)
    with fake, torch.no_grad():
        arguments = arguments_for(graph, run.inputs)
        torch_log = logging.getLogger("torch._subclasses.fake_tensor")
        level = torch_log.level
        torch_log.setLevel(logging.CRITICAL)
        try:
            with TRACING, same_einsums(), Recording(run), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the real run gives them too
                interpreter.run(*arguments)
        except RefusedError:
            raise
        except Exception as error:
            assert run.node is not None
            raise RefusedError([failed(run.node, n, error)]) from error
        finally:
            torch_log.setLevel(level)
    return run


def fake_inputs(fake: FakeTensorMode, inputs: Inputs, batch_dim: int, n: int) -> dict[str, Tensor]:
    """The tensors of one kind of input, for a batch of n, as fake tensors by name."""
    found = {}
    rows = zip(inputs.names, inputs.shapes, inputs.dtypes, inputs.devices, inputs.carriers, strict=True)
    with fake:
        for name, shape, dtype, device, carries in rows:
            size = (*shape[:batch_dim], n, *shape[batch_dim + 1 :]) if carries else shape
            found[name] = torch.empty(size, dtype=dtype, device=device)
    return found
