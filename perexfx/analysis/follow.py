"""Following: where each value of a recorded run carries its examples.

Promises: a value that carries examples has one layout, or the node that made it is refused; a value that depends on the
number of examples in any other way never meets one. In-place writes are followed into every value that shares memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace

from torch import Tensor, fx

from perexfx.analysis.aliases import Memory, is_expanded
from perexfx.analysis.axes.call import Counting, Followed, Mixing, Opaque, OpCall, Unknown
from perexfx.analysis.axes.propagate import propagate
from perexfx.analysis.fake_run import Call, Run
from perexfx.analysis.fresh_values import (
    UNIFORM,
    counts_examples,
    created_layout,
    sizes_of,
    stays_uniform,
    still_counts,
)
from perexfx.ir.errors import MixingError, RefusedError
from perexfx.ir.inputs import Inputs
from perexfx.ir.layout import Layout
from perexfx.ir.node import place_of
from perexfx.ir.refusal import Refusal


class Refusals:
    """Reasons, one per node, until all are raised together."""

    def __init__(self) -> None:
        self.mixing: dict[str, Refusal] = {}
        self.unknown: dict[str, Refusal] = {}

    def mixes(self, node: fx.Node, how: str) -> None:
        """Notes that a node combines examples."""
        place = place_of(node)
        self.mixing.setdefault(
            node.name,
            Refusal(
                what=f"{place} combines different examples: {how}.",
                why="An example's gradient must not depend on the other examples of its batch, "
                "or it has no gradient of its own to clip.",
                remedy="Compute it per example, or outside the model.",
                place=place,
            ),
        )

    def not_followed(self, node: fx.Node, why: str) -> None:
        """Notes that a node cannot be followed."""
        place = place_of(node)
        self.unknown.setdefault(
            node.name,
            Refusal(
                what=f"{place} cannot be followed: {why}.",
                why="Every operation on examples must be known to keep them apart.",
                remedy="Write it with other operations, or compute it outside the model.",
                place=place,
            ),
        )

    def raise_if_any(self) -> None:
        """Raises: MixingError or RefusedError, with every reason noted."""
        if self.mixing:
            raise MixingError([*self.mixing.values(), *self.unknown.values()])
        if self.unknown:
            raise RefusedError(list(self.unknown.values()))


def follow(run: Run, twin: Run, inputs: Inputs, batch_dim: int, refusals: Refusals) -> Follower:
    """Where each recorded tensor of a run carries its examples; the other run shows what follows the batch size."""
    follower = Follower(run.n, twin.n, refusals)
    for name, carries in zip(inputs.names, inputs.carriers, strict=True):
        if carries:
            follower.layouts[id(run.inputs[name])] = Layout(batch_dim)
    for call, other in zip(run.calls, twin.calls, strict=True):
        follower.follow(call, other)
    return follower


class Follower:
    """Carries what is known of each tensor (by `id`) from call to call.

    Attributes:
        layouts: Tensors with one row, or several, per example.
        copies: Equal copies of a constant along the example axis, and the size of each: any order of examples fits.
        counting: Tensors that hold the number of the example that each entry belongs to: `arange(B)`.
        uniform: Tensors of equal entries, as many as the batch size asks for: they go with any layout.
        varying: Tensors that differ with the batch size in any other way: they must not meet examples.
        lost: Results of calls that were refused.
    """

    def __init__(self, n: int, other_n: int, refusals: Refusals) -> None:
        self.n, self.other_n, self.refusals = n, other_n, refusals
        self.layouts: dict[int, Layout] = {}
        self.counting: dict[int, Counting] = {}
        self.copies: dict[int, int] = {}
        self.uniform: set[int] = set()
        self.varying: set[int] = set()
        self.lost: set[int] = set()
        self.memory = Memory()

    def follow(self, call: Call, twin: Call) -> None:
        """One aten call, and its twin in the run with another batch size."""
        results, given = call.results, call.given
        self.memory.note((*given, *results))
        if any(id(tensor) in self.lost for tensor in given):
            self.lost.update(id(tensor) for tensor in results)
            return
        try:
            if len(results) != len(twin.results):
                raise Mixing("it gives another number of results for another number of examples")
            if any(id(tensor) in self.layouts for tensor in given):
                self._follow_examples(call, twin, results, given)
            else:
                self._follow_constants(call, twin, results, given)
        except Mixing as reason:
            self.refusals.mixes(call.node, str(reason))
            self.lost.update(id(tensor) for tensor in results)
        except Unknown as reason:
            self.refusals.not_followed(call.node, str(reason))
            self.lost.update(id(tensor) for tensor in results)

    def op(self, call: Call, twin: Call) -> OpCall:
        """A recorded call, with what is known about its arguments."""
        differing = frozenset(call.differing_numbers(twin))
        counting = {id(t): self.counting[id(t)] for t in call.given if id(t) in self.counting}
        return OpCall(call.func, call.args, call.kwargs, call.result, self.layouts, self.n, counting, differing)

    def _follow_examples(self, call: Call, twin: Call, results: list[Tensor], given: list[Tensor]) -> None:
        if any(id(tensor) in self.varying for tensor in given):
            raise Mixing("it combines examples with a value that depends on their number or position")
        op = self.op(call, twin)
        if unexplained := op.differing - sizes_of(op):
            raise Mixing(f"it computes with the number of examples (`{sorted(unexplained)[0]}`)")
        found = self._propagate(op)
        for tensor, other, layout in zip(results, twin.results, found, strict=True):
            if isinstance(layout, Opaque):
                self.varying.add(id(tensor))
                continue
            if layout is None:
                self._follow_created(op, tensor, other)
                continue
            for axis, (size, other_size) in enumerate(zip(tensor.shape, other.shape, strict=True)):
                if axis != layout.axis and size != other_size:
                    raise Mixing("its result has a second axis that grows with the number of examples")
            if any(tensor is argument for argument in given):
                self._write_examples(tensor, layout)
            self.layouts[id(tensor)] = layout
            self.uniform.discard(id(tensor))
            self.copies.pop(id(tensor), None)

    def _propagate(self, op: OpCall) -> list[Followed]:
        """Where the results carry examples; copies of a constant take the order of the values that they meet."""
        try:
            return propagate(op)
        except (Mixing, Unknown):
            given = [id(tensor) for tensor in op.tensors if id(tensor) in self.layouts]
            free = [key for key in given if key in self.copies]
            for order in {self.layouts[key] for key in given if key not in free}:
                fits = {
                    key: Layout(own.axis, order.before, order.after)
                    for key in free
                    if (own := self.layouts[key]).repeats == order.repeats and order.after % self.copies[key] == 0
                }
                if fits:
                    with suppress(Mixing, Unknown):
                        return propagate(replace(op, layouts={**self.layouts, **fits}, consulted=set()))
            raise

    def _follow_constants(self, call: Call, twin: Call, results: list[Tensor], given: list[Tensor]) -> None:
        """A call that reads no examples: does its result depend on their number?"""
        op = self.op(call, twin)
        reads_uniform = any(id(tensor) in self.uniform for tensor in given)
        varies = any(id(tensor) in self.varying for tensor in given) or bool(op.differing - sizes_of(op))
        varies |= reads_uniform and not stays_uniform(op, self.uniform)
        counts = still_counts(op, self.counting) if op.counting and not varies else None
        varies |= bool(op.counting) and counts is None
        for at, (tensor, other) in enumerate(zip(results, twin.results, strict=True)):
            if counts is not None:
                self.counting[id(tensor)] = counts[at]
            elif (count := counts_examples(op, tensor)) is not None:
                self.counting[id(tensor)] = count
            elif varies:
                self.varying.add(id(tensor))
            elif tensor.shape != other.shape:
                if reads_uniform:
                    self.uniform.add(id(tensor))
                else:
                    self._follow_created(op, tensor, other)
        self._write_constants(op.written, varies)

    def _follow_created(self, op: OpCall, tensor: Tensor, other: Tensor) -> None:
        """A value that reads no example but has rows for each (`cls.expand(B, ..)`, `zeros(B, ..)`)."""
        sizes = list(zip(tensor.shape, other.shape, strict=True))
        grown = [axis for axis, (size, other_size) in enumerate(sizes) if size != other_size]
        if not grown:
            return
        layout = created_layout(op, tensor, grown, sizes[grown[0]] == (self.n, self.other_n))
        if layout is not None:
            self.layouts[id(tensor)] = layout
            if op.name in ("expand", "repeat"):
                self.copies[id(tensor)] = layout.after
        elif op.name in UNIFORM:
            self.uniform.add(id(tensor))
        else:
            self.varying.add(id(tensor))

    def _write_examples(self, tensor: Tensor, layout: Layout) -> None:
        """After an in-place write of examples: every value that shares the memory sees them."""
        if is_expanded(tensor):
            raise Unknown("it writes into an expanded value, several entries of which are one place in memory")
        if self.layouts.get(id(tensor)) == layout:
            return
        for other, seen in self.memory.seen_by_others(tensor, layout, self.layouts, self.n):
            if id(other) not in self.uniform:
                raise Unknown("it writes examples into a part of a value that carried none")
            self.layouts[id(other)] = seen
            self.uniform.discard(id(other))

    def _write_constants(self, written: Iterable[Tensor], varies: bool) -> None:
        """After an in-place write of no examples: entries that were alike, or counted, no longer are."""
        for tensor in written:
            for seen in (tensor, *self.memory.others(tensor)):
                key = id(seen)
                was_known = key in self.counting or (key in self.uniform and seen.numel() != tensor.numel())
                if not varies and not was_known:
                    continue
                if key in self.layouts:
                    raise Mixing("it writes a value that depends on the number of examples into memory that holds some")
                self.counting.pop(key, None)
                self.uniform.discard(key)
                self.varying.add(key)
