"""The per-example gradient of one use of a parameter, in factored form.

A layer rule leaves factors behind; a strategy reads them. Factors know three things: their sizes (`signature`, all a
plan needs), how to form the per-example gradients, and how to form a weighted sum of them without forming them.
`n` is the example axis everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from perexfx.kernels.gemm import transposed_product, transposed_products


@runtime_checkable
class Signature(Protocol):
    """The sizes of factors: integers alone, equal for sites that cost the same."""

    @property
    def n(self) -> int:
        """Number of examples."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        ...

    @property
    def held_elements(self) -> int:
        """How many numbers stay alive when the factors are held until the clip node."""
        ...

    def describe(self) -> str:
        """The sizes in words, for the report."""
        ...


class Factors(Protocol):
    """One use of a parameter in one backward."""

    @property
    def signature(self) -> Signature:
        """The sizes."""
        ...

    def gradients(self) -> Tensor:
        """The per-example gradients. Shape `[n, *shape]`."""
        ...

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """`sum_i weights[i] * gradient_i`. Shape `[*shape]`; `weights` has shape `[n]`."""
        ...

    def without(self, dropped: Tensor) -> Factors:
        """The same factors with the dropped examples' contributions set to zero, also where they are infinite.

        Args:
            dropped: Booleans of shape `[n]`.
        """
        ...


def drop_examples(value: Tensor, dropped: Tensor) -> Tensor:
    """`value` `[n, ...]` with zeros in the dropped examples' rows (a selection: `0 * inf` would be NaN)."""
    mask = dropped.reshape(-1, *[1] * (value.dim() - 1))
    return value.masked_fill(mask, 0)


def scale_examples(value: Tensor, weights: Tensor) -> Tensor:
    """`value` `[n, ...]` with example `i` multiplied by `weights[i]`."""
    return value * weights.to(value.dtype).reshape(-1, *[1] * (value.dim() - 1))


@dataclass(frozen=True)
class GradientSignature:
    """Sizes of a `Gradient`."""

    n: int
    shape: tuple[int, ...]

    @property
    def held_elements(self) -> int:
        """Elements of the per-example gradients."""
        return self.n * math.prod(self.shape)

    def describe(self) -> str:
        """The sizes in words."""
        return f"[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Gradient:
    """Per-example gradients at hand.

    Attributes:
        value: Shape `[n, *shape]`.
    """

    value: Tensor

    @property
    def signature(self) -> GradientSignature:
        """The sizes."""
        n, *shape = self.value.shape
        return GradientSignature(n, tuple(shape))

    def gradients(self) -> Tensor:
        """The value itself."""
        return self.value

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """One matrix-vector product."""
        shape = self.value.shape[1:]
        flat = self.value.reshape(self.value.shape[0], math.prod(shape))
        return (weights.to(flat.dtype) @ flat).reshape(shape)

    def without(self, dropped: Tensor) -> Gradient:
        """Zeros in the dropped rows."""
        return Gradient(drop_examples(self.value, dropped))


@dataclass(frozen=True)
class ProductSignature:
    """Sizes of a `Product`: groups `g`, summed positions `t`, input features `i`, output features `o`."""

    n: int
    g: int
    t: int
    i: int
    o: int
    shape: tuple[int, ...]
    right_users: int = 1
    """How many products of a site have the same right factor."""
    left_users: int = 1
    """How many sites have the same left factor."""
    has_kernels: bool = False
    """Whether there are kernels in C++ for it (`perexfx.kernels`)."""

    @property
    def held_elements(self) -> int:
        """Elements of both factors."""
        return self.n * self.g * self.t * (self.i + self.o)

    def describe(self) -> str:
        """The sizes in words."""
        positions = f", {self.t} positions" if self.t > 1 else ""
        groups = f", {self.g} groups" if self.g > 1 else ""
        return f"{self.g * self.i} -> {self.g * self.o}{positions}{groups}"


class SharedGram:
    """The Gram matrices of a factor that several products have: made by the first that asks, gone with the last.

    Attributes:
        users: How many products.
        factor: The factor, where it comes from several sites: it stays in its memory as long as its Gram matrices do.
    """

    def __init__(self, users: int, factor: Tensor | None = None) -> None:
        self.users = users
        self.factor = factor
        self._left = users
        self._value: tuple[Tensor, ...] | None = None
        self._blocks = 0

    def is_of(self, factor: Tensor) -> bool:
        """Whether a factor is the one that the Gram matrices are of: the same memory, seen in the same way."""
        own = self.factor
        if own is None or own.dtype != factor.dtype or own.shape != factor.shape or own.stride() != factor.stride():
            return False
        return own.data_ptr() == factor.data_ptr()

    def taken(self, make: Callable[[], tuple[Tensor, ...]], blocks: int) -> tuple[Tensor, ...]:
        """The blocks, each `[n * g, rows, columns]`: not to be overwritten.

        Args:
            make: Makes them.
            blocks: Into how many rows of blocks they are cut: products of other widths may want others.
        """
        self._left -= 1
        if self._value is None or self._blocks != blocks:
            self._value, self._blocks = make(), blocks
        found = self._value
        if self._left <= 0:
            self._value = self.factor = None
        return found


@dataclass(frozen=True)
class Product:
    """A sum of outer products: `n g t i, n g t o -> n (g o) i`, reshaped to the parameter's shape.

    Attributes:
        left: The layer input. Shape `[n, g, t, i]`.
        right: The gradient of the layer output. Shape `[n, g, t, o]`.
        shape: Shape of the parameter, with `g * o * i` elements.
        axes: The parameter's axes in the order in which groups, outputs and inputs run over them; empty: in their own.
        right_gram: What the products with the same right factor share.
        left_gram: The same of the left factor.
    """

    left: Tensor
    right: Tensor
    shape: tuple[int, ...]
    axes: tuple[int, ...] = ()
    right_gram: SharedGram | None = None
    left_gram: SharedGram | None = None

    @property
    def signature(self) -> ProductSignature:
        """The sizes."""
        n, g, t, i = self.left.shape
        users = 1 if self.right_gram is None else self.right_gram.users
        return ProductSignature(n, g, t, i, self.right.shape[3], self.shape, users)

    def gradients(self) -> Tensor:
        """One batched matrix product."""
        n, g, t, i = self.left.shape
        o = self.right.shape[3]
        each = transposed_products(self.right.reshape(n * g, t, o), self.left.reshape(n * g, t, i))
        return parameter_of(each.reshape(n, g, o, i), self.shape, self.axes, n)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """One matrix product over examples and positions together."""
        n, g, t, i = self.left.shape
        o = self.right.shape[3]
        left, right = self.left, self.right
        if i < o:
            left = scale_examples(left, weights)
        else:
            right = scale_examples(right, weights)
        if g == 1:
            axes = (2, 0, 1, 3) if right.stride(2) > right.stride(0) else (0, 2, 1, 3)  # as they lie in memory
            total = transposed_product(right.permute(axes).reshape(n * t, o), left.permute(axes).reshape(n * t, i))
        else:
            total = right.permute(1, 3, 0, 2).reshape(g, o, n * t) @ left.transpose(0, 1).reshape(g, n * t, i)
        return parameter_of(total, self.shape, self.axes)

    def without(self, dropped: Tensor) -> Product:
        """Zeros in the dropped rows of both factors."""
        left, right = drop_examples(self.left, dropped), drop_examples(self.right, dropped)
        return replace(self, left=left, right=right, right_gram=None, left_gram=None)


def parameter_of(value: Tensor, shape: tuple[int, ...], axes: tuple[int, ...], *lead: int) -> Tensor:
    """The elements of a parameter, whose axes lie in the order of `axes`, as `[*lead, *shape]`."""
    if not axes:
        return value.reshape((*lead, *shape))
    value = value.reshape(*lead, *(shape[axis] for axis in axes))
    order = sorted(range(len(axes)), key=axes.__getitem__)
    return value.permute(*range(len(lead)), *(at + len(lead) for at in order))


@dataclass(frozen=True)
class RowsSignature:
    """Sizes of `Rows`: `t` looked-up ids per example, `v` rows in the table, `d` columns."""

    n: int
    t: int
    v: int
    d: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the table."""
        return (self.v, self.d)

    @property
    def held_elements(self) -> int:
        """Elements of the gradient rows and of the ids (two 32-bit elements each)."""
        return self.n * self.t * (self.d + 2)

    def describe(self) -> str:
        """The sizes in words."""
        return f"{self.t} ids of {self.v} x {self.d}"


@dataclass(frozen=True)
class Rows:
    """Gradients of looked-up rows: `n t v (one-hot), n t d -> n v d`, never formed by itself.

    Attributes:
        ids: Which rows were looked up. Integers of shape `[n, t]`.
        right: The gradient of each looked-up row. Shape `[n, t, d]`.
        v: Number of rows of the table.
        padding_idx: The row that gets no gradient, or -1.
    """

    ids: Tensor
    right: Tensor
    v: int
    padding_idx: int

    @property
    def signature(self) -> RowsSignature:
        """The sizes."""
        n, t, d = self.right.shape
        return RowsSignature(n, t, self.v, d)

    def gradients(self) -> Tensor:
        """Dense tables, one per example: `n * v * d` elements."""
        n, t, d = self.right.shape
        examples = torch.arange(n, device=self.ids.device)[:, None]
        positions = (examples * self.v + self.ids).reshape(n * t)
        table = self.trained_right.new_zeros(n * self.v, d)
        return table.index_add(0, positions, self.trained_right.reshape(n * t, d)).reshape(n, self.v, d)

    @property
    def trained_right(self) -> Tensor:
        """`right` with zeros where the padding row was looked up."""
        if self.padding_idx < 0:
            return self.right
        return self.right.masked_fill((self.ids == self.padding_idx).unsqueeze(2), 0)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """The ordinary embedding backward on scaled rows."""
        return torch.ops.aten.embedding_dense_backward(
            scale_examples(self.right, weights), self.ids, self.v, self.padding_idx, False
        )

    def without(self, dropped: Tensor) -> Rows:
        """Zeros in the dropped examples' rows."""
        return replace(self, right=drop_examples(self.right, dropped))
