"""The sizes at every site for one batch size: all that a plan is made from.

Promises: from an analysis alone, by arithmetic; a site whose shapes its rule does not cover is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from perexfx.analyze import Analysis
from perexfx.ir.errors import CoverageError
from perexfx.ir.factors import Signature
from perexfx.ir.refusal import Refusal
from perexfx.ir.rule import Geometry
from perexfx.ir.site import Site


def sizes_of(
    sites: Sequence[Site], graph: fx.Graph, analysis: Analysis, n: int
) -> tuple[dict[str, Geometry], dict[str, Mapping[str, Signature]]]:
    """Geometry and factor sizes of every site for a batch of n.

    Raises:
        CoverageError: A site has shapes that its rule does not cover.
    """
    nodes = {node.name: node for node in graph.nodes}
    geometries, signatures, refusals = {}, {}, []
    for site in sites:
        node = nodes[site.node]
        arguments = site.rule.bind(site.target, node.args, node.kwargs)
        found = _geometry(site, node, arguments, analysis, n)
        reason = found if isinstance(found, str) else site.rule.misfits(found)
        if isinstance(found, Geometry) and not reason:
            geometries[site.name] = found
            signatures[site.name] = site.rule.signatures(arguments, found)
            continue
        refusals.append(
            Refusal(
                what=f"{site.place} uses {', '.join(f'`{name}`' for name in site.parameters)}: {reason}.",
                why="Every use of a trainable parameter must be covered.",
                remedy="Freeze it (`requires_grad_(False)`), or rewrite that line.",
                place=site.place,
            )
        )
    if refusals:
        raise CoverageError(refusals)
    return geometries, signatures


def operand_itemsize(sites: Sequence[Site], graph: fx.Graph, analysis: Analysis) -> int:
    """Bytes per element of the widest parameter."""
    nodes = {node.name: node for node in graph.nodes}
    facts = [analysis.tensor(nodes[operand.node]) for site in sites for operand in site.operands]
    return max((found.dtype.itemsize for found in facts if found is not None), default=4)


def _geometry(site: Site, node: fx.Node, arguments: Mapping[str, object], analysis: Analysis, n: int) -> Geometry | str:
    """The shapes at a site, or why it has none that can be used."""
    output = analysis.tensor(node)
    if output is None or output.layout is None:
        return "its result has no single axis of examples"
    shapes, layouts = {}, {}
    for name, value in arguments.items():
        facts = analysis.tensor(value) if isinstance(value, fx.Node) else None
        if facts is None:
            continue
        if facts.dtype.is_complex or output.dtype.is_complex:
            return "it computes with complex numbers, which no layer rule covers"
        shapes[name] = facts.shape(n)
        if facts.layout is not None:
            layouts[name] = facts.layout
        elif facts.depends_on_batch_size:
            return f"the examples in its argument `{name}` cannot be told apart"
    operands = {operand.name for operand in site.operands}
    for name in site.rule.inputs:
        if name in shapes and name not in layouts and name not in operands:
            return f"its argument `{name}` carries no examples, but its result does"
    return Geometry(n, shapes, layouts, output.shape(n), output.layout)
