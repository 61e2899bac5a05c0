"""Assembly: an exported program as a graph of the vocabulary that tracing has.

Promises: parameters and buffers are `get_attr` nodes under the model's own names; there is one placeholder per argument
of the forward, and the output has the forward's own structure; blocks of no_grad are inlined and detached.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec
from torch.utils import _pytree as pytree

from perexfx.capture.conditions import Conditions
from perexfx.capture.embedding_bags import MODES, OVERLOADS, size_of_bags
from perexfx.capture.outputs import OutputTemplate
from perexfx.capture.places import LIBRARIES
from perexfx.capture.tracer import writes_into_activation
from perexfx.capture.vocabulary import to_public_names
from perexfx.ir.errors import CaptureError
from perexfx.ir.inputs import TEMPLATE, Template
from perexfx.ir.node import NodeInfo, annotate
from perexfx.ir.schemas import all_arguments

aten = torch.ops.aten


@dataclass(frozen=True)
class Exported:
    """An exported forward.

    Attributes:
        graph: With `get_attr` nodes for parameters and buffers, and one placeholder per argument of the forward.
        constants: Tensors that the forward makes out of numbers.
        conditions: The inputs that it holds for.
        numbers: The nodes whose values are numbers: sizes, and what is computed from them.
    """

    graph: fx.Graph
    constants: Mapping[str, Tensor]
    conditions: Conditions
    numbers: frozenset[fx.Node]


_DROPPED = (
    aten._assert_tensor_metadata.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
)
_PURE = ("size", aten.sym_numel.default, torch.arange, torch.reshape)
"""What is left without a reader when the arguments of an operation are read in another way."""
_ENTER_GRAD_MODE = torch.ops.higher_order.wrap_with_set_grad_enabled
_ENTER_AUTOCAST = torch.ops.higher_order.wrap_with_autocast


class Assembly:
    """Copies an exported program into a new graph."""

    def __init__(
        self,
        model: nn.Module,
        program: ExportedProgram,
        arguments: Mapping[str, Any],
        inputs: Mapping[str, fx.Node],
        output: OutputTemplate,
    ) -> None:
        self.model, self.program, self.arguments, self.inputs = model, program, arguments, inputs
        self.output = output
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self.numbers: set[fx.Node] = set()
        self.parameters = {id(value): name for name, value in (*model.named_parameters(), *model.named_buffers())}

    def finish(self, conditions: Conditions) -> Exported:
        """The whole graph."""
        values: dict[fx.Node, Any] = dict(zip(self.inputs.values(), self._leaves(), strict=True))
        placeholders = [node for node in self.program.graph.nodes if node.op == "placeholder"]
        for node, spec in zip(placeholders, self.program.graph_signature.input_specs, strict=True):
            if spec.kind is not InputKind.USER_INPUT:
                values[node] = self._attribute(spec)
        result = self._copy(self.program.graph_module, values, in_no_grad=False)
        annotate(self.graph.output(self.output.rebuild(self.graph, list(result))), NodeInfo())
        to_public_names(self.graph)
        for node in reversed(self.graph.nodes):
            if not node.users and (node.op == "get_attr" or node.target in _PURE):
                self.graph.erase_node(node)
        return Exported(self.graph, self.constants, conditions, frozenset(self.numbers))

    def _leaves(self) -> list[fx.Node]:
        """The tensors among the arguments, taken out of the placeholders."""
        found: dict[str, fx.Node] = {}
        named = inspect.signature(self.model.forward).parameters
        for name, parameter in named.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                for key in self.arguments.keys() - named:
                    found.update(self._argument(key, self.arguments[key], key, (None,)))
            elif name in self.arguments or parameter.default is not inspect.Parameter.empty:
                default = () if parameter.default is inspect.Parameter.empty else (parameter.default,)
                prefix = "*" if parameter.kind is inspect.Parameter.VAR_POSITIONAL else ""
                value = self.arguments.get(name, parameter.default)
                found.update(self._argument(prefix + name, value, name, default))
        return [found[name] for name in self.inputs]

    def _argument(self, target: str, value: Any, name: str, default: tuple[Any, ...]) -> dict[str, fx.Node]:
        """A placeholder; its tensors by the name of the leaf."""
        if isinstance(value, Tensor):
            return {name: annotate(self.graph.create_node("placeholder", target, default), NodeInfo())}
        flat, spec = pytree.tree_flatten_with_path(value)
        if not any(isinstance(leaf, Tensor) for _, leaf in flat):
            written = (value,) if _can_be_written(value) else (None,)  # None stands for any other in the graph's code
            annotate(self.graph.create_node("placeholder", target, written), NodeInfo())
            return {}
        node = annotate(self.graph.create_node("placeholder", target, default), NodeInfo())
        names = [f"{name}{pytree.keystr(path)}" for path, _ in flat]
        node.meta[TEMPLATE] = Template(spec, tuple(names), tuple(None if isinstance(v, Tensor) else v for _, v in flat))
        return {
            leaf: self._taken(node, path)
            for leaf, (path, value) in zip(names, flat, strict=True)
            if isinstance(value, Tensor)
        }

    def _taken(self, node: fx.Node, path: Sequence[Any]) -> fx.Node:
        for key in path:
            by_name = isinstance(key, pytree.GetAttrKey)
            step = key.name if by_name else key.idx if isinstance(key, pytree.SequenceKey) else key.key
            node = annotate(
                self.graph.call_function(getattr if by_name else operator.getitem, (node, step)), NodeInfo()
            )
        return node

    def _attribute(self, spec: InputSpec) -> fx.Node:
        """A parameter, buffer or constant by the model's own name for it."""
        target = str(spec.target).removeprefix("model.")
        try:
            value = operator.attrgetter(target)(self.model)
        except AttributeError:
            value = self.program.constants[str(spec.target)]
            assert isinstance(value, Tensor)
            target = target.replace(".", "_")
            self.constants[target] = value
        name = self.parameters.get(id(value), target)
        return annotate(self.graph.create_node("get_attr", name), NodeInfo())

    def _copy(self, owner: fx.GraphModule, values: dict[fx.Node, Any], *, in_no_grad: bool) -> Sequence[Any]:
        """Copies the nodes of one graph; returns what it outputs."""
        for node in owner.graph.nodes:
            if node.op == "output":
                return fx.map_arg(node.args[0], lambda n: values[n])
            if node.op == "get_attr":
                values[node] = operator.attrgetter(str(node.target))(owner)
            elif node.op == "call_function" and node.target not in _DROPPED:
                values[node] = self._call(node, values, in_no_grad)
        raise AssertionError("a graph has an output")

    def _call(self, node: fx.Node, values: Mapping[fx.Node, Any], in_no_grad: bool) -> Any:
        args: Any = _mapped(node.args, values)
        if node.target is operator.getitem and not isinstance(args[0], fx.Node):
            return args[0][args[1]]
        info = _info(node, in_no_grad)
        if node.target is _ENTER_GRAD_MODE:
            enabled, body, *operands = args
            return self._inline(body, operands, in_no_grad=not enabled)
        if node.target is _ENTER_AUTOCAST:
            *_, enabled, _, body = args[:5]
            if enabled:
                raise CaptureError(
                    f"The forward switches autocast on{f' at {info.source}' if info.source else ''}: gradients of "
                    "mixed precision are not covered. Convert the model to the dtype you want instead."
                )
            return self._inline(body, args[5:], in_no_grad=in_no_grad)
        if str(getattr(node.target, "__module__", "")).startswith("torch._functorch"):
            raise CaptureError(
                f"The forward uses a transform of torch.func (`vmap`, `grad`, `jvp`) at {info.source}, which is not "
                "covered. Write it on whole batches, or with a loop."
            )
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise CaptureError(f"`{node.name}` ({info.source}) is control flow, `{node.target}`, which is not covered.")
        if node.target in OVERLOADS and (size := size_of_bags(node)) is not None:
            given = all_arguments(node.target, node.args, node.kwargs)
            found = self._embedding_bag(_mapped(given, values), _mapped(size, values), info)
            return found, None, None, None
        kwargs = _mapped(node.kwargs, values)
        copied = annotate(self.graph.create_node("call_function", node.target, args, kwargs, node.name), info)
        if in_no_grad and writes_into_activation(copied, self.model):
            raise CaptureError(
                f"The forward writes in place under torch.no_grad() at {info.source}: autograd does not see the "
                "write, and a captured graph would record it. Compute a new value and `detach()` it instead."
            )
        if isinstance(node.meta.get("val"), _NUMBERS):
            self.numbers.add(copied)
        return copied

    def _embedding_bag(self, given: dict[str, Any], size: Any, info: NodeInfo) -> fx.Node:
        """With ids of shape `[bags, ids]`, as the rule takes them."""
        rows, weights = (
            value if value is None else annotate(self.graph.call_function(torch.reshape, (value, [-1, size])), info)
            for value in (given["indices"], given["per_sample_weights"])
        )
        options = {name: given[name] for name in ("scale_grad_by_freq", "sparse") if given[name]}
        options |= {"mode": MODES[given["mode"]], "per_sample_weights": weights}
        options |= {"padding_idx": given.get("padding_idx")}
        return annotate(self.graph.call_function(F.embedding_bag, (rows, given["weight"]), options), info)

    def _inline(self, body: fx.GraphModule, operands: Sequence[Any], *, in_no_grad: bool) -> Sequence[Any]:
        inner = [node for node in body.graph.nodes if node.op == "placeholder"]
        return self._copy(body, dict(zip(inner, operands, strict=True)), in_no_grad=in_no_grad)


def _can_be_written(value: Any) -> bool:
    """Whether Python code can say a value."""
    plain = (bool, int, float, str, type(None), torch.dtype, torch.device)
    return all(isinstance(leaf, plain) for leaf in pytree.tree_leaves(value))


_NUMBERS = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)


def _mapped(value: Any, values: Mapping[fx.Node, Any]) -> Any:
    """Arguments with nodes of the new graph."""
    return pytree.tree_map_only(fx.Node, lambda n: values[n], value)


def _info(node: fx.Node, in_no_grad: bool) -> NodeInfo:
    """Module path and source line, as the export notes them."""
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    module = "" if path == "model" else str(path).removeprefix("model.")
    return NodeInfo(module, _source(node.meta.get("stack_trace") or ""), stops_gradient=in_no_grad)


_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def _source(trace: str) -> str:
    """`file.py:line` of the innermost frame that is neither torch's nor ours."""
    frames = [(file, line) for file, line in _FRAME.findall(trace) if not file.startswith(LIBRARIES)]
    return f"{Path(frames[-1][0]).name}:{frames[-1][1]}" if frames else ""
