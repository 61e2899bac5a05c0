"""Probing: which entries of a result move when one example changes?

Promises: an operation without a rule is run for real, alone, on small random values; where an example's entries follow
no layout, or overlap with another's, it is refused, and so is whatever cannot be probed safely. The same probe checks
every rule in the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from perexfx.analysis.axes.call import Followed, Mixing, OpCall, Unknown
from perexfx.analysis.tags import layout_of, tags_of
from perexfx.ir.layout import Layout

LARGEST = 2**17
"""Entries of all arguments and results together, at most: larger calls are refused rather than run many times."""

SEEDS = 3

_Draw = Callable[[Sequence[int], torch.dtype], Tensor]


def probe(call: OpCall) -> list[Followed]:
    """Where each tensor of the result carries its examples, found by running the operation.

    Raises:
        Mixing: One example's change moves what belongs to another.
        Unknown: The operation cannot be probed, or the probe is not conclusive.
    """
    if reason := _refuses(call):
        raise Unknown(f"perexfx does not know how `{call.func._schema.name}` treats the example axis, and {reason}")
    moves = movements(call)
    if moves is None:
        raise Unknown(
            f"perexfx does not know how `{call.func._schema.name}` treats the example axis, and it fails on small "
            "random values"
        )
    found: list[Followed] = []
    for each in moves:
        if any(not bool(moved.any()) for moved in each):
            raise Unknown(
                f"perexfx does not know how `{call.func._schema.name}` treats the example axis, and on random values "
                "some examples leave its result as it is"
            )
        found.append(layout_moved(each))
    return found


def layout_moved(each: Sequence[Tensor]) -> Layout | None:
    """The layout of the entries that each example moves; None where none moves any.

    Raises:
        Mixing: Two examples move the same entry, or no layout holds all of them.
    """
    moved = torch.stack([entries.float() for entries in each])
    if bool((moved.sum(0) > 1).any()):
        raise Mixing("a change of one example moves what belongs to another")
    numbers = torch.arange(1.0, len(each) + 1).view(-1, *[1] * (moved.dim() - 1))
    return layout_of((moved * numbers).sum(0), len(each))


def movements(call: OpCall, seeds: int = SEEDS) -> list[list[Tensor]] | None:
    """Which entries move, by result and example; None where the operation fails on every kind of value tried."""
    moves: list[list[Tensor]] | None = None
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for draw in _DRAWS:
            for seed in range(seeds):
                try:
                    found = _moved_by(call, draw, seed)
                except (RuntimeError, IndexError, ValueError, NotImplementedError):
                    break
                pairs = zip(moves, found, strict=True) if moves is not None else ()
                moves = [[a | b for a, b in zip(*pair, strict=True)] for pair in pairs] or found
    return moves


def _moved_by(call: OpCall, draw: _Draw, seed: int) -> list[list[Tensor]]:
    torch.manual_seed(seed)
    given = {id(t): draw(t.shape, t.dtype) for t in call.tensors}
    given |= {key: _counted(call, key) for key in given if key in call.counting}
    changed = {id(t): draw(t.shape, t.dtype) for t in call.tensors}
    before = _run(call, given)
    moves: list[list[Tensor]] = [[] for _ in before]
    for example in range(1, call.n + 1):
        now = dict(given)
        for key, layout in call.layouts.items():
            if key in given:
                own = tags_of(layout, given[key].shape, call.n) == example
                now[key] = torch.where(own, changed[key], given[key])
        after = _run(call, now)
        for entries, a, b in zip(moves, before, after, strict=True):
            entries.append(~((a == b) | (torch.isnan(a) & torch.isnan(b))))
    return moves


def _run(call: OpCall, given: dict[int, Tensor]) -> list[Tensor]:
    """The results for some values; arguments are copied, so that the operation may write into them."""

    def real(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("cpu")
        return given[id(value)].clone() if isinstance(value, Tensor) else value

    args, kwargs = pytree.tree_map(real, (call.args, call.kwargs))
    torch.manual_seed(0)
    results = [leaf for leaf in pytree.tree_leaves(call.func(*args, **kwargs)) if isinstance(leaf, Tensor)]
    if [result.shape for result in results] != [result.shape for result in call.results]:
        raise ValueError("the result has another shape on random values")
    return results


def _counted(call: OpCall, key: int) -> Tensor:
    tensor = next(t for t in call.tensors if id(t) == key)
    count = call.counting[key]
    return ((tags_of(count.layout, tensor.shape, call.n) - 1) * count.step).to(tensor.dtype)


def _normal(shape: Sequence[int], dtype: torch.dtype, largest: int = 1) -> Tensor:
    if dtype == torch.bool:
        return torch.rand(tuple(shape)) > 0.5
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(tuple(shape), dtype=torch.complex128 if dtype.is_complex else torch.float64).to(dtype)
    return torch.randint(0, largest + 1, tuple(shape)).to(dtype)


def _wide(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Larger whole numbers; they may be out of range."""
    return _normal(shape, dtype, largest=3)


def _unit(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Positive, and probabilities."""
    return torch.rand(tuple(shape)).to(dtype) if dtype.is_floating_point else _normal(shape, dtype)


def _coarse(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Few different values, so that there are ties."""
    return _normal(shape, dtype).round() if dtype.is_floating_point else _normal(shape, dtype)


def _special(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """With entries that are not finite."""
    value, kind = _normal(shape, dtype), torch.rand(tuple(shape))
    if not dtype.is_floating_point:
        return value
    return value.masked_fill(kind < 0.1, torch.nan).masked_fill(kind > 0.95, torch.inf)


_DRAWS: tuple[_Draw, ...] = (_normal, _wide, _unit, _coarse, _special)


def _refuses(call: OpCall) -> str | None:
    """Why an operation is not to be run."""
    schema, tags = call.func._schema, call.func.tags
    if not schema.name.startswith("aten::"):
        return "it is not one of torch's own"
    if schema.is_mutable:
        return "it works in place"
    if torch.Tag.nondeterministic_seeded in tags:
        return "it draws random numbers"
    if torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags:
        return "the shape of its result depends on values"
    if call.counting:
        return "it reads the numbers of the examples"
    if sum(tensor.numel() for tensor in (*call.tensors, *call.results)) > LARGEST:
        return f"its values have more than {LARGEST} entries, too many to find out by running it"
    return None
