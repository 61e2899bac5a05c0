"""Writes the source of random models, value by value, knowing where each value carries its examples."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, TypeVar

T = TypeVar("T")

LARGEST = 400
"""Entries per example at most: what goes wrong goes wrong with few."""


class DoesNotFitError(Exception):
    """A step does not fit what there is."""


@dataclass(frozen=True)
class Value:
    """A tensor of the forward; its example axis has `before * n * after` entries, and counts here without n."""

    name: str
    sizes: tuple[int, ...]
    axis: int
    before: int = 1
    after: int = 1

    @property
    def rank(self) -> int:
        return len(self.sizes)

    @property
    def plain(self) -> bool:
        return self.before == self.after == 1

    @property
    def own(self) -> list[int]:
        """The axes that every example has for itself."""
        return [i for i in range(self.rank) if i != self.axis]

    @property
    def layout(self) -> tuple[Any, ...]:
        return self.sizes, self.axis, self.before, self.after

    def images(self, rank: int) -> bool:
        """Whether it is `[n, channels, *sizes]` of some rank."""
        return self.rank == rank and self.axis == 0


@dataclass(frozen=True)
class Input:
    """An argument of the forward: "float", "ids" below 5, "mask", or "lengths" below the first own size."""

    kind: str
    sizes: tuple[int, ...]
    limit: int = 5


@dataclass
class Writer:
    """A forward in the making. A step that does not fit raises `DoesNotFitError`; its caller drops what it wrote."""

    random: Random
    n: int
    batch_dim: int = 0
    inputs: list[Input] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    weights: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    layers: list[tuple[str, str]] = field(default_factory=list)
    trained: set[str] = field(default_factory=set)
    palette: list[int] = field(default_factory=list)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def choice(self, options: Sequence[T]) -> T:
        if not options:
            raise DoesNotFitError
        return options[self.random.randrange(len(options))]

    def size(self) -> int:
        """One of a few, often the number of examples or one that the analysis tries: coincidences mislead."""
        while len(self.palette) < 3:
            self.palette.append(self.choice([self.n, self.n, 3, 5, 2, 4, 1, 6]))
        return self.choice(self.palette)

    # Values

    def pick(self, fits: Callable[[Value], bool] = lambda _: True) -> Value:
        fitting = [v for v in self.values[-5:] if fits(v)]
        return fitting[-1] if fitting and self.chance(0.65) else self.choice(fitting)

    def pick_image(self, rank: int) -> Value:
        """A value `[n, channels, *sizes]`; one of one rank less is made to fit."""
        if self.chance(0.5) or not any(v.images(rank) and v.plain for v in self.values):
            v = self.pick(lambda v: v.images(rank - 1) and v.rank >= 2 and v.plain)
            at = self.choice(range(1, v.rank + 1))
            return self.emit(f"{v.name}.unsqueeze({at})", v, sizes=(*v.sizes[:at], 1, *v.sizes[at:]))
        return self.pick(lambda v: v.images(rank))

    def partner(self, v: Value) -> str:
        """Another value of the same layout, or one made of it."""
        same = [u.name for u in self.values if u.layout == v.layout and u.name != v.name]
        if same and self.chance(0.7):
            return self.choice(same)
        return self.choice([f"torch.sin({v.name})", f"({v.name} * 0.5)", f"{v.name}.detach()", v.name])

    def emit(self, expression: str, like: Value, **changes: Any) -> Value:
        value = replace(like, name=f"v{len(self.lines)}", **changes)
        if math.prod(value.sizes) > LARGEST or (value.rank > 5 and like.plain):
            raise DoesNotFitError
        self.line(f"{value.name} = {expression}")
        self.values.append(value)
        return value

    def line(self, text: str) -> None:
        """Adds a statement; what reads trained values is trained, as far as one can see."""
        self.lines.append(text)
        names = re.findall(r"(?:self\.)?\w+", text)
        if "detach" not in text and "no_grad" not in text and self.trained.intersection(names[1:]):
            self.trained.add(names[0])

    # What a model holds

    def name(self, kind: str) -> str:
        return f"{kind}{len(self.setup)}"

    def parameter(self, *sizes: int) -> str:
        known = [name for name, shape in self.weights if shape == sizes]
        if known and self.chance(0.45):
            return self.choice(known)
        name = self.name("w")
        frozen = self.chance(0.1)
        self.trained |= set() if frozen else {f"self.{name}"}
        options = ", requires_grad=False" if frozen else ""
        self.setup.append(f"self.{name} = nn.Parameter(torch.randn({list(sizes)}) / 2{options})")
        self.weights.append((f"self.{name}", sizes))
        return f"self.{name}"

    def buffer(self, text: str) -> str:
        name = self.name("c")
        self.setup.append(f'self.register_buffer("{name}", {text})')
        return f"self.{name}"

    def layer(self, text: str, **weights: tuple[int, ...]) -> str:
        """A module, or one of the same kind that there is already; its weights may be used elsewhere too."""
        known = [name for name, same in self.layers if same == text]
        if known and self.chance(0.5):
            return self.choice(known)
        name = self.name("layer")
        self.setup.append(f"self.{name} = {text}")
        if self.chance(0.08):
            self.setup.append(f"self.{name}.requires_grad_(False)")
        else:
            self.trained.add(f"self.{name}")
        self.layers.append((f"self.{name}", text))
        self.weights.extend((f"self.{name}.{weight}", sizes) for weight, sizes in weights.items())
        return f"self.{name}"

    # How sizes and indices are written

    def written(self, v: Value, axis: int) -> str:
        """The size of an axis, in one of the ways people write it."""
        read = [f"{v.name}.shape[{axis}]", f"{v.name}.size({axis})"]
        if axis == v.axis:
            factors = [str(f) for f in (v.before, v.after) if f > 1]
            return self.choice([*read, " * ".join(["n", *factors])])
        return self.choice([*read, str(v.sizes[axis]), str(v.sizes[axis])])

    def at(self, rank: int, axis: int, index: str) -> str:
        """`[:, index]` for some axis."""
        if axis == rank - 1 and self.chance(0.3):
            return f"[..., {index}]"
        return f"[{', '.join([':'] * axis + [index])}]"

    def broadcast(self, v: Value, axes: int | None = None) -> tuple[int, ...]:
        """A shape without examples that is broadcast to a value's."""
        count = self.choice(range(v.rank + 1)) if axes is None else axes
        sizes = []
        for axis in range(v.rank - count, v.rank):
            sizes.append(1 if axis == v.axis or self.chance(0.2) else v.sizes[axis])
        return tuple(sizes)
