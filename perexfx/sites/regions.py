"""Regions: the parts of a graph whose images may lie in memory with their channels last.

Promises: every value that crosses the border of a region passes a conversion, so that nothing outside of it can tell
how the images lie within; inside are only operations that compute the same in either format and return the format that
they are given. Whether a region uses it is decided for each kind of input and batch size, from shapes alone.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from perexfx.analysis import Analysis
from perexfx.ir.convolution import ConvolutionSignature
from perexfx.ir.cost import Cost, Work
from perexfx.ir.cost_model import CostModel
from perexfx.ir.factors import Signature
from perexfx.ir.rule import Fitted
from perexfx.ir.site import Site
from perexfx.kernels.coarse import at_side, coarse_avg_pool, coarse_max_pool, cut, shrink

_CONVOLUTIONS = (torch.conv2d, F.conv2d)
_NORMS = (F.group_norm, torch.group_norm, F.batch_norm, torch.batch_norm)  # torch's own instance_norm_backward errs
_POOLS = (F.max_pool2d, torch.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d)
_UNARY = (
    *(F.relu, torch.relu, F.relu6, F.gelu, F.silu, F.leaky_relu, F.elu, F.hardswish, F.hardsigmoid, F.hardtanh),
    *(shrink, at_side, cut, coarse_max_pool, coarse_avg_pool),
    *(torch.sigmoid, F.sigmoid, torch.tanh, F.tanh, F.softplus, F.mish, operator.neg, F.relu_, torch.relu_),
)
_BINARY = (operator.add, operator.iadd, torch.add, operator.sub, torch.sub, operator.mul, operator.imul, torch.mul)
_METHODS = ("relu", "relu_", "sigmoid", "tanh", "add", "add_", "mul", "mul_", "sub", "clamp")
_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.ELU, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh),
    *(nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Mish, nn.Identity),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
)
_READ_SIZES = ("size", "dim", "ndimension", "numel")
_SUMS = ("mean", "sum", "amax", "amin")


@dataclass(frozen=True)
class Region:
    """A connected part of a graph.

    Attributes:
        nodes: Names of its nodes, in graph order.
        inputs: Names of the values from outside that its nodes take for images.
        sites: The sites among its nodes.
    """

    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    sites: tuple[Site, ...]


def regions_of(graph: fx.Graph, module: nn.Module, sites: Sequence[Site]) -> tuple[Region, ...]:
    """The regions of a captured graph: each begins at a convolution, and has at least one that is a site.

    Args:
        graph: In functional form.
        module: Holds the parameter-free modules that the graph names.
        sites: In graph order.
    """
    by_node = {site.node: site for site in sites}
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if not _keeps_format(node, module, by_node.get(node.name)):
            continue
        reached = [found[read] for read in images_of(node) if read in found]
        if not reached and node.target not in _CONVOLUTIONS:
            continue
        members = reached[0] if reached else []
        for other in reached[1:]:
            if other is not members:
                members.extend(other)
                found.update(dict.fromkeys(other, members))
        members.append(node)
        found[node] = members
    order = {node: at for at, node in enumerate(graph.nodes)}
    distinct = {id(members): sorted(members, key=order.__getitem__) for members in found.values()}
    regions = [_region(members, by_node) for members in distinct.values()]
    return tuple(region for region in regions if region.sites)


def _region(members: Sequence[fx.Node], by_node: Mapping[str, Site]) -> Region:
    inside = set(members)
    inputs = dict.fromkeys(read.name for node in members for read in images_of(node) if read not in inside)
    sites = [by_node[node.name] for node in members if node.name in by_node and node.target in _CONVOLUTIONS]
    return Region(tuple(node.name for node in members), tuple(inputs), tuple(sites))


def images_of(node: fx.Node) -> Iterator[fx.Node]:
    """What a node that keeps the format takes for images: not its parameters."""
    if node.target is torch.cat:
        values = node.args[0] if node.args else node.kwargs.get("tensors")
        given: Sequence[Any] = values if isinstance(values, list | tuple) else ()
    elif node.target in _BINARY or node.op == "call_method":
        given = node.args[:2]
    else:
        given = [node.args[0] if node.args else node.kwargs.get("input")]
    return (value for value in given if isinstance(value, fx.Node) and value.op != "get_attr")


def _keeps_format(node: fx.Node, module: nn.Module, site: Site | None) -> bool:
    """Whether a node computes the same in either format, and returns the format of its images."""
    if node.op == "call_module":
        owner = module.get_submodule(str(node.target))
        return type(owner) in _MODULES and not getattr(owner, "return_indices", False)
    if node.op == "call_method":
        return site is None and node.target in _METHODS
    if node.op != "call_function":
        return False
    if node.target in _CONVOLUTIONS or node.target in _NORMS:
        return bool(node.args) or "input" in node.kwargs
    if node.target is torch.cat:
        return site is None and (node.args[1:] or (node.kwargs.get("dim"),)) == (1,)
    if node.target in _POOLS:
        return not node.kwargs.get("return_indices", False) and len(node.args) < 7
    return site is None and (node.target in _UNARY or node.target in _BINARY)


def reads_either_format(node: fx.Node) -> bool:
    """Whether a node outside of a region may take its values as they lie: it reads their sizes, or sums positions."""
    if node.op == "call_method":
        return node.target in _READ_SIZES or (node.target in _SUMS and _sums_positions(node))
    if node.target in (torch.mean, torch.sum, torch.amax, torch.amin):
        return _sums_positions(node)
    return node.target is getattr and node.args[1] in ("shape", "ndim")


def _sums_positions(node: fx.Node) -> bool:
    axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return isinstance(axes, list | tuple) and sorted(axes, key=str) in ([2, 3], [-1, -2])


def may_reformat(region: Region, graph: fx.Graph, analysis: Analysis) -> bool:
    """Whether a region's images can lie in another format without a trace.

    All are `[examples, channels, height, width]`; what is written in place, is written inside by readers of the same
    memory alone, and nothing from outside is overwritten once it has been converted.
    """
    inside = set(region.nodes)
    order = {node.name: at for at, node in enumerate(graph.nodes)}
    targets = {node.name: node.target for node in graph.nodes}
    for name in region.nodes:
        tensors = analysis.nodes[name].tensors
        if len(tensors) != 1:
            return False
        facts, layout = tensors[0], tensors[0].layout
        if len(facts.shapes[0]) != 4 or layout is None or layout.axis != 0 or not facts.dtype.is_floating_point:
            return False
        if (targets[name] in _NORMS) and 1 in (facts.shapes[0][1], math.prod(facts.shapes[0][2:])):
            return False  # strides that fit both formats: torch's own backward takes them for the wrong one
        if not inside.issuperset(analysis.written_by.get(name, ())):
            return False
    return all(order[writer] <= order[name] for name in region.inputs for writer in analysis.written_by.get(name, ()))


def faster_with_channels_last(
    regions: Sequence[Region],
    graph: fx.Graph,
    module: nn.Module,
    analysis: Analysis,
    fitted: Mapping[str, Fitted],
    price: Callable[[Signature], float],
    machine: CostModel,
) -> frozenset[int]:
    """The regions, by number, that are faster with their channels last.

    Args:
        regions: Of the graph.
        graph: In functional form.
        module: Holds the parameters and the parameter-free modules that the graph names.
        analysis: Of the graph.
        fitted: Site name -> the site at its shapes.
        price: Seconds of the best strategy for factors of some size.
        machine: Predicts seconds.
    """
    found = set()
    for at, region in enumerate(regions):
        if not _is_on_cpu(region, module) or not may_reformat(region, graph, analysis):
            continue
        kernels = [_kernel_of(site, fitted) for site in region.sites]
        sizes = [kernel for kernel in kernels if kernel is not None]
        if len(sizes) < len(kernels):
            continue
        seconds = [
            machine.seconds(Cost(tuple(_image_work(region, graph, module, analysis, sizes, last)), 0))
            + sum(price(replace(kernel, channels_last=last)) for kernel in sizes)
            for last in (False, True)
        ]
        if seconds[1] < seconds[0]:
            found.add(at)
    return frozenset(found)


def _kernel_of(site: Site, fitted: Mapping[str, Fitted]) -> ConvolutionSignature | None:
    """The sizes of a convolution; None where its rule does not cover them."""
    return next((s for s in fitted[site.name].signatures.values() if isinstance(s, ConvolutionSignature)), None)


def _image_work(
    region: Region,
    graph: fx.Graph,
    module: nn.Module,
    analysis: Analysis,
    kernels: Sequence[ConvolutionSignature],
    last: bool,
) -> Iterator[Work]:
    """What the layers of a region do to images, forward and backward, in one of the two formats."""
    for sizes in kernels:
        yield from convolution_work(sizes, last)
    n = kernels[0].n
    inside = set(region.nodes)
    for node in graph.nodes:
        if node.name not in inside:
            continue
        pools = node.target in (F.max_pool2d, torch.max_pool2d)
        if node.op == "call_module":
            pools = isinstance(module.get_submodule(str(node.target)), nn.MaxPool2d)
        if pools or node.target in _NORMS:
            read = next(images_of(node))
            elements = math.prod(analysis.nodes[read.name].tensors[0].shape(n))
            has_kernel = not pools and kernels[0].has_kernels
            yield image_work("max_pool" if pools else "group_norm", elements, last, has_kernel)
    if last:
        entering = sum(math.prod(analysis.nodes[name].tensors[0].shape(n)) for name in region.inputs)
        yield Work("memory", bytes=2 * ITEMSIZE * entering, calls=len(region.inputs))


def convolution_work(sizes: ConvolutionSignature, last: bool) -> tuple[Work, ...]:
    """Forward and input gradient of a convolution in one of the two formats."""
    kind = "convolution_last" if last else "convolution"
    images = 2 * ITEMSIZE * sizes.held_elements
    kernels = 2 * ITEMSIZE * math.prod(sizes.shape)
    return (
        Work(kind, 2 * sizes.weight_gradient_flops, images, calls=2),
        Work(f"{kind}_kernel", bytes=kernels, calls=0),
    )


def image_work(kind: str, elements: int, last: bool, has_kernel: bool = False) -> Work:
    """Forward and backward of a layer that reads and writes every element of its images.

    Args:
        kind: Of the layer.
        elements: Of its images.
        last: Whether they lie with their channels last.
        has_kernel: Whether a kernel in C++ takes images that lie so.
    """
    name = f"{kind}_kernel" if last and has_kernel else f"{kind}_last" if last else kind
    return Work(name, bytes=2 * ITEMSIZE * elements, calls=2)


ITEMSIZE = 4
"""Bytes per element: of 32-bit numbers, the only ones whose images change their format."""


def with_formats(
    fitted: Mapping[str, Fitted], regions: Sequence[Region], channels_last: frozenset[int]
) -> dict[str, Fitted]:
    """Sites with the format that their images have: it is part of what a convolution costs."""
    found = dict(fitted)
    for at in channels_last:
        for site in regions[at].sites:
            old = found[site.name]
            signatures = {
                name: replace(value, channels_last=True) if isinstance(value, ConvolutionSignature) else value
                for name, value in old.signatures.items()
            }
            found[site.name] = replace(old, signatures=signatures)
    return found


def _is_on_cpu(region: Region, module: nn.Module) -> bool:
    """Whether its kernels are 32-bit numbers on a CPU in torch's default format."""
    names = [name for site in region.sites for name in site.parameters]
    parameters = [operator.attrgetter(name)(module) for name in names]
    return all(p.device.type == "cpu" and p.dtype == torch.float32 and p.is_contiguous() for p in parameters)
