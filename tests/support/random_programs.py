"""Random models as source, with how each is to be tried."""

from __future__ import annotations

import linecache
import zlib
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.oracle import Batch
from tests.support.random_joins import JOINS
from tests.support.random_layers import PARAMETERS, Step
from tests.support.random_mixing import MIXING
from tests.support.random_moves import MOVES, split_axis
from tests.support.random_writer import DoesNotFitError, Input, Value, Writer


@dataclass(frozen=True)
class Program:
    """A model as source, and how it is to be tried.

    Attributes:
        source: Of a class `Model`.
        inputs: Its arguments.
        batch_dim: The example axis of the inputs.
        n: The number of examples it is transformed for.
        others: Other numbers of examples to run it with.
        capture: "traced", "exported", or "late": without example inputs.
        strategy: As `transform` takes it.
        reduction: How the loss joins the examples.
        mistakes: Names of the steps that may combine examples.
    """

    source: str
    inputs: tuple[Input, ...]
    batch_dim: int
    n: int
    others: tuple[int, ...]
    capture: str
    strategy: str
    reduction: str
    mistakes: tuple[str, ...]

    def build(self) -> nn.Module:
        name = f"<random model {zlib.crc32(self.source.encode()):x}>"
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(keepends=True), name)
        namespace: dict[str, Any] = {"__name__": "random_model"}
        exec(compile(self.source, name, "exec"), namespace)
        torch.manual_seed(1)
        return namespace["Model"]().double()

    def batch(self, n: int) -> Batch:
        torch.manual_seed(n + 2)
        return Batch(tuple(self._input(given, n) for given in self.inputs), torch.randn(n).double(), self.batch_dim)

    def _input(self, given: Input, n: int) -> Tensor:
        shape = (*given.sizes[: self.batch_dim], n, *given.sizes[self.batch_dim :])
        if given.kind in ("ids", "lengths"):
            return torch.randint(given.limit, shape)
        values = torch.randn(shape).double()
        return values > 0 if given.kind == "mask" else values

    def loss(self, output: Any, targets: Tensor) -> Tensor:
        """Curved, and with another weight for every entry of an example."""
        n = targets.shape[0]
        parts = [output] if isinstance(output, Tensor) else list(output)
        flat = torch.cat([part.reshape(n, -1) if n else part.flatten(1) for part in parts], 1)
        weights = torch.linspace(0.5, 1.5, flat.shape[1], dtype=flat.dtype)
        each = ((flat - targets[:, None]).square() * weights + flat.sin() * weights.flip(0)).sum(1)
        return each.sum() if self.reduction == "sum" or not n else each.mean()

    def __str__(self) -> str:
        return f"# {replace(self, source='')!r}\n{self.source}"


def generate(random: Random) -> Program:
    """A program; its steps are drawn until there are enough, and those that do not fit are drawn again."""
    n = random.choice([1, 2, 3, 3, 4, 5])
    w = Writer(random, n, batch_dim=int(random.random() < 0.1))
    _draw_inputs(w)
    mistakes: list[str] = []
    mistaken: list[Value] = []
    wanted = random.randrange(2, 11)
    at_mistake = random.randrange(wanted) if random.random() < 0.45 else -1
    done = tries = 0
    while (done < wanted or not _last_trained(w)) and tries < 80:
        tries += 1
        wrong = done == at_mistake and not mistakes
        steps = MIXING if wrong else PARAMETERS if not _last_trained(w) or w.chance(0.45) else {**MOVES, **JOINS}
        step = random.choices(list(steps), list(steps.values()))[0]
        if _tried(w, step):
            done += 1
            if wrong:
                mistakes.append(step.__name__)
                mistaken.append(w.values[-1])
    capture = w.choice(["traced", "traced", "exported", "late"])
    returned = _returned(w, mistaken)
    return Program(
        _source(w, returned),
        tuple(w.inputs),
        w.batch_dim,
        n,
        tuple(dict.fromkeys(w.choice([5, 2, 3, 1, 4, 6, 0]) for _ in range(2))),
        capture,
        w.choice(["auto", "auto", "auto", "materialize", "gram", "outer", "loop", "grouped"]),
        w.choice(["mean", "sum"]),
        tuple(mistakes),
    )


def _last_trained(w: Writer) -> Value | None:
    """The last value that depends on a trained parameter."""
    return next((v for v in reversed(w.values) if v.name in w.trained), None)


def _tried(w: Writer, step: Step) -> bool:
    """Writes a step, or nothing at all."""
    kept = [w.inputs, w.setup, w.lines, w.values, w.weights, w.layers]
    lengths, trained = [len(items) for items in kept], set(w.trained)
    try:
        step(w)
    except DoesNotFitError:
        for items, length in zip(kept, lengths, strict=True):
            del items[length:]
        w.trained = trained
        return False
    return True


def _draw_inputs(w: Writer) -> None:
    rank = w.choice([1, 2, 2, 2, 3])
    sizes = tuple(w.size() for _ in range(max(rank, w.batch_dim)))
    w.inputs.append(Input("float", sizes))
    extra = [Input("ids", sizes[:1]), Input("mask", sizes[:1]), Input("lengths", (), sizes[0]), Input("float", sizes)]
    extra += [Input("float", ()), Input("float", ()), Input("ids", (w.size(),))]
    for _ in range(w.choice([0, 0, 1, 2])):
        given = w.choice(extra)
        if len(given.sizes) >= w.batch_dim:
            w.inputs.append(given)
    for at, given in enumerate(w.inputs):
        if given.kind == "float" and (given.sizes or w.batch_dim):
            shape = (*given.sizes[: w.batch_dim], 1, *given.sizes[w.batch_dim :])
            w.values.append(Value(f"x{at}", shape, w.batch_dim))


def _returned(w: Writer, mistaken: list[Value]) -> str:
    """Of the last value and perhaps others: examples first, all else flat."""
    found = []
    last = _last_trained(w) or w.values[-1]
    others = [v for v in w.values if w.chance(0.25)][:3]
    for v in dict.fromkeys([last, *mistaken, *others]):
        plain = v if v.plain else split_axis(w, v)
        text = plain.name if plain.axis == 0 else f"{plain.name}.movedim({plain.axis}, 0)"
        found.append(f"{text}.flatten(1)" if plain.rank > 1 else f"{text}.unsqueeze(1)")
    return f"torch.cat([{', '.join(found)}], 1)" if len(found) > 1 and w.chance(0.5) else ", ".join(found)


def _source(w: Writer, returned: str) -> str:
    arguments = ", ".join(f"x{at}" for at in range(len(w.inputs)))
    setup = "\n".join(f"        {line}" for line in w.setup)
    lines = "\n".join(f"        {line}" for line in w.lines)
    return f"""import torch
import torch.nn.functional as F
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
{setup}

    def forward(self, {arguments}):
        n = x0.shape[{w.batch_dim}]
{lines}
        return {returned}
"""
