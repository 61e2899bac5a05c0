"""Why a node cannot be recorded, in words.

Promises: the node, its line, and what to do instead.
"""

from __future__ import annotations

from torch import fx
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from perexfx.ir.node import place_of
from perexfx.ir.refusal import Refusal

_VALUES_ASKED = {
    "_local_scalar_dense": "it takes a number out of a tensor (`.item()`, `int(t)`, `if t:`)",
    "equal": "it asks whether two tensors are equal",
}
_SIZES_ASKED = {
    "nonzero": "it selects by a mask, or asks where a value is not zero",
    "masked_select": "it selects by a mask",
    "repeat_interleave": "it repeats entries a number of times that is itself in a tensor",
}


def not_linear(node: fx.Node, name: str) -> Refusal:
    """A custom function's backward that a clipped sum could not pass through."""
    place = place_of(node)
    return Refusal(
        what=f"{place} has a backward that is not known to be linear in the gradient it is given (`{name}`).",
        why="A clipped sum of gradients is then not what the backward gives for the clipped sum.",
        remedy="Write the backward with products, sums and moves of the gradient alone.",
        place=place,
    )


def failed(node: fx.Node, n: int, error: Exception) -> Refusal:
    """An error of a node while it ran with fake tensors, for a batch of n."""
    place = place_of(node)
    if isinstance(error, DataDependentOutputException):
        return Refusal(
            what=f"{place} cannot be followed: {_asked(error)}.",
            why="What it does then depends on values, and may differ from batch to batch.",
            remedy="Keep it a tensor, or compute it outside the model and pass it in.",
            place=place,
        )
    if isinstance(error, DynamicOutputShapeException):
        return Refusal(
            what=f"{place} cannot be followed: {_asked(error)}.",
            why="The size of its result depends on values, so it has no axis of examples.",
            remedy="Keep every entry, and use `torch.where` or a product with a mask.",
            place=place,
        )
    return Refusal(
        what=f"{place} fails when its shapes are worked out for a batch of {n}: {_reason(error)}.",
        why="Either the inputs do not fit the model, or the graph does not hold for every batch size.",
        remedy="Give sizes that follow the input's (`x.shape[0]`, or -1).",
        place=place,
    )


def without_numbers(error: Exception, other: str) -> str:
    """Why a whole step failed with fake tensors, and what to do.

    Args:
        error: What it raised.
        other: What ran beside the model.
    """
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode  # noqa: PLC0415 (loads sympy)

    asked = ""
    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
        asked = _asked(error)
    elif isinstance(error, GuardOnDataDependentSymNode):
        asked = _VALUES_ASKED["_local_scalar_dense"]
    if asked:
        return (
            f"The model or {other} reads the value of a tensor, which no graph knows: {asked}. Keep it a tensor, or "
            "compute it outside."
        )
    return (
        f"It fails on tensors that have shapes but no numbers: {_reason(error)}. Run the model and {other} on real "
        "ones: if that fails too, it is their own error; else write that part with tensor operations."
    )


def _asked(error: DataDependentOutputException | DynamicOutputShapeException) -> str:
    """What an operation asks of values."""
    name = error.func._schema.name.removeprefix("aten::")
    if isinstance(error, DataDependentOutputException):
        return _VALUES_ASKED.get(name, f"`{name}` asks for values")
    return _SIZES_ASKED.get(name, f"`{name}` gives as many entries as the values ask for")


def _reason(error: Exception) -> str:
    """The first line of an error's own words."""
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
