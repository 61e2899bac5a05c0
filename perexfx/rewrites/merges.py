"""Where a graph merges the logits of parallel pathways.

Promises: a merge is found as a whole, nested additions and all; its terms are computed side by side, none from another,
so that a residual addition is no merge. What looks like a merge and is none has a reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.utils import _pytree as pytree

from perexfx.ir.node import info_of
from perexfx.rewrites.operands import (
    addends,
    ancestors,
    carriers,
    is_dict,
    is_of_probabilities,
    scaled,
    stacked,
    writes,
)


@dataclass(frozen=True)
class Term:
    """What one pathway adds to a merge.

    Attributes:
        value: The node that is added.
        reader: The node that reads the value: the addition, or what stands for it.
        logits: The pathway's own logits, without the merge's weight.
        logits_reader: The node that reads the logits: where they have a weight, the multiplication by it.
        factor: A number that the merge multiplies the value by.
    """

    value: fx.Node
    reader: fx.Node
    logits: fx.Node
    logits_reader: fx.Node
    factor: float


@dataclass(frozen=True)
class Merge:
    """A place where pathways' logits are merged.

    Attributes:
        node: Whose value is the merge; the output where heads are returned apart.
        terms: By pathway.
        kind: "sum", "mean", or "heads" where they are returned apart.
        parts: The additions that it is made of, without the last one.
    """

    node: fx.Node
    terms: tuple[Term, ...]
    kind: str
    parts: frozenset[fx.Node] = frozenset()

    def __str__(self) -> str:
        names = ", ".join(f"`{term.logits.name}`" for term in self.terms)
        return f"{len(self.terms)} heads, {names}" if self.kind == "heads" else f"the {self.kind} of {names}"


@dataclass(frozen=True)
class Miss:
    """What is no merge, though it looks like one.

    Attributes:
        node: Where.
        reason: Why not, as the rest of a sentence that begins with the node.
        remedy: What to do about it.
        parts: The additions that it is made of, which are no merges either.
    """

    node: fx.Node
    reason: str
    remedy: str
    parts: frozenset[fx.Node]


@dataclass(frozen=True)
class Found:
    """What was found in a graph, in its order."""

    merges: tuple[Merge, ...]
    misses: tuple[Miss, ...]


@dataclass(frozen=True)
class Logits:
    """How logits are told from other values.

    Attributes:
        shapes: Of the graph's tensors by node; None where they are not known.
        shape: Of logits, examples first.
    """

    shapes: Mapping[str, tuple[int, ...]] | None
    shape: tuple[int, int]


def find_merges(graph: fx.Graph, module: nn.Module, logits: Logits, named: str | None = None) -> Found:
    """The merges of a graph.

    With shapes, a pathway's logits have that of logits. Without, a merge counts where its value is what the model
    returns, but for scaling and reshaping.

    Args:
        graph: In functional form.
        module: Holds the modules that it names.
        logits: How they are told.
        named: Only at this node, which then need not be what the model returns.
    """
    search = _Search(graph, module, logits)
    inner: set[fx.Node] = set()
    merges: list[Merge] = []
    misses: list[Miss] = []
    for node in reversed(graph.nodes):  # from the outside in: additions inside of a merge are part of it
        if (named is not None and node.name != named) or node in inner:
            continue
        if named is None and logits.shapes is None and not _is_returned(node, search.carrying):
            continue
        found = search.at(node)
        if found is not None:
            inner |= found.parts
        if isinstance(found, Merge):
            merges.append(found)
        elif found is not None:
            misses.append(found)
    return Found(tuple(reversed(merges)), tuple(reversed(misses)))


@dataclass(frozen=True)
class _Added:
    """One value of a sum: what, by which addition, how many times."""

    value: Any
    reader: fx.Node
    factor: float = 1.0


class _Search:
    """Looks at nodes for merges."""

    def __init__(self, graph: fx.Graph, module: nn.Module, logits: Logits) -> None:
        self.module, self.logits = module, logits
        self.carrying = carriers(graph)
        self.order = {node: at for at, node in enumerate(graph.nodes)}
        self.before: dict[fx.Node, set[fx.Node]] = {}

    def at(self, node: fx.Node) -> Merge | Miss | None:
        """The merge at a node; why there is none; None where nothing looks like one."""
        if node.op == "output":
            return self._checked(node, self._heads(node), "heads", frozenset())
        if (of_stack := stacked(node, self._rank)) is not None:
            values, kind = of_stack
            factor = 1 / len(values) if kind == "mean" else 1.0
            stack = node.all_input_nodes[0]
            return self._checked(node, [_Added(value, stack, factor) for value in values], kind, frozenset())
        if addends(node) is None:
            return None
        added, parts = self._taken_apart(node)
        return self._checked(node, added, "sum", frozenset(parts))

    def _rank(self, node: fx.Node) -> int:
        """The rank of a node's value; that of logits where it is not known."""
        return len(self._shape(node) or self.logits.shape)

    def _shape(self, node: fx.Node) -> tuple[int, ...] | None:
        """The shape of a node's value, where it is known."""
        return None if self.logits.shapes is None else self.logits.shapes.get(node.name)

    def _is_logits(self, value: Any) -> bool:
        """Whether a value is computed from examples, and has the shape of logits where shapes are known."""
        if not isinstance(value, fx.Node) or value not in self.carrying or value.op == "placeholder":
            return False
        return self.logits.shapes is None or self._shape(value) == self.logits.shape

    def _taken_apart(self, root: fx.Node) -> tuple[list[_Added], set[fx.Node]]:
        """What a sum adds, and the additions inside of it.

        An addition inside is not taken apart where it is a pathway's own, by a bias or by what is computed from its
        other value, and where something is computed from it.
        """
        found: list[_Added] = []
        parts: set[fx.Node] = set()
        for value, factor in addends(root) or []:
            whole = _Added(value, root, factor)
            if not self._is_logits(value) or addends(value) is None:
                found.append(whole)
                continue
            inside, inner = self._taken_apart(value)
            logits = [each.value for each in inside if self._is_logits(each.value)]
            has_bias = any(isinstance(each.value, fx.Node) and not self._is_logits(each.value) for each in inside)
            others = [other for other, _ in addends(root) or [] if isinstance(other, fx.Node)]
            if self._dependent(logits) or (len(logits) < 2 and has_bias) or self._dependent([value, *others]):
                found.append(whole)
                continue
            found += [_Added(each.value, each.reader, factor * each.factor) for each in inside]
            parts |= {value, *inner}
        return found, parts

    def _heads(self, output: fx.Node) -> list[_Added]:
        """What is returned in a container, where all of it are logits."""
        returned: Any = output.args[0]
        if isinstance(returned, fx.Node) and returned.op == "call_function" and is_dict(returned.target):
            returned = (returned.args, returned.kwargs)
        if isinstance(returned, fx.Node):
            return []
        parts = [leaf for leaf in pytree.tree_leaves(returned) if isinstance(leaf, fx.Node)]
        if not all(self._is_logits(part) for part in parts):
            return []
        return [_Added(part, output, 1 / len(parts)) for part in parts]

    def _checked(self, node: fx.Node, added: list[_Added], kind: str, parts: frozenset[fx.Node]) -> Merge | Miss | None:
        """A merge of what is added; why it is none; None where fewer than two are logits."""
        terms = tuple(self._term(each, node) for each in added if self._is_logits(each.value))
        if len(terms) < 2:
            return None
        reason = self._why_not(terms) or self._read_again(node, parts)
        return Miss(node, *reason, parts) if reason else Merge(node, terms, kind, parts)

    def _term(self, added: _Added, merge: fx.Node) -> Term:
        """A term, and its logits without the weights that the merge gives it: those written where it is."""
        logits, reader = added.value, added.reader
        while info_of(logits).module == info_of(merge).module:
            inner = scaled(logits, self.carrying)
            if inner is None or not self._is_logits(inner):
                break
            logits, reader = inner, logits
        return Term(added.value, added.reader, logits, reader, added.factor)

    def _why_not(self, terms: tuple[Term, ...]) -> tuple[str, str] | None:
        """Why terms are not those of parallel pathways, and what to do; None where they are."""
        logits = [term.logits for term in terms]
        for at, own in enumerate(logits):
            if own in logits[:at]:
                return f"merges `{own.name}` with itself", "Write it once, with its weight."
            if is_of_probabilities(own, self.module):
                return f"merges `{own.name}`, which are probabilities", "Merge the logits that they are made of."
        if pair := self._dependent(logits):
            reason = f"merges `{pair[0].name}` with `{pair[1].name}`, which is computed from it"
            return reason, "Merge the pathways' own logits, or name another merge by `merge`."
        return None

    def _dependent(self, nodes: list[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
        """Two nodes of which the second is computed from the first."""
        for node in nodes:
            if node not in self.before:
                self.before[node] = ancestors(node)
            for other in nodes:
                if other in self.before[node]:
                    return other, node
        return None

    def _read_again(self, node: fx.Node, parts: frozenset[fx.Node]) -> tuple[str, str] | None:
        """Whether what a merge is written over is read after it: there it would be the plain merge."""
        for addition in (node, *parts):
            written = addition.args[0] if addition.op != "output" and writes(addition, self.module) else None
            if isinstance(written, fx.Node) and any(self.order[user] > self.order[node] for user in written.users):
                reason = f"is written over `{written.name}`, which is read again after it"
                return reason, "Write `z = a + b` in the place of `a += b`."
        return None


_MOVES = frozenset("to float double half bfloat16 type_as contiguous clone view reshape squeeze unsqueeze".split())


def _is_returned(node: fx.Node, carrying: set[fx.Node]) -> bool:
    """Whether the model returns a value, but for scaling and reshaping."""
    if node.op == "output":
        return False  # what a container holds is told by shapes alone
    for user in node.users:
        if user.op == "output":
            return True
        moves = (user.op == "call_method" and user.target in _MOVES) or scaled(user, carrying) is node
        if moves and _is_returned(user, carrying):
            return True
    return False


__all__ = ["Found", "Logits", "Merge", "Miss", "Term", "find_merges"]
