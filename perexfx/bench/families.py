"""Models whose sizes can be doubled one at a time, from a small base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from perexfx.bench import models
from perexfx.bench.workloads import Workload, numbers, tokens


@dataclass(frozen=True)
class Size:
    """One size of a family.

    Attributes:
        base: Its value while others grow, and where it starts itself.
        doublings: How often it is doubled.
    """

    base: int
    doublings: int

    @property
    def values(self) -> list[int]:
        """In growing order."""
        return [self.base << doubled for doubled in range(self.doublings + 1)]


@dataclass(frozen=True)
class Family:
    """Models of one kind.

    Attributes:
        name: For tables.
        make: A workload from one value per size, by name.
        sizes: By name.
    """

    name: str
    make: Callable[..., Workload]
    sizes: Mapping[str, Size]

    def at(self, grown: str, value: int) -> Workload:
        """The workload at one value of one size, and the base of the others."""
        return self.make(**{name: size.base for name, size in self.sizes.items()} | {grown: value})


def _cnn(batch: int, width: int, depth: int, image: int) -> Workload:
    return numbers("", partial(models.ResNet18, width=width, blocks_per_stage=depth), batch, 3, image, image)


def _transformer(batch: int, width: int, depth: int, length: int) -> Workload:
    model = partial(models.LanguageModel, vocabulary=512, width=width, depth=depth, length=length)
    return tokens("", model, batch, length, 512)


def _mlp(batch: int, width: int, depth: int) -> Workload:
    return numbers("", partial(models.mlp, (*[width] * (depth + 1), 10)), batch, width)


def _lstm(batch: int, width: int, length: int) -> Workload:
    return numbers("", partial(models.SequenceClassifier, width, width), batch, length, width)


FAMILIES: tuple[Family, ...] = (
    Family("CNN", _cnn, {"batch": Size(16, 4), "width": Size(16, 4), "depth": Size(1, 3), "image": Size(16, 3)}),
    Family(
        "transformer",
        _transformer,
        {"batch": Size(8, 4), "width": Size(64, 4), "depth": Size(1, 3), "length": Size(32, 4)},
    ),
    Family("MLP", _mlp, {"batch": Size(128, 4), "width": Size(128, 4), "depth": Size(2, 4)}),
    Family("LSTM", _lstm, {"batch": Size(16, 4), "width": Size(64, 4), "length": Size(16, 4)}),
)
