"""The static proof: that what a clipped step adds to `.grad` is clipped, all of it, whatever the numbers and the loss.

Promises: what is proved holds for every input of the planned shapes, by the dataflow of the step alone; a claim that
does not hold raises, with the path that breaks it. What is taken for granted is said: that the analysis kept examples
apart (`perexfx.check` tries that), and that the gradient of the loss for one example's output depends on that example.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace

import networkx as nx
from torch import nn

from perexfx.inspecting.proof.dataflow import Dataflow, dataflow
from perexfx.inspecting.proof.linear_operations import (
    ADDED,
    MOVES,
    ZEROS,
    is_linear,
    is_multiplied,
    is_product,
    keeps_fractions,
)
from perexfx.inspecting.proof.operations import Operation
from perexfx.ir.errors import ArgumentError, ProofError
from perexfx.ir.site import Key, Site
from perexfx.runtime import Settings, Transformed, planned


@dataclass(frozen=True)
class Proof:
    """What was proved of one plan. `str(proof)` says it in words.

    Attributes:
        batch_size: Of the plan.
        factors: What else must be said of the clip factors, or "".
        operations: Nodes of the dataflow.
        edges: Its edges.
        gradients: How many parameters get a gradient.
        products: Operation -> how many of them multiply what belongs to examples with the clip factors.
        handed_over: How many tensors the sites hand over to norms and clipped sums.
        sites: How many sites.
        reweighted: Of how many operands the clipped sums come from a second backward.
    """

    batch_size: int
    factors: str
    operations: int
    edges: int
    gradients: int
    products: Mapping[str, int]
    handed_over: int
    sites: int
    reweighted: int = 0

    def __str__(self) -> str:
        if not self.gradients:
            return (
                f"In a step of {self.batch_size} no parameter gets a gradient, whatever the loss: nothing is to clip."
            )
        products = ", ".join(f"{count} {name}" for name, count in self.products.items())
        counted = "1 tensor" if self.handed_over == 1 else f"{self.handed_over} tensors"
        sites = "1 site" if self.sites == 1 else f"{self.sites} sites"
        bound = f" {self.factors}" if self.factors else ""
        enters = "" if self.factors else " that its factors are made of"
        return (
            f"Proved on the dataflow of a step of {self.batch_size} ({self.operations:,} operations, {self.edges:,} "
            f"edges), for every input and every loss of the examples' own outputs:\n"
            f"1. Every path from an input to the gradient of any of {self.gradients} parameters passes the clip "
            f"factors, in a product ({products}). They enter it unchanged, and all that follows is linear.{bound}\n"
            f"2. Every such path passes the norms, or what the parameter's own sites hand over ({counted} "
            f"of {sites}), and all of that enters the norms{enters}.\n"
            f"3. Every path from a parameter to an output passes an operation of one of its sites, or is detached."
            f"{self._second_backward}"
        )

    @property
    def _second_backward(self) -> str:
        if not self.reweighted:
            return ""
        sums = "1 clipped sum comes" if self.reweighted == 1 else f"{self.reweighted} clipped sums come"
        return (
            f"\n{sums} from a second backward, which runs while nobody watches: the proof is of the sums of what the "
            "sites leave, in its place."
        )


def verify(gm: nn.Module) -> Proof:
    """What holds of a transformed module's step for every input: proved on its dataflow, not tried on numbers.

    The step is that of the last plan: of the last batch, or of the example inputs. It begins its backward with any
    gradient of the outputs, so the proof holds for every loss.

    Args:
        gm: From `perexfx.transform`.

    Returns:
        What was proved; `print` shows it, and `perexfx.report(gm)` from then on.

    Guarantees:
        What is proved is that nothing goes around: that no value of an example reaches a gradient but multiplied with
        the clip factors, and that the norms, which factors are made of, depend on all that is multiplied. Not proved,
        but tried by `perexfx.check` and the tests: the arithmetic of norms and factors themselves, what else products
        multiply with, that a factor is not another example's, kernels and second backwards while nobody watches,
        and that no operation mixes examples. Hooks and what an optimizer does come after. It takes for granted that
        the loss joins examples by a sum or mean.

    Raises:
        ProofError: Something does not hold; the message has the path.
        CaptureError: The step cannot be followed without numbers.
        ArgumentError: `gm` is not transformed, or has no plan yet.
    """
    runtime, plan, kind = planned(gm)
    if not isinstance(gm, Transformed):
        raise ArgumentError(f"`gm` should be what `perexfx.transform` returned. Found {type(gm).__name__}.")
    if plan.batch_size == 0:
        raise ArgumentError(
            "The last batch had no examples, and its step has no paths. Call the module on one that has."
        )
    proofs = runtime.notes.of(Proof)
    proofs.pop((kind, plan.batch_size), None)
    flow = dataflow(gm, plan, kind)
    proof = prove(
        flow, _own_sites(runtime.sites.sites), batch_size=plan.batch_size, factors=_said_of_factors(runtime.settings)
    )
    proof = replace(proof, reweighted=len(plan.reweighted))
    proofs[kind, plan.batch_size] = proof
    return proof


def _own_sites(sites: Iterable[Site]) -> dict[str, list[Key]]:
    """Parameter -> the operands of sites that it is used by."""
    found: dict[str, list[Key]] = {}
    for site in sites:
        for operand in site.operands:
            for name in operand.expression.parameters:
                found.setdefault(name, []).append((site.name, operand.name))
    return found


def _said_of_factors(settings: Settings) -> str:
    if callable(settings.clipping):
        return "What a function of the user's makes of the norms to get them is not examined."
    return "" if settings.clip_norm is not None else "With clip_norm=None the factors are ones: nothing is bounded."


def prove(flow: Dataflow, own: Mapping[str, Sequence[Key]], *, batch_size: int, factors: str = "") -> Proof:
    """The three claims, for the dataflow of one step.

    Args:
        flow: The step.
        own: Parameter -> the operands of sites that it is used by.
        batch_size: Of the step.
        factors: What else must be said of the clip factors; "": that they must follow from the norms.

    Raises:
        ProofError: One does not hold.
    """
    products = _passes_the_factors(flow)
    if not factors:
        _follow_from_the_norms(flow)
    _passes_own_sites(flow, own, follows=not factors)
    _is_used_at_sites(flow, own)
    return Proof(
        batch_size=batch_size,
        factors=factors,
        operations=flow.graph.number_of_nodes(),
        edges=flow.graph.number_of_edges(),
        gradients=sum(node is not None for node in flow.gradients.values()),
        products=dict(sorted(Counter(flow.operations[node].name for node in products).items())),
        handed_over=len({node for nodes in flow.handed_over.values() for node in nodes}),
        sites=len({site for site, _ in flow.handed_over}),
    )


_LAST_OF_FACTORS = "masked_fill"
"""The operation by which `perexfx.runtime.clip_factors` ends: it drops examples that are not finite."""


def _passes_the_factors(flow: Dataflow) -> list[int]:
    """The products in which examples' data meet the clip factors, on every path to a gradient.

    Raises: ProofError, where a path has none, where factors are changed before they get there, or where what comes
    out is changed in a way that is not known to be linear.
    """
    for factor in sorted(flow.factors):
        if flow.operations[factor].name != _LAST_OF_FACTORS:
            raise ProofError(f"{flow.operations[factor]} changes the clip factors in place, after they were made.")
    clipped = _from(flow.graph, flow.factors)
    unclipped = flow.graph.subgraph(set(flow.graph) - clipped)
    raw = _from(unclipped, flow.inputs)
    for name, gradient in flow.gradients.items():
        if gradient is not None and gradient in raw:
            raise ProofError(
                f"The gradient of `{name}` is not clipped. {_path(flow, unclipped, flow.inputs, gradient)}"
            )
    ends = {node for node in flow.gradients.values() if node is not None} | {flow.norms}
    meeting, moved = [], set(flow.factors)
    for node in sorted(clipped - flow.factors - ends):
        found = flow.operations[node]
        factors = {name for name, nodes in found.given if nodes & clipped}
        data = {name for name, nodes in found.given if nodes & raw}
        read = {before for _, nodes in found.given for before in nodes & clipped}
        is_pure = keeps_fractions(found.numbers) and _adds_nothing(flow, found, clipped)
        is_changed = data and read & moved and not (read <= moved and is_multiplied(found.name, factors))
        if data and not (is_pure and is_product(found.name, found.numbers, factors, data)):
            raise ProofError(
                f"{found} joins what belongs to examples with the clip factors, and is not known to be a product of "
                f"the two. {_path(flow, unclipped, flow.inputs, *_given_by(flow, node, raw))}"
            )
        if data and not is_changed:
            meeting.append(node)
        elif not data and read <= moved and is_pure and _moves(found, moved):
            moved.add(node)
        elif read & moved:
            path = _path(flow, flow.graph, flow.factors, node)
            raise ProofError(f"{found} changes the clip factors before they are multiplied with anything. {path}")
        elif not (is_pure and is_linear(found.name, factors)):
            path = _path(flow, flow.graph, flow.factors, node)
            raise ProofError(f"{found} changes clipped values, and is not known to be linear in them. {path}")
    return meeting


def _adds_nothing(flow: Dataflow, found: Operation, clipped: Set[int]) -> bool:
    """Whether an operation adds, joins or fills in nothing but zeros and what is clipped."""
    added = ADDED.get(found.name, "").split()
    if found.numbers.get("value") or ("other" in added and found.numbers.get("other")):
        return False
    others = [nodes for name, nodes in found.given if name in added and not nodes & clipped]
    return all(nodes and {flow.operations[node].name for node in nodes} <= ZEROS for nodes in others)


def _moves(found: Operation, moved: Set[int]) -> bool:
    """Whether an operation leaves clip factors as they are, and takes nothing else in."""
    given = [nodes for name, nodes in found.given if found.name != "copy_" or name != "self"]
    return found.name in MOVES and all(nodes and nodes <= moved for nodes in given)


def _made_of(flow: Dataflow, factor: int) -> set[int]:
    """What clip factors are made of; the mask that drops examples, as second argument, is not counted."""
    values = {node for name, nodes in flow.operations[factor].given if name == "self" for node in nodes}
    return values.union(*(nx.ancestors(flow.graph, node) for node in values))


def _follow_from_the_norms(flow: Dataflow) -> None:
    """That the factors are made of the norms: of all together, or, with `clipping="per_layer"`, of what enters them."""
    handed = {node for nodes in flow.handed_over.values() for node in nodes}
    counted = handed & nx.ancestors(flow.graph, flow.norms)
    for factor in flow.factors:
        if flow.handed_over and not _made_of(flow, factor) & counted:
            raise ProofError(f"The clip factors do not depend on the norms. {flow.operations[factor]} reads none.")
    if flow.is_per_layer:
        norms = set(flow.graph.pred[flow.norms])  # by which examples that are not finite are dropped
        left = nx.restricted_view(flow.graph, handed | norms, [])
        for factor in sorted(flow.factors):
            if sources := nx.ancestors(left, factor).intersection(flow.inputs):
                path = _path(flow, left, sorted(sources), factor)
                raise ProofError(f"The clip factors of a layer have more in them than its norms. {path}")


def _passes_own_sites(flow: Dataflow, own: Mapping[str, Sequence[Key]], *, follows: bool) -> None:
    """That nothing of an example reaches a gradient but by the norms and by what the parameter's own sites hand over,
    and that all of this enters the norms, and the factors that it is multiplied with.

    Args:
        flow: The step.
        own: Parameter -> the operands of sites that it is used by.
        follows: Whether factors must follow from the norms.
    """
    norms = set(flow.graph.pred[flow.norms])
    if flow.is_per_layer:
        norms |= flow.factors
    counted = nx.ancestors(flow.graph, flow.norms)
    made_of = {factor: _made_of(flow, factor) for factor in flow.factors} if follows else {}
    after_norms = flow.graph.subgraph(set(flow.graph) - norms | flow.factors)
    for name, gradient in flow.gradients.items():
        if gradient is None:
            continue
        handed = {node: key for key in own.get(name, ()) for node in flow.handed_over.get(key, ())}
        left = nx.restricted_view(flow.graph, norms | handed.keys(), [])
        behind = nx.ancestors(left, gradient) | {gradient}
        if sources := behind.intersection(flow.inputs):
            path = _path(flow, left, sorted(sources), gradient)
            raise ProofError(f"The gradient of `{name}` has more in it than its sites hand over. {path}")
        with_factors = nx.ancestors(after_norms, gradient)
        for node, (site, operand) in handed.items():
            if not behind.intersection(flow.graph.succ[node]):
                continue
            if node not in counted:
                path = _path(flow, flow.graph, [node], gradient)
                raise ProofError(f"What site `{site}` hands over for `{operand}` is not in the norms. {path}")
            if any(node not in made_of[factor] for factor in made_of.keys() & with_factors):
                path = _path(flow, flow.graph, [node], gradient)
                raise ProofError(
                    f"The gradient of `{name}` is multiplied with clip factors that do not follow from what site "
                    f"`{site}` hands over for `{operand}`. {path}"
                )


def _is_used_at_sites(flow: Dataflow, own: Mapping[str, Sequence[Key]]) -> None:
    """That a parameter reaches the outputs by its sites alone."""
    for name, parameter in flow.parameters.items():
        sites = {site for site, _ in own.get(name, ())}
        elsewhere = [n for n, found in flow.operations.items() if found.carries_gradient and found.site not in sites]
        left = flow.graph.subgraph(elsewhere)
        reached = _from(left, [parameter]) & set(flow.outputs)
        if reached:
            raise ProofError(
                f"Parameter `{name}` is used where no site is. {_path(flow, left, [parameter], min(reached))}"
            )


def _from(graph: nx.DiGraph, sources: Iterable[int]) -> set[int]:
    """Everything that can be reached, the sources included."""
    found = {node for node in sources if node in graph}
    return found.union(*(nx.descendants(graph, node) for node in found))


def _given_by(flow: Dataflow, node: int, among: set[int]) -> list[int]:
    return sorted({before for _, nodes in flow.operations[node].given for before in nodes & among})


def _path(flow: Dataflow, graph: nx.DiGraph, sources: Iterable[int], *targets: int) -> str:
    """The shortest path in words."""
    paths = [
        nx.shortest_path(graph, source, target)
        for source in sources
        for target in targets
        if source in graph and target in graph and nx.has_path(graph, source, target)
    ]
    steps = [str(flow.operations[node]) for node in min(paths, key=len)]
    return "The path: " + " -> ".join(steps) + "."


__all__ = ["Proof", "prove", "verify"]
