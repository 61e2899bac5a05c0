"""Models and batches for the exactness tests: small, float64, and hostile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.oracle import Batch, Loss

B = 4


def squares(output: Any, targets: Tensor) -> Tensor:
    """Mean over examples of a loss with a curved gradient; works for outputs of any shape with examples first."""
    flat = output.reshape(targets.shape[0], -1)
    return ((flat - targets[:, None]).square().sum(1) + flat.sin().sum(1)).mean()


@dataclass(frozen=True)
class Case:
    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    batch_dim: int = 0
    loss: Loss = field(default=squares)

    def build(self) -> nn.Module:
        torch.manual_seed(len(self.name))
        return self.model().double()

    def batch(self, n: int = B, seed: int = 0) -> Batch:
        torch.manual_seed(seed + 1)
        inputs = self.inputs(n)
        return Batch(inputs, torch.randn(n), self.batch_dim).double()


def images(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda n: (torch.randn(n, *shape),)


def ids(vocabulary: int, *shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda n: (torch.randint(0, vocabulary, (n, *shape)),)


BY_NAME: dict[str, Case] = {}
CASES = BY_NAME.values()


def register(found: Case) -> None:
    assert found.name not in BY_NAME, found.name
    BY_NAME[found.name] = found


def case(inputs: Callable[[int], tuple[Tensor, ...]], batch_dim: int = 0) -> Callable[[Any], Any]:
    """Registers a module class (or a function that makes a module) under its name."""

    def add(make: Any) -> Any:
        register(Case(make.__name__, make, inputs, batch_dim))
        return make

    return add


# Linear


@case(images(6))
def linear_2d() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


@case(images(7, 6))
def linear_3d() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))


@case(images(2, 3, 6))
def linear_4d() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 2))


@case(images(40, 3))
def linear_many_positions() -> nn.Module:
    return nn.Linear(3, 2)


@case(images(5, 6))
class merged_major(nn.Module):
    """[B, T, D] -> [B * T, D] -> Linear -> back."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        return self.second(F.gelu(self.first(x.reshape(n * t, d))).view(n, t, 4))


@case(images(5, 6))
class merged_minor(nn.Module):
    """[T, B, D] -> [T * B, D] -> Linear -> back: the examples vary fastest."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(0, 1)
        t, n, d = y.shape
        y = torch.tanh(self.first(y.reshape(t * n, d))).reshape(t, n, 4)
        return self.second(y).transpose(0, 1)


@case(images(B, 6))
class time_first_square(nn.Module):
    """(T, B, D) inside a batch-first model with T == B: shapes cannot tell the axes apart."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x.transpose(0, 1)))
        return (y.cumsum(0) + y).transpose(0, 1)


@case(lambda n: (torch.randn(5, n, 6),), batch_dim=1)
class batch_second(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x)).permute(1, 0, 2)


@case(images(3, 2, 6))
class merged_between(nn.Module):
    """Examples between two merged axes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = x.permute(1, 0, 2, 3).reshape(-1, 6)
        return torch.tanh(self.layer(y)).reshape(3, x.shape[0], 2, 4).transpose(0, 1)


# Convolutions


def _conv(rank: int, size: int, **options: Any) -> Callable[[], nn.Module]:
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]

    def make() -> nn.Module:
        return nn.Sequential(layer(4, 6, **options), nn.Tanh(), layer(6, 2, 1))

    return make


_CONVOLUTIONS: list[tuple[str, int, int, dict[str, Any]]] = [
    ("conv1d", 1, 9, {"kernel_size": 3}),
    ("conv1d_options", 1, 11, {"kernel_size": 4, "stride": 2, "padding": 3, "dilation": 2, "groups": 2}),
    ("conv1d_same_even", 1, 9, {"kernel_size": 4, "padding": "same"}),
    ("conv1d_same_even_dilated", 1, 9, {"kernel_size": 4, "padding": "same", "dilation": 3}),
    ("conv2d", 2, 6, {"kernel_size": 3, "padding": 1}),
    ("conv2d_no_bias", 2, 6, {"kernel_size": 3, "bias": False}),
    ("conv2d_valid", 2, 6, {"kernel_size": 3, "padding": "valid"}),
    ("conv2d_same", 2, 6, {"kernel_size": (3, 4), "padding": "same"}),
    ("conv2d_stride", 2, 7, {"kernel_size": 3, "stride": 2, "padding": 1}),
    ("conv2d_stride_larger", 2, 9, {"kernel_size": 2, "stride": 3}),
    ("conv2d_uneven", 2, 9, {"kernel_size": (2, 3), "stride": (3, 2), "padding": (0, 2), "dilation": (2, 1)}),
    ("conv2d_dilated_strided", 2, 11, {"kernel_size": 3, "stride": 2, "dilation": 3, "padding": 2}),
    ("conv2d_groups", 2, 6, {"kernel_size": 3, "groups": 2, "padding": 1}),
    ("conv2d_pointwise", 2, 5, {"kernel_size": 1}),
    ("conv2d_pointwise_strided", 2, 6, {"kernel_size": 1, "stride": 2}),
    ("conv2d_leftover", 2, 8, {"kernel_size": 3, "stride": 3}),
    ("conv2d_circular", 2, 6, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}),
    ("conv2d_reflect", 2, 6, {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"}),
    ("conv2d_replicate_same", 2, 6, {"kernel_size": (2, 3), "padding": "same", "padding_mode": "replicate"}),
    ("conv3d", 3, 4, {"kernel_size": 2, "padding": 1}),
    (
        "conv3d_options",
        3,
        5,
        {"kernel_size": (1, 2, 3), "stride": (1, 2, 1), "dilation": (1, 1, 2), "padding": (0, 1, 2)},
    ),
    ("conv3d_groups", 3, 4, {"kernel_size": 3, "padding": 1, "groups": 2, "stride": 2}),
]
for _name, _rank, _size, _options in _CONVOLUTIONS:
    register(Case(_name, _conv(_rank, _size, **_options), images(4, *[_size] * _rank)))


@case(images(4, 6, 6))
def conv2d_depthwise() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=4), nn.Conv2d(8, 2, 1))


@case(images(3, 2, 5, 5))
class conv_on_frames(nn.Module):
    """Video: the frames of an example are merged into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        n, frames = x.shape[:2]
        y = torch.relu(self.norm(self.conv(x.flatten(0, 1))))
        return y.unflatten(0, (n, frames)).mean((3, 4))


@case(images(2, 5, 5))
class functional_conv(nn.Module):
    """Keyword calls of functions with raw parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.shift = nn.Parameter(torch.randn(4, 2, 3, 3)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(weight=self.kernel, input=x, bias=self.shift, padding="same")


# Normalisation


@case(images(5, 6))
def layer_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2))


@case(images(3, 4, 5))
def layer_norm_two_axes() -> nn.Module:
    return nn.Sequential(nn.LayerNorm((4, 5)), nn.Tanh(), nn.LayerNorm(5, bias=False))


@case(images(5, 6))
def layer_norm_no_affine() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 2))


@case(images(5, 6))
def rms_norm() -> nn.Module:
    return nn.Sequential(nn.RMSNorm(6), nn.Linear(6, 6), nn.RMSNorm((5, 6), eps=1e-3), nn.Tanh(), nn.RMSNorm(6))


@case(images(5, 6))
def rms_norm_no_affine() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.RMSNorm(6, elementwise_affine=False), nn.Linear(6, 2))


@case(images(3, 5, 5))
def group_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(3, 6), nn.ReLU(inplace=True), nn.Conv2d(6, 2, 1))


@case(images(6))
def group_norm_no_positions() -> nn.Module:
    return nn.Sequential(nn.GroupNorm(2, 6), nn.Linear(6, 3))


@case(images(3, 5))
def group_norm_no_affine() -> nn.Module:
    return nn.Sequential(nn.Conv1d(3, 4, 3), nn.GroupNorm(2, 4, affine=False), nn.Conv1d(4, 2, 1))


@case(images(4, 5))
class strided_scales(nn.Module):
    """Scales and shifts that are columns of a matrix, and copies of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.scales, self.shift = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        shift = self.shift.expand(4)
        y = F.group_norm(F.instance_norm(x, weight=self.scales[:, 0], bias=shift), 2, self.scales[:, 1], shift)
        y = F.layer_norm(torch.tanh(y).transpose(1, 2), (4,), self.scales[:, 2], shift)
        return F.rms_norm(torch.tanh(y), (4,), self.scales[:, 3])


@case(images(4, 5))
class instance_norm_bias_alone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(F.instance_norm(x, bias=self.first))
        return F.instance_norm(y, bias=self.second).cumsum(2)


@case(images(3, 5, 5))
def instance_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.Tanh(), nn.InstanceNorm2d(4))


@case(images(3, 9))
def instance_norm_1d() -> nn.Module:
    return nn.Sequential(nn.InstanceNorm1d(3, affine=True), nn.Conv1d(3, 2, 2))


@case(images(3, 5, 5))
def batch_norm_frozen() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    norm.running_mean, norm.running_var = torch.randn(4), torch.rand(4) + 0.5
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Tanh(), nn.Flatten(), nn.BatchNorm1d(36)).eval()


# Embedding


@case(ids(9, 5))
def embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))


@case(lambda n: (torch.tensor([[1, 1, 1, 2], [2, 2, 0, 0], [3, 1, 3, 1], [0, 0, 0, 0]]).repeat(n, 1)[:n],))
def embedding_padding() -> nn.Module:
    return nn.Sequential(nn.Embedding(4, 3, padding_idx=0), nn.LayerNorm(3))


@case(lambda n: (torch.tensor([[3, 1], [3, 3], [0, 2], [1, 3]]).repeat(n, 1)[:n],))
def embedding_padding_from_end() -> nn.Module:
    return nn.Sequential(nn.Embedding(4, 3, padding_idx=-1), nn.LayerNorm(3))


@case(ids(7))
def embedding_one_id() -> nn.Module:
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2))


@case(ids(3, 2, 6))
def embedding_two_axes() -> nn.Module:
    return nn.Sequential(nn.Embedding(3, 4), nn.Tanh())


@case(ids(9, 5))
class positions_by_range(nn.Module):
    """`embedding(arange(T))`, a parameter expression, added to every example."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position, self.head = nn.Embedding(9, 4), nn.Embedding(8, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        return self.head(torch.tanh(self.token(x) + self.position(torch.arange(t, device=x.device))))


@case(ids(9, 5))
class positions_per_example(nn.Module):
    """Position ids that are copied to every example."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(9, 4), nn.Embedding(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        n, t = x.shape
        return torch.tanh(self.token(x) + self.position(torch.arange(t).expand(n, t)))


# Raw parameters


@case(images(5, 6))
class scale_and_shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(5, 1))
        self.divide, self.less = nn.Parameter(torch.rand(1) + 1), nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.scale * x + self.shift
        y = torch.sub(y / self.divide, self.less, alpha=2)
        return (self.shift - y).mul(self.scale) + (1.0 + self.less / (2 + y.square()))


@case(images(6))
class parameter_wider_than_input(nn.Module):
    """[B, 1, D] + [T, D]: the input is broadcast too."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.first = nn.Parameter(torch.randn(5, 6)), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x).unsqueeze(1) * self.queries)


@case(images(3, 8, 8))
class tiny_vit(nn.Module):
    """Patches, a class token through `expand`, positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 4, 4)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 5, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        weights = F.softmax(x @ x.transpose(1, 2), dim=-1)
        return self.head((weights @ x)[:, 0])


@case(images(4, 6))
class tokens_by_other_means(nn.Module):
    """The same by repeat, tile and an expression before the copy."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(s)) for s in ((1, 2, 6), (1, 6), (6,)))

    def forward(self, x: Tensor) -> Tensor:
        n = x.size(0)
        a = self.a.repeat(n, 2, 1)
        b = torch.tile(self.b.unsqueeze(0), (n, 1, 1))
        c = self.c[None, None].expand(n, 1, 6)
        return torch.tanh(torch.cat([a, b, c, x], dim=1)).cumsum(1)


@case(images(5, 6))
class sliced_positions(nn.Module):
    """A table longer than the input, cut to size."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(9, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + self.positions[: x.shape[1]])


@case(images(5, 6))
class in_place_positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.positions = nn.Linear(6, 6), nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        x += self.positions
        return torch.tanh(x)


# Parameter expressions, and parameters used more than once


@case(images(5, 6))
class transposed_tie(nn.Module):
    """An autoencoder with `F.linear(h, W.t())`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.weight)), self.weight.t())


@case(ids(7, 5))
class embedding_tied_to_head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(x)))


@case(images(6))
class called_twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(torch.tanh(self.norm(self.layer(x)))))


@case(images(3, 6, 6))
class weight_standardised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        w = self.conv.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-3)
        return self.head(torch.relu(F.conv2d(x, w, self.conv.bias)).mean((2, 3)))


@case(images(5, 6))
class sliced_weights(nn.Module):
    """Queries, keys and values as slices of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 6) / 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (F.linear(x, w) for w in (self.weight[:4], self.weight[4:8], self.weight[8:]))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@case(images(6))
class low_rank(nn.Module):
    """LoRA: a frozen weight, and an update through two trained ones."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(6, 5), nn.Linear(6, 2, bias=False), nn.Linear(2, 5, bias=False)
        self.base.requires_grad_(False)
        self.shared = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x) * self.shared) * 0.5


@case(images(6))
class unused_and_detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.spare = nn.Linear(6, 3), nn.Linear(3, 3)
        self.anchor = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.anchor.detach() + self.anchor.shape[0]


@case(images(5, 6))
class rows_repeated_along_a_merged_axis(nn.Module):
    """[T, D] repeated to [B * T, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.layer = nn.Parameter(torch.randn(5, 6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        h = x.reshape(-1, 6) + self.positions.repeat(n, 1)
        return self.layer(torch.tanh(h)).view(n, 5, 3)


@case(images(5, 6))
class plain_recurrence(nn.Module):
    """Sizes given loosely, parameter shapes in Python, a loop over time: the cells share their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.table = nn.Linear(10, 4), nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        if self.table.dim() == 2 and self.table.shape[0] >= 5:
            x = x + self.table
        h = torch.zeros(x.shape[0], 4, dtype=x.dtype)
        for t in range(self.table.size(0)):
            h = torch.tanh(self.step(torch.cat([x[:, t], h], 1)))
        return h


@case(images(3, 6))
class activations_and_losses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.act = nn.Linear(6, 6), nn.Hardswish(inplace=True)

    def forward(self, x: Tensor, sizes: tuple[int, int] = (3, 6), options: dict[str, int] = {}) -> Tensor:  # noqa: B006
        h = self.layer(x).view(-1, *sizes)
        h = F.mish(self.act(h * 3)) + F.logsigmoid(h) + F.hardsigmoid(h)
        return F.mse_loss(h, torch.zeros_like(h), reduction="none") + F.smooth_l1_loss(h, x, reduction="none")


@case(images(6, 6))
class one_parameter_twice_in_a_site(nn.Module):
    """The cross terms of both uses belong to the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(6, 6) / 3), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.weight[:, 0])
        y = F.layer_norm(y, (y.shape[-1],), self.scale, self.scale)
        return F.group_norm(torch.tanh(y), 2, self.scale, self.scale)


@case(images(6))
class noise_around_a_weight(nn.Module):
    """`rand_like` of a parameter reads its shape alone; the noise here is always the same."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_deviation = nn.Parameter(torch.randn(3, 6)), nn.Parameter(torch.randn(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.mean + self.log_deviation.exp() * torch.full_like(self.mean, 0.3))


@case(images(6))
class overwritten_after_use(nn.Module):
    """Sums and biases keep no input: what comes later may overwrite it."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.layer = nn.Parameter(torch.randn(6)), nn.Linear(6, 6)
        self.layer.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = x * 2
        y = h + self.shift
        z = self.layer(h)
        return y * h.relu_() + z


@case(lambda n: (torch.randn(n, 4, 6),))
class constant_tables(nn.Module):
    """A layer on a constant: a parameter expression that reads a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.register_buffer("table", torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x) + self.layer(self.table))


@case(lambda n: (torch.randn(n, 6), torch.randn(n, 4), torch.randn(n)))
class several_inputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 3), nn.Linear(4, 3)

    def forward(self, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return self.left(a) * scale.unsqueeze(1) + torch.tanh(self.right(input=b))


@case(images(6))
class under_no_grad(nn.Module):
    """A teacher inside `torch.no_grad()`, sharing its layer with the student."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.layer(x).sigmoid()
        return self.layer(x) * target


@case(images(3, 6, 6))
def dropout_and_pooling() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.Dropout(0.0),
        nn.SiLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Unflatten(1, (4, 2, 2)),
        nn.AdaptiveAvgPool2d(1),
        nn.Upsample(scale_factor=2),
        nn.Flatten(),
        nn.Linear(16, 2),
    )


from tests.support import cases_attention, cases_maps, cases_recurrent, cases_uses  # noqa: E402, F401 (register their cases)
