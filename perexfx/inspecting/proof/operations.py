"""The operations of a step, recorded as a graph: who may have written what each of them reads.

Promises: whatever a call might read of an earlier one is an edge: memory is followed by its storage, so views and
writes in place are too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import networkx as nx
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from perexfx.analysis import leaves_of
from perexfx.ir.factors import Factors, Product
from perexfx.ir.schemas import arguments_by_name, names_written
from perexfx.ir.site import Key


@dataclass(frozen=True)
class Operation:
    """A node of the dataflow.

    Attributes:
        name: Of the aten operation, or what the node stands for.
        where: The part of the step that it belongs to; "" where that is not known.
        site: The site in whose forward or backward it ran, or "".
        carries_gradient: Whether a gradient may pass through it.
        given: Per tensor argument its name in the schema and the nodes that it was made by.
        numbers: The arguments that are no tensors, by name.
    """

    name: str
    where: str = ""
    site: str = ""
    carries_gradient: bool = True
    given: tuple[tuple[str, frozenset[int]], ...] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name} ({self.where})" if self.where else self.name


class Recorder(TorchDispatchMode):
    """Makes a node of every call that computes or writes something."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = nx.DiGraph()
        self.operations: dict[int, Operation] = {}
        self.handed_over: dict[Key, tuple[int, ...]] = {}
        self.where = ""
        self.site = ""
        self.carries_gradient = True
        self._made: dict[int, frozenset[int]] = {}  # storage -> who may have written what is in it
        self._alive: list[Any] = []  # a storage's address is its name: none may be used again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        named = arguments_by_name(func, args, kwargs)
        read = [] if _name(func) in _READ_SIZES_ALONE else list(named.items())
        if _name(func) in _OVERWRITE and _is_whole(args[0]):
            read = read[1:]
        given = [(name, self.made(tensor)) for name, value in read for tensor in leaves_of(value)]
        own = {storage_of(tensor) for tensor in leaves_of((args, kwargs))}
        written = [tensor for name in names_written(func) for tensor in leaves_of(named.get(name))]
        result = func(*args, **kwargs)
        is_reread = _name(func) == "view" and func._overloadname == "dtype"  # other numbers in the same memory
        new = [tensor for tensor in leaves_of(result) if is_reread or storage_of(tensor) not in own]
        if new or written:
            made = (*new, *written)
            passes = self.carries_gradient and any(t.is_floating_point() or t.is_complex() for t in made)
            numbers = {name: value for name, value in named.items() if not leaves_of(value)}
            node = self._add(Operation(_name(func), self.where, self.site, passes, tuple(given), numbers))
            for tensor in made:
                self._make(tensor, node)
        return result

    @contextmanager
    def at(self, site: str, where: str) -> Iterator[None]:
        """What runs inside belongs to a site."""
        before = self.where, self.site
        self.where, self.site = where, site
        yield
        self.where, self.site = before

    def made(self, tensor: Tensor) -> frozenset[int]:
        """The nodes that a tensor was made by; none for what was there before and is no source."""
        return self._made.get(storage_of(tensor), frozenset())

    def add_source(self, tensor: Tensor, name: str) -> int:
        """A node for what was there before."""
        node = self._add(Operation(name))
        self._make(tensor, node)
        return node

    def add_sink(self, tensor: Tensor | None, name: str) -> int:
        """A node for what comes out."""
        made = frozenset() if tensor is None else self.made(tensor)
        return self._add(Operation(name, given=((name, made),)))

    def hand_over(self, key: Key, factors: Factors, known: dict[Any, Tensor]) -> Factors:
        """Factors in memory of their own, so that what is read of them can be told from all else.

        Args:
            key: Site and operand.
            factors: What the site's backward has left.
            known: Tensors of the same backward that have theirs.
        """
        is_shared = isinstance(factors, Product) and factors.right_gram is not None
        own = known if is_shared else {}  # else equal gradients of two operands could not be told apart
        copied = _with_tensors(factors, lambda tensor: _copy(tensor, own))
        nodes = {node for tensor in leaves_of(copied) for node in self.made(tensor)}
        self.handed_over[key] = tuple(sorted(nodes))
        return copied

    def _add(self, operation: Operation) -> int:
        node = len(self.operations)
        self.operations[node] = operation
        self.graph.add_node(node)
        self.graph.add_edges_from((before, node) for _, nodes in operation.given for before in nodes)
        return node

    def _make(self, tensor: Tensor, node: int) -> None:
        self._alive.append(tensor.untyped_storage())
        self._made[storage_of(tensor)] = frozenset((node,))


_READ_SIZES_ALONE = frozenset(
    "new_empty new_empty_strided new_zeros new_ones new_full "
    "empty_like zeros_like ones_like full_like rand_like randn_like".split()
)
"""Operations that take nothing from a tensor but its size and dtype."""


_OVERWRITE = frozenset("zero_ fill_ copy_".split())
"""Operations after which nothing is left of the tensor that they are given first."""


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor is all that there is in its memory."""
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def _name(func: Any) -> str:
    return func._schema.name.removeprefix("aten::")


def storage_of(tensor: Tensor) -> int:
    """What tells a tensor's memory from other memory."""
    return tensor.untyped_storage()._cdata


def _copy(tensor: Tensor, known: dict[Any, Tensor]) -> Tensor:
    """The same numbers in memory of their own; once for all views that see the same."""
    seen = storage_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride()
    if seen not in known:
        known[seen] = tensor.clone()
    return known[seen]


def _with_tensors(value: Any, change: Any) -> Any:
    """The same value with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_with_tensors(part, change) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {each.name: getattr(value, each.name) for each in fields(value) if each.init}
        changed = {name: _with_tensors(part, change) for name, part in parts.items()}
        return replace(value, **{name: part for name, part in changed.items() if part is not parts[name]})
    return value


__all__ = ["Operation", "Recorder", "storage_of"]
