"""From a graph over images to one over images of half the size, node by node.

Promises: a coarse value is the fine one's, at about its mean over blocks of two by two, and has ceil(N / 2) pixels
where that has N; what is not known to work on coarse images reads them grown to their fine size. Every node that does
other work than before is a `Change`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import fx

from perexfx.ir.errors import RefusedError
from perexfx.ir.node import annotate, info_of, place_of
from perexfx.ir.refusal import Refusal
from perexfx.kernels.coarse import grow, half, shrink
from perexfx.rewrites.rewritten import Change
from perexfx.rewrites.subject import Subject

IMAGE = 4
"""Axes of what is taken for images: examples, channels, height, width."""

SIDES = "perexfx_sides"
"""Name of the module that draws, and of its node."""


Handler = Callable[["Coarsening", fx.Node], bool]
"""Writes what becomes of a node that reads coarse images; False: it must read grown ones."""


class Coarsening:
    """Writes the new graph.

    Attributes:
        graph: What is written.
        changes: What became of nodes, in graph order.
        drawn: How many convolutions have sides.
        keeps_tokens: Whether maps that are flattened into tokens stay coarse.
        of_tokens: The nodes that are computed of such tokens.
        grid: Fine size of the map that they are of.
        with_tokens: Writes a node that reads them.
        kernel: "side", "galerkin" or "average".
        pool: How input images are shrunk: "average" or "max".

    Args:
        subject: The model, with shapes.
        handlers: By the name of the operation.
        kernel: As above.
        pool: As above.
        last: The last node that may be coarse; None: all may.
    """

    def __init__(
        self, subject: Subject, handlers: Mapping[str, Handler], kernel: str, pool: str, last: fx.Node | None
    ) -> None:
        assert subject.shapes is not None
        self.subject, self.shapes, self.handlers = subject, subject.shapes, handlers
        self.kernel, self.pool = kernel, pool
        self.graph = fx.Graph()
        self.new: dict[fx.Node, Any] = {}
        self.coarse: set[fx.Node] = set()
        self.grown: dict[fx.Node, fx.Node] = {}
        self.changes: list[Change] = []
        self.drawn = 0
        self.sides: fx.Node | None = None
        self.last, self.is_over = last, False
        self.keeps_tokens = False
        self.of_tokens: set[fx.Node] = set()
        self.grid: tuple[int, ...] | None = None
        self.with_tokens: Callable[[Coarsening, fx.Node], None] | None = None

    def run(self) -> fx.Graph:
        """The graph over coarse images."""
        old = self.subject.graph
        for node in old.nodes:
            if node.op == "placeholder":
                self.new[node] = self.copied(node)
        self.sides = self.graph.create_node("call_module", SIDES, name=SIDES)
        for node in old.nodes:
            if node.op == "placeholder":
                self._shrink_input(node)
        for node in old.nodes:
            if node.op != "placeholder":
                self._add(node)
            self.is_over = self.is_over or node is self.last
        if not self.drawn:
            self.graph.erase_node(self.sides)
        return self.graph

    @property
    def count(self) -> int:
        """Fine number of tokens."""
        assert self.grid is not None
        return self.grid[0] * self.grid[1]

    def is_image(self, node: fx.Node) -> bool:
        """Whether a node's value has the axes of images, and more than one pixel."""
        shape = self.shapes.get(node.name, ())
        return len(shape) == IMAGE and max(shape[2:]) > 1

    def size(self, node: fx.Node) -> tuple[int, ...]:
        """Fine size of a value."""
        return self.shapes[node.name][2:]

    def call(self, at: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A further node for one of the old graph."""
        return self._created(f"{at.name}_{target.__name__}", at, target, args, kwargs)

    def instead(self, at: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """The node that takes the place, and the name, of one of the old graph."""
        return self._created(at.name, at, target, args, kwargs)

    def _created(self, name: str, at: fx.Node, target: Callable[..., Any], args: Any, kwargs: Any) -> fx.Node:
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        return annotate(node, replace(info_of(at), overwrites=False))

    def note(self, node: fx.Node, before: str, after: str) -> None:
        """Keeps what became of a node."""
        self.changes.append(Change(place_of(node), before, after))

    def copied(self, node: fx.Node) -> fx.Node:
        """The node as it is."""
        return self.graph.node_copy(node, self.new.__getitem__)

    def _shrink_input(self, node: fx.Node) -> None:
        if not self.is_image(node) or node.name not in self.subject.floating:
            return
        size = self.size(node)
        self.new[node] = self.call(node, shrink, self.new[node], self.pool)
        self.coarse.add(node)
        self.note(node, f"image of {by(size)}", f"{self.pool} of blocks of 2 x 2: {by(half(size))}")

    def _add(self, node: fx.Node) -> None:
        if self._is_of_sizes(node):
            return
        read = [value for value in node.all_input_nodes if value in self.coarse]
        self._refuse_lost_writes(node, read)
        if self.with_tokens is not None and not read and self.of_tokens.intersection(node.all_input_nodes):
            self.with_tokens(self, node)
            return
        handler = self.handlers.get(_kind_of(node, self.subject)) if read and not self.is_over else None
        if read and (handler is None or not handler(self, node)):
            self._on_whole(node)
        elif not read:
            self.new[node] = self.copied(node)

    def _is_of_sizes(self, node: fx.Node) -> bool:
        """Takes a part of a shape that is a tuple of numbers and nodes here, where a node does so."""
        shape = self.new.get(node.args[0]) if node.target is operator.getitem and node.args else None  # pyright: ignore[reportArgumentType]
        if not isinstance(shape, tuple):
            return False
        self.new[node] = shape[node.args[1]]  # pyright: ignore[reportArgumentType, reportCallIssue]
        return True

    def _refuse_lost_writes(self, node: fx.Node, read: list[fx.Node]) -> None:
        """Raises: RefusedError, where a node writes into a coarse image by way of a view of its grown copy."""
        written = node.args[0] if node.args else None
        writes = self.subject.written_by
        if not isinstance(written, fx.Node) or written in read or written.name not in writes:
            return
        for value in self.coarse:
            if node.name in writes.get(value.name, ()):
                raise _refused(
                    node,
                    f"writes in place into `{value.name}` by way of a view of it.",
                    "The image is coarse, the view is of a grown copy, and the write would be lost.",
                    "Compute a new value there, or let only the stages before it be coarse (`until=`).",
                )

    def _on_whole(self, node: fx.Node) -> None:
        """The node on grown images, unless it works on coarse ones as on fine."""
        if not self.is_over and works_on_either(node, self):
            self.on_coarse(node)
            return
        given = dict(self.new)
        names = [value for value in node.all_input_nodes if value in self.coarse]
        for value in names:
            given[value] = self.whole(value)
        self.new[node] = self.graph.node_copy(node, given.__getitem__)
        sizes = ", ".join(by(self.size(value)) for value in names if value.name in self.shapes)
        self.note(node, label(node, self.subject), f"the same, of images grown to {sizes}")

    def on_coarse(self, node: fx.Node) -> None:
        """The node on coarse images; tables of parameters of the fine size are pooled."""
        given = dict(self.new)
        for value in node.all_input_nodes:
            if value not in self.coarse and self.is_table(value, node):
                pooled = self.call(value, F.avg_pool2d, self.new[value], 2, ceil_mode=True)
                given[value] = pooled
                self.note(value, f"table of {by(self.size(value))}", f"mean of blocks: {by(half(self.size(value)))}")
        self.new[node] = self.graph.node_copy(node, given.__getitem__)
        self.coarse.add(node)

    def is_table(self, value: fx.Node, reader: fx.Node) -> bool:
        """Whether a value that is not coarse has the fine size of what is computed from it."""
        shape = self.shapes.get(value.name, ())
        fine = self.shapes.get(reader.name, ())
        is_fine = len(shape) == IMAGE and shape[2:] == fine[2:] and max(shape[2:]) > 1
        return is_fine and value.name in self.subject.floating

    def is_of_parameters(self, node: fx.Node) -> bool:
        """Whether a value is made of parameters, buffers and constants alone."""
        return node.op != "placeholder" and all(map(self.is_of_parameters, node.all_input_nodes))

    def whole(self, value: fx.Node) -> fx.Node:
        """A coarse value at its fine size."""
        if value.name not in self.shapes:
            raise _refused(
                value,
                "is several coarse images at once, which cannot be grown to their fine size.",
                "What is not known to work on coarse images reads them grown to their fine size.",
                "Take them apart first, or let only the stages before it be coarse (`until=`).",
            )
        if value not in self.grown:
            self.grown[value] = self.call(value, grow, self.new[value], self.size(value))
        return self.grown[value]

    def replaced(self, node: fx.Node, new: fx.Node, before: str, after: str) -> bool:
        """Puts a new coarse node in the place of an old one. Returns: True."""
        self.new[node] = new
        self.coarse.add(node)
        self.note(node, before, after)
        return True

    def side(self, at: fx.Node) -> fx.Node:
        """The side of one more convolution."""
        assert self.sides is not None
        found = self.call(at, operator.getitem, self.sides, self.drawn)
        self.drawn += 1
        return found


def _refused(node: fx.Node, what: str, why: str, remedy: str) -> RefusedError:
    """An error that begins with the place of a node."""
    place = place_of(node)
    return RefusedError([Refusal(f"{place} {what}", why, remedy, place)])


def by(size: tuple[int, ...]) -> str:
    """A size in words."""
    return " x ".join(map(str, size))


def label(node: fx.Node, subject: Subject) -> str:
    """What a node does, by its name."""
    if node.op == "call_module":
        return type(subject.twin.get_submodule(str(node.target))).__name__
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _kind_of(node: fx.Node, subject: Subject) -> str:
    """Name of the operation, whichever way it is called."""
    if node.op == "call_module":
        owner = subject.twin.get_submodule(str(node.target))
        return type(owner).__name__ if type(owner).__module__.startswith("torch.nn") else ""
    if node.op not in ("call_function", "call_method"):
        return ""
    return label(node, subject)


def works_on_either(node: fx.Node, c: Coarsening) -> bool:
    """Whether a node computes entry by entry, on values that are coarse, or have no space, or are tables."""
    if node.name not in c.subject.pointwise or not c.is_image(node):
        return False
    fine = c.size(node)
    for value in node.all_input_nodes:
        shape = c.shapes.get(value.name)
        if value in c.coarse:
            if shape is None or shape[2:] != fine:
                return False
        elif shape is not None and len(shape) >= 2 and max(shape[-2:]) > 1:
            is_plain = len(shape) < IMAGE and shape[-1] == 1 == shape[-2]
            if not is_plain and not (c.is_table(value, node) and c.is_of_parameters(value)):
                return False
        elif shape is not None and len(shape) == 1 and shape[0] > 1:
            return False
    return True


__all__ = ["SIDES", "Coarsening", "Handler", "by", "label", "works_on_either"]
