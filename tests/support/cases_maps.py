"""Linear maps of parameters, with orthogonal rows and without, and models on coarse images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import perexfx
from perexfx.kernels.pooled import Slides, coarse_axes, pooled_kernel
from tests.support.cases import Case, case, images, register


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / 2)


class _Mapped(nn.Module):
    """A linear layer whose weight is made of parameters and constants."""

    def __init__(self, make: Callable[[_Mapped], Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.parts = nn.ParameterList([parameter(*shape) for shape in shapes])
        self.make = make
        self.register_buffer("rows", torch.rand(4, 1) + 0.5)
        self.register_buffer("columns", torch.rand(6) + 0.5)
        self.register_buffer("mask", (torch.rand(4, 6) > 0.4).float())
        self.register_buffer("gain", torch.tensor(0.3))
        self.register_buffer("places", torch.tensor([0, 1, 1, 3]))

    rows: Tensor
    columns: Tensor
    mask: Tensor
    gain: Tensor
    places: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(x), self.make(self))


def _exchanged(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([parts[1], parts[0]])


MAPS: dict[str, tuple[Callable[[_Mapped], Tensor], tuple[tuple[int, ...], ...]]] = {
    "rows_scaled": (lambda m: m.parts[0] * m.rows, ((4, 6),)),
    "columns_scaled": (lambda m: m.columns * m.parts[0], ((4, 6),)),
    "rows_and_columns": (lambda m: m.parts[0] * m.columns / m.rows, ((4, 6),)),
    "by_a_number": (lambda m: -(m.parts[0] * 0.3) / 2, ((4, 6),)),
    "by_a_scalar": (lambda m: m.parts[0] * m.gain, ((4, 6),)),
    "by_nothing": (lambda m: m.parts[0] * 0.0 + m.parts[1], ((4, 6), (4, 6))),
    "shifted": (lambda m: 1.0 - m.parts[0] + m.mask, ((4, 6),)),
    "side_by_side": (lambda m: torch.cat([m.parts[1], m.parts[0]]), ((1, 6), (3, 6))),
    "added": (lambda m: m.parts[0] * 0.5 + m.parts[1], ((4, 6), (4, 6))),
    "summed": (lambda m: m.parts[0].sum(1), ((4, 3, 6),)),
    "averaged": (lambda m: m.parts[0].mean((0, 2)) * 2, ((3, 4, 2, 6),)),
    "flipped": (lambda m: m.parts[0].flip(1).t(), ((6, 4),)),
    "parts_exchanged": (lambda m: _exchanged(m.parts[0].chunk(2)), ((4, 6),)),
}
"""Their rows are orthogonal, and known to be."""

JOINED: dict[str, tuple[Callable[[_Mapped], Tensor], tuple[tuple[int, ...], ...]]] = {
    "masked": (lambda m: m.parts[0] * m.mask, ((4, 6),)),
    "spread": (lambda m: m.parts[0] * m.columns, ((4, 1),)),
    "shifted_and_spread": (lambda m: m.parts[0] + m.mask, ((4, 1),)),
    "added_to_itself": (lambda m: m.parts[0] + m.parts[0].flip(0), ((4, 6),)),
    "the_same_part_twice": (lambda m: torch.cat([m.parts[0][:2], m.parts[0][:2]]), ((4, 6),)),
    "standardised": (lambda m: m.parts[0] - m.parts[0].mean(1, keepdim=True), ((4, 6),)),
    "repeated": (lambda m: m.parts[0].repeat(2, 1), ((2, 6),)),
    "with_constant_rows": (lambda m: torch.cat([m.parts[0], m.mask[:2]]), ((2, 6),)),
    "taken": (lambda m: m.parts[0].index_select(0, m.places), ((4, 6),)),
    "multiplied": (lambda m: m.parts[0] * m.parts[1], ((4, 6), (4, 6))),
    "squared": (lambda m: m.parts[0] * m.parts[0], ((4, 6),)),
    "weighed_and_summed": (lambda m: (m.parts[0] * m.rows[:, :, None]).sum(1), ((4, 3, 6),)),
}
"""Their rows are not orthogonal, or of lengths that are no product of vectors."""


def _register_maps() -> None:
    for name, (make, shapes) in (MAPS | JOINED).items():
        register(Case(f"map_{name}", lambda make=make, shapes=shapes: _Mapped(make, *shapes), images(5, 6)))


_register_maps()


@case(images(5, 6))
class map_of_a_bias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = parameter(4, 6), parameter(4)
        self.register_buffer("scale", torch.rand(4) + 0.5)

    scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(x), self.w, self.b * self.scale)


@case(images(4, 6, 5))
class map_of_channels(nn.Module):
    """Equalised learning rates: kernels scaled by channel, in groups too."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v, self.u = parameter(6, 4, 3, 3), parameter(6, 2, 3, 1), parameter(6, 3, 2, 2)
        self.register_buffer("outputs", torch.rand(6, 1, 1, 1) + 0.5)
        self.register_buffer("inputs", torch.rand(1, 2, 1, 1) + 0.5)

    outputs: Tensor
    inputs: Tensor

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(F.conv2d(x, self.w * self.outputs * 0.7, padding=1))
        x = torch.tanh(F.conv2d(x, self.v * self.outputs * self.inputs, groups=3))
        return F.conv_transpose2d(x, self.u * self.outputs, stride=2)


SLIDES: dict[str, tuple[int, int, int, int, int]] = {
    "3x3": (3, 1, 1, 1, 1),
    "3x3_strided": (3, 2, 1, 1, 1),
    "5x5": (5, 1, 2, 1, 2),
    "4x4": (4, 1, 1, 1, 1),
    "7x7_strided": (7, 2, 3, 1, 1),
    "depthwise": (3, 1, 1, 1, 4),
    "dilated_by_2": (3, 1, 2, 2, 1),
    "dilated_by_3": (3, 1, 3, 3, 1),
    "1x1_strided": (1, 2, 0, 1, 1),
}
"""Taps, stride, padding, dilation and groups."""


class _Pooled(nn.Module):
    def __init__(self, taps: int, stride: int, padding: int, dilation: int, groups: int) -> None:
        super().__init__()
        self.w = parameter(4, 4 // groups, taps, taps)
        self.slides: Slides = ((taps, stride, padding, dilation),) * 2
        self.how = stride, 2, coarse_axes(self.slides)[0].dilation, groups
        self.register_buffer("side", torch.tensor([1, 0]))

    side: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(torch.tanh(x), pooled_kernel(self.w, self.side, self.slides), None, *self.how)


def _register_pooled() -> None:
    for name, slide in SLIDES.items():
        register(Case(f"pooled_{name}", lambda slide=slide: _Pooled(*slide), images(4, 9, 7)))


_register_pooled()


class OddNet(nn.Module):
    """Odd sizes, 1 x 1 to 7 x 7, strides, dilation, groups, depthwise, residual sums, concatenations, all pools."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool, self.norm = nn.Conv2d(3, 8, 7, 2, 3), nn.MaxPool2d(3, 2, 1), nn.GroupNorm(2, 8)
        self.depthwise = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.by_2, self.by_3 = nn.Conv2d(8, 8, 3, 1, 2, dilation=2), nn.Conv2d(8, 8, 3, 1, 3, dilation=3)
        self.wide, self.shortcut = nn.Conv2d(8, 8, 5, 2, 2, groups=2), nn.Conv2d(8, 8, 1, 2)
        self.even, self.last = nn.Conv2d(8, 8, 4, 1, "same"), nn.Conv2d(8, 4, 3, 1, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.pool(self.stem(x))))
        x = x + self.depthwise(x)
        x = torch.cat([x[:, :4], self.by_2(x)[:, 4:]], 1) + self.by_3(x)
        x = F.gelu(self.wide(x) + self.shortcut(x))
        x = F.avg_pool2d(F.silu(self.even(x)), 2, ceil_mode=True)
        return self.head(self.last(F.avg_pool2d(x, 3, 1, 1)).mean((2, 3)))


class UNet(nn.Module):
    """Transposed convolutions, a table of positions, resizes, a squeeze and excitation, an output of the fine size."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, 2, 1)
        self.up, self.wider = nn.ConvTranspose2d(6, 4, 2, 2), nn.ConvTranspose2d(8, 4, 4, 2, 1)
        self.positions = nn.Parameter(torch.randn(1, 4, 10, 10) / 4)
        self.gate, self.out = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.down(x)) + self.positions
        x = x * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
        x = torch.cat([x, self.up(F.relu(self.deep(x)))], 1)
        x = F.interpolate(F.relu(self.wider(x)), scale_factor=0.5, mode="bilinear")
        return self.out(x)


class FlatNet(nn.Module):
    """A head over all positions, as VGG has it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1)
        )
        self.head = nn.Linear(4 * 3 * 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(torch.tanh(self.body(x)), 1))


REDUCED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str | None]] = {
    "odd_net": (OddNet, (3, 27, 22), None),
    "u_net": (UNet, (3, 10, 10), None),
    "flat_net": (FlatNet, (3, 7, 7), None),
    "first_stage": (FlatNet, (3, 7, 7), "body.2"),
}


def _register_reduced() -> None:
    """In evaluation, where sides alternate: one example at a time would draw others."""
    for name, (make, shape, until) in REDUCED.items():
        for kernel in ("side", "galerkin"):
            register(
                Case(
                    f"reduced_{name}_{kernel}",
                    lambda make=make, shape=shape, until=until, kernel=kernel: perexfx.downsample(
                        make(), torch.zeros(2, *shape), kernel=kernel, until=until
                    ).eval(),
                    images(*shape),
                )
            )


_register_reduced()
