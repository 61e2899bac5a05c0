"""The sizes at every site for one batch size: all that a plan is made from.

Promises: from an analysis alone, by arithmetic; a site whose shapes its own rule does not cover gets the fallback, and
one that has no per-example gradient at all is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from perexfx import kernels
from perexfx.analysis import Analysis
from perexfx.ir.convolution import ConvolutionSignature
from perexfx.ir.errors import CoverageError
from perexfx.ir.factors import ProductSignature, Signature
from perexfx.ir.refusal import Refusal
from perexfx.ir.rule import Fitted, Geometry, Output, Rule
from perexfx.ir.site import Site


def fit(
    sites: Sequence[Site], graph: fx.Graph, analysis: Analysis, n: int, fallback: Callable[[Rule], Rule]
) -> dict[str, Fitted]:
    """Every site at the shapes of a batch of n.

    Args:
        sites: In graph order.
        graph: Where they are.
        analysis: What is known about its values.
        n: Number of examples.
        fallback: Makes the rule to use where a site's own does not cover its shapes.

    Raises:
        CoverageError: A site has shapes that no rule covers.
    """
    nodes = {node.name: node for node in graph.nodes}
    fitted, refusals = {}, []
    for site in sites:
        node = nodes[site.node]
        arguments = site.rule.bind(site.target, node.args, node.kwargs)
        geometry = _geometry(site, node, arguments, analysis, n)
        if isinstance(geometry, Geometry):
            misfit = _constant_input(site, geometry) or site.rule.misfits(arguments, geometry) or ""
            rule = fallback(site.rule) if misfit else site.rule
            signatures = _weighing(site, rule.signatures(arguments, geometry))
            fitted[site.name] = Fitted(rule, geometry, signatures, misfit)
            continue
        refusals.append(
            Refusal(
                what=f"{site.place} uses {', '.join(f'`{name}`' for name in site.parameters)}: {geometry}.",
                why="Every use of a trainable parameter must be covered.",
                remedy="Freeze it (`requires_grad_(False)`), or rewrite that line.",
                place=site.place,
            )
        )
    if refusals:
        raise CoverageError(refusals)
    return fitted


def _weighing(site: Site, signatures: dict[str, Signature]) -> dict[str, Signature]:
    """Sizes that say where the squares of a kernel's taps do not count alike."""
    found = dict(signatures)
    for operand in site.operands:
        lengths, signature = operand.expression.lengths, signatures.get(operand.name)
        if lengths is not None and max(lengths.axes, default=0) > 1 and isinstance(signature, ConvolutionSignature):
            found[operand.name] = replace(signature, weighs_taps=True)
    return found


def with_kernels(fitted: Mapping[str, Fitted], dtype: torch.dtype, device: torch.device) -> dict[str, Fitted]:
    """Sites that know whether there are kernels in C++ for them."""
    if device.type != "cpu" or dtype not in kernels.DTYPES or not kernels.are_built():
        return dict(fitted)
    return {
        name: replace(found, signatures={key: _with_kernels(value) for key, value in found.signatures.items()})
        for name, found in fitted.items()
    }


def _with_kernels(signature: Signature) -> Signature:
    if isinstance(signature, ConvolutionSignature):
        return replace(signature, has_kernels=len(signature.shape) <= kernels.MOST_AXES)
    return replace(signature, has_kernels=True) if isinstance(signature, ProductSignature) else signature


def with_shared_inputs(fitted: Mapping[str, Fitted], sites: Sequence[Site], graph: fx.Graph) -> dict[str, Fitted]:
    """Sites that know with how many others they have the left factor of their product in common."""
    nodes = {node.name: node for node in graph.nodes}
    readers: dict[tuple[str, tuple[int, ...]], list[tuple[str, str]]] = {}
    for site in sites:
        signatures, node = fitted[site.name].signatures, nodes[site.node]
        products = {name: value for name, value in signatures.items() if isinstance(value, ProductSignature)}
        arguments = site.rule.bind(site.target, node.args, node.kwargs)
        read = next((arguments.get(name) for name in site.rule.inputs), None)
        if len(products) == 1 and isinstance(read, fx.Node):
            ((operand, product),) = products.items()
            sizes = product.n, product.g, product.t, product.i
            readers.setdefault((read.name, sizes), []).append((site.name, operand))
    found = dict(fitted)
    for (read, sizes), users in readers.items():
        for name, operand in users if len(users) > 1 else ():
            old = found[name]
            signature = old.signatures[operand]
            assert isinstance(signature, ProductSignature)
            signatures = {**old.signatures, operand: replace(signature, left_users=len(users))}
            found[name] = replace(old, signatures=signatures, shares=f"{read} {list(sizes)}")
    return found


def operand_dtype(sites: Sequence[Site], graph: fx.Graph, analysis: Analysis) -> torch.dtype:
    """Of the widest parameter."""
    nodes = {node.name: node for node in graph.nodes}
    facts = [analysis.tensor(nodes[operand.node]) for site in sites for operand in site.operands]
    dtypes = [found.dtype for found in facts if found is not None]
    return max(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32)


def _geometry(site: Site, node: fx.Node, arguments: Mapping[str, object], analysis: Analysis, n: int) -> Geometry | str:
    """The shapes at a site, or why it has none that can be used."""
    results = analysis.nodes[node.name].tensors
    if not results or results[0].layout is None:
        return "its result has no single axis of examples"
    if any(result.layout is None and result.depends_on_batch_size for result in results):
        return "the examples in one of its results cannot be told apart"
    shapes, layouts = {}, {}
    for name, value in arguments.items():
        facts = analysis.tensor(value) if isinstance(value, fx.Node) else None
        if facts is None:
            continue
        if facts.dtype.is_complex or any(result.dtype.is_complex for result in results):
            return "it computes with complex numbers, which no layer rule covers"
        shapes[name] = facts.shape(n)
        if facts.layout is not None:
            layouts[name] = facts.layout
        elif facts.depends_on_batch_size:
            return f"the examples in its argument `{name}` cannot be told apart"
    outputs = tuple(Output(r.shape(n), r.layout, r.dtype.is_floating_point) for r in results)
    return Geometry(n, shapes, layouts, outputs, _for_one(arguments, analysis))


def _constant_input(site: Site, geometry: Geometry) -> str:
    """Why a rule does not cover a call whose input is a constant."""
    operands = {operand.name for operand in site.operands}
    for name in site.rule.inputs:
        if name in geometry.shapes and name not in geometry.layouts and name not in operands:
            return f"its argument `{name}` carries no examples, but its result does"
    return ""


def _for_one(arguments: Mapping[str, Any], analysis: Analysis) -> dict[str, Any]:
    """Arguments that are numbers and follow the batch size, for one example."""
    found = {}
    for name, value in arguments.items():
        numbers = [analysis.numbers_for(leaf, 1) for leaf in pytree.tree_leaves(value) if isinstance(leaf, fx.Node)]
        if any(number is not None for number in numbers):
            found[name] = fx.map_arg(value, lambda node: analysis.numbers_for(node, 1))  # pyright: ignore[reportArgumentType, reportReturnType]
    return found
