"""Factors at the value of a linear map of parameters, whose norms are those at the parameters.

Promises: for a map `v = L w + c` with orthogonal rows of squared lengths `d`, `||L^T g||^2 = sum_v d[v] g[v]^2`. Where
`d` is a product of one vector for each axis of `v`, every strategy for `g` gives that sum as well: lengths along
features scale one factor, those along a kernel's taps weigh the squares of each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perexfx.ir.convolution import Convolution
from perexfx.ir.factors import Factors, Gradient, Product, Signature
from perexfx.ir.strategy import Strategy


@dataclass(frozen=True)
class Weighed:
    """Per-example gradients at the value of a map, and what their squares count.

    Attributes:
        factors: The gradients.
        scale: Length of all rows, but for what the axes say. A scalar, in float64.
        lengths: Axis of the value -> lengths along it, `[size]`.
    """

    factors: Factors
    scale: Tensor
    lengths: Mapping[int, Tensor]

    @property
    def signature(self) -> Signature:
        """The sizes."""
        return self.factors.signature

    def gradients(self) -> Tensor:
        """At the value of the map."""
        return self.factors.gradients()

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """At the value of the map."""
        return self.factors.weighted_sum(weights)

    def without(self, dropped: Tensor) -> Weighed:
        """Zeros in the dropped examples' contributions."""
        return replace(self, factors=self.factors.without(dropped))

    def squared_norms(self, strategy: Strategy) -> tuple[Tensor, Factors]:
        """What a strategy finds: squared norms at the parameters, and what to hold for sums at the value."""
        scaled, undo = self._scaled()
        squared, held = strategy.squared_norms(scaled)
        squared = (squared.to(torch.float64) * self.scale.square()).to(squared.dtype)
        if held is scaled:
            return squared, self.factors
        return squared, held if undo is None else Rescaled(held, undo)

    def _scaled(self) -> tuple[Factors, Tensor | None]:
        """Factors whose squared norms are the weighed ones, and what their gradients were multiplied with."""
        factors = self.factors
        if not self.lengths:
            return factors, None
        if isinstance(factors, Gradient):
            by = self._outer(factors.value.dim() - 1, self.lengths)
            return Gradient(factors.value * by.to(factors.value.dtype)), by
        if isinstance(factors, Product):
            return _scaled_product(factors, self.lengths), self._outer(len(factors.shape), self.lengths)
        assert isinstance(factors, Convolution)
        rank = len(factors.shape) - 2
        taps = tuple(None if (own := self.lengths.get(axis)) is None else own.square() for axis in range(2, 2 + rank))
        features = {axis: value for axis, value in self.lengths.items() if axis < 2}
        scaled = replace(factors, tap_weights=taps if any(found is not None for found in taps) else None)
        if not features:
            return scaled, None
        return _scaled_channels(scaled, features), self._outer(2 + rank, features)

    @staticmethod
    def _outer(rank: int, lengths: Mapping[int, Tensor]) -> Tensor:
        """Some lengths, multiplied, as they broadcast to a value of some rank."""
        roots = [value.reshape(-1, *[1] * (rank - 1 - axis)) for axis, value in lengths.items()]
        return math.prod(roots[1:], start=roots[0])


def _scaled_product(product: Product, lengths: Mapping[int, Tensor]) -> Product:
    """Axis 0 of a matrix is that of the right factor, axis 1 that of the left one."""
    left, right = product.left, product.right
    if 0 in lengths:
        right = right * lengths[0].to(right.dtype)
    if 1 in lengths:
        left = left * lengths[1].to(left.dtype)
    return replace(product, left=left, right=right, left_gram=None, right_gram=None)


def _scaled_channels(convolution: Convolution, lengths: Mapping[int, Tensor]) -> Convolution:
    """Axis 0 of a kernel is that of the output's channels, axis 1 that of the input's in one group."""
    layer_input, grad_output = convolution.layer_input, convolution.grad_output
    after = [1] * len(convolution.shape[2:])
    if 0 in lengths:
        grad_output = grad_output * lengths[0].to(grad_output.dtype).reshape(-1, *after)
    if 1 in lengths:
        by = lengths[1].to(layer_input.dtype).repeat(convolution.geometry.groups)
        layer_input = layer_input * by.reshape(-1, *after)
    return replace(convolution, layer_input=layer_input, grad_output=grad_output)


@dataclass(frozen=True)
class Rescaled:
    """Held factors of gradients that were multiplied with something: their sums are divided by it.

    Attributes:
        factors: Of the multiplied gradients.
        by: Broadcasts to one of them. Where it is zero the map reaches no parameter, and the gradient there is nothing.
    """

    factors: Factors
    by: Tensor

    @property
    def signature(self) -> Signature:
        """The sizes."""
        return self.factors.signature

    def gradients(self) -> Tensor:
        """Divided."""
        return self._divided(self.factors.gradients())

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Divided."""
        return self._divided(self.factors.weighted_sum(weights))

    def without(self, dropped: Tensor) -> Rescaled:
        """Zeros in the dropped examples' contributions."""
        return replace(self, factors=self.factors.without(dropped))

    def _divided(self, value: Tensor) -> Tensor:
        inverse = torch.where(self.by == 0, torch.zeros_like(self.by), 1 / self.by)
        return value * inverse.to(value.dtype)


def squared_norms_by(strategy: Strategy, factors: Factors) -> tuple[Tensor, Factors]:
    """Squared norms by a strategy, and what to hold; weighed where the factors are at the value of a map."""
    return factors.squared_norms(strategy) if isinstance(factors, Weighed) else strategy.squared_norms(factors)


__all__ = ["Rescaled", "Weighed", "squared_norms_by"]
