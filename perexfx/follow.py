"""Following: where each value of a recorded run carries its examples.

Promises: a value that carries examples has one layout, or the node that made it is refused; a value that depends on the
number of examples in any other way never meets one. In-place writes are followed into every value that shares memory.
"""

from __future__ import annotations

from torch import Tensor, fx

from perexfx.axes import OpCall, propagate
from perexfx.created import MOVES, UNIFORM, created_layout, sizes_of
from perexfx.inputs import Inputs
from perexfx.ir.errors import MixingError, RefusedError
from perexfx.ir.layout import Layout
from perexfx.ir.node import place_of
from perexfx.ir.refusal import Refusal
from perexfx.record import Call, Run, leaves_of
from perexfx.tags import Mixing, Unknown


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
        uniform: Tensors of equal entries, as many as the batch size asks for: they go with any layout.
        varying: Tensors that differ with the batch size in any other way: they must not meet examples.
        lost: Results of calls that were refused.
    """

    def __init__(self, n: int, other_n: int, refusals: Refusals) -> None:
        self.n, self.other_n, self.refusals = n, other_n, refusals
        self.layouts: dict[int, Layout] = {}
        self.uniform: set[int] = set()
        self.varying: set[int] = set()
        self.lost: set[int] = set()
        self.sharing: dict[int, list[Tensor]] = {}

    def follow(self, call: Call, twin: Call) -> None:
        """One aten call, and its twin in the run with another batch size."""
        results, given = leaves_of(call.result), leaves_of((call.args, call.kwargs))
        if any(id(tensor) in self.lost for tensor in given):
            self.lost.update(id(tensor) for tensor in results)
            return
        try:
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
        for tensor in results:
            self.sharing.setdefault(_storage(tensor), []).append(tensor)

    def _follow_examples(self, call: Call, twin: Call, results: list[Tensor], given: list[Tensor]) -> None:
        if any(id(tensor) in self.varying for tensor in given):
            raise Mixing("it combines examples with a value that depends on their number or position")
        op = OpCall(call.func, call.args, call.kwargs, call.result, self.layouts, self.n)
        if unexplained := call.differing_numbers(twin) - sizes_of(op):
            raise Mixing(f"it computes with the number of examples (`{sorted(unexplained)[0]}`)")
        found = propagate(op)
        for tensor, other, layout in zip(results, leaves_of(twin.result), found, strict=True):
            if layout is None:
                self._follow_created(op, tensor, other)
                continue
            for axis, (size, other_size) in enumerate(zip(tensor.shape, other.shape, strict=True)):
                if axis != layout.axis and size != other_size:
                    raise Mixing("its result has a second axis that grows with the number of examples")
            self._check_written(tensor, layout, given)
            self.layouts[id(tensor)] = layout

    def _follow_constants(self, call: Call, twin: Call, results: list[Tensor], given: list[Tensor]) -> None:
        """A call that reads no examples: does its result depend on their number?"""
        op = OpCall(call.func, call.args, call.kwargs, call.result, self.layouts, self.n)
        reads_varying = any(id(tensor) in self.varying for tensor in given)
        reads_uniform = any(id(tensor) in self.uniform for tensor in given)
        differing = call.differing_numbers(twin) - sizes_of(op)
        for tensor, other in zip(results, leaves_of(twin.result), strict=True):
            if reads_varying or differing or (reads_uniform and op.name not in MOVES):
                self.varying.add(id(tensor))
            elif tensor.shape != other.shape:
                if reads_uniform:
                    self.uniform.add(id(tensor))
                else:
                    self._follow_created(op, tensor, other)

    def _follow_created(self, op: OpCall, tensor: Tensor, other: Tensor) -> None:
        """A value that reads no example but has rows for each (`cls.expand(B, ..)`, `zeros(B, ..)`)."""
        sizes = list(zip(tensor.shape, other.shape, strict=True))
        grown = [axis for axis, (size, other_size) in enumerate(sizes) if size != other_size]
        if not grown:
            return
        layout = created_layout(op, tensor, grown, sizes[grown[0]] == (self.n, self.other_n))
        if layout is not None:
            self.layouts[id(tensor)] = layout
        elif op.name in UNIFORM:
            self.uniform.add(id(tensor))
        else:
            self.varying.add(id(tensor))

    def _check_written(self, tensor: Tensor, layout: Layout, given: list[Tensor]) -> None:
        """An in-place result must not bring examples into memory that other values know to be free of them."""
        is_written = any(tensor is argument for argument in given)
        if not is_written or self.layouts.get(id(tensor)) == layout:
            return
        others = (other for other in self.sharing.get(_storage(tensor), ()) if other is not tensor)
        if any(id(other) not in self.layouts for other in others):
            raise Unknown("it writes examples into a part of a value that carried none")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
