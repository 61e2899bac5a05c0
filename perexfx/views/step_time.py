"""What an ordinary step through a graph is predicted to take: forward and backward, without clipping.

Promises: from shapes and the machine profile alone; the seconds are as rough as those of any one layer, and are for
comparing two graphs around the same parameters, whose errors are alike.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, fx, nn

from perexfx.analysis import leaves_of, record
from perexfx.ir.convolution import ConvolutionSignature
from perexfx.ir.cost import Cost, Work
from perexfx.ir.cost_model import CostModel
from perexfx.ir.inputs import Inputs
from perexfx.ir.ordinary_gradient import ordinary_gradient
from perexfx.kernels.coarse import at_side, at_side_of, cut, grow, shrink
from perexfx.kernels.geometry import ConvolutionGeometry
from perexfx.kernels.pooled import averaged_kernel, mean_of_sides, pooled_kernel
from perexfx.sites import convolution_work

PASSES = 3
"""Forward, and backward for the input and for the parameters."""


def step_seconds(graph: fx.Graph, module: nn.Module, kind: Inputs, n: int, machine: CostModel) -> float:
    """Predicted seconds of an ordinary step.

    Args:
        graph: In functional form.
        module: Holds what the graph names.
        kind: Of its inputs.
        n: Number of examples.
        machine: Predicts seconds.
    """
    run = record(graph, module, kind, 0, n)
    work = [
        part
        for call in run.calls
        if call.node.target not in _ONE_PASS
        for part in _work(call.func._schema.name, call.given, call.results, call.args)
    ]
    for node in graph.nodes:
        if node.target in _ONE_PASS:
            moved = [t for read in (node, node.args[0]) for t in leaves_of(run.values[read.name])]
            work.append(Work("memory", bytes=2 * sum(t.numel() * t.element_size() for t in moved), calls=2))
    return machine.seconds(Cost(tuple(work), 0))


_ONE_PASS = (shrink, grow, cut, at_side, at_side_of, pooled_kernel, averaged_kernel, mean_of_sides)
"""Whose first argument is read once, however many operations stand for them when shapes alone are run."""


def _work(name: str, given: list[Tensor], results: list[Tensor], args: tuple[object, ...]) -> Iterator[Work]:
    """Of one aten call, forward and backward."""
    itemsize = max((t.element_size() for t in results if t.is_floating_point()), default=0)
    if not itemsize:
        return
    if name == "aten::convolution":
        yield from _convolution(args, results[0], itemsize)
    elif name in _PRODUCTS:
        left, right = [t for t in given if t.dim() > 1][-2:]
        moved = sum(t.numel() for t in (left, right, results[0]))
        flops = 2 * left.numel() * right.shape[-1]
        yield Work("gemm", PASSES * flops, PASSES * itemsize * moved, calls=PASSES)
    elif name.removeprefix("aten::") not in _VIEWS:
        moved = sum(t.numel() for t in (*given, *results) if t.is_floating_point())
        yield Work("memory", bytes=2 * itemsize * moved, calls=2)


_PRODUCTS = frozenset(f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm"))
_VIEWS = frozenset(
    "view _unsafe_view reshape alias detach expand permute transpose t select slice unsqueeze squeeze split unbind "
    "as_strided lift_fresh zeros ones full arange empty randint split_with_sizes".split()
)


def _convolution(args: tuple[object, ...], output: Tensor, itemsize: int) -> Iterator[Work]:
    image, weight, _, stride, padding, dilation, is_transposed, _, groups = args
    assert isinstance(image, Tensor)
    assert isinstance(weight, Tensor)
    wide, narrow = (output, image) if is_transposed else (image, output)
    geometry = ConvolutionGeometry(_numbers(stride), _numbers(padding), _numbers(dilation), _number(groups))
    sizes = tuple(wide.shape[2:]), tuple(narrow.shape[2:])
    signature = ConvolutionSignature(image.shape[0], 1, *sizes, tuple(weight.shape), geometry)
    yield from convolution_work(signature, last=False)
    yield from ordinary_gradient(signature, itemsize)


def _numbers(value: object) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (_number(value),)


def _number(value: object) -> int:
    assert isinstance(value, int)
    return value


__all__ = ["step_seconds"]
