"""Every layer and every use of a parameter that is not in `cases.py`: raw products, ties, adapters, the fallback."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.cases import case, ids, images


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / 2)


# Products with a raw parameter


@case(images(5, 6))
class matmul_right(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = parameter(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) @ self.w


@case(images(6, 5))
class matmul_left(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = parameter(3, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(self.w, torch.tanh(x))


@case(images(2, 5, 6))
class matmul_per_group(nn.Module):
    """One matrix per group, spread over the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = parameter(2, 6, 3), parameter(1, 2, 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (x.tanh() @ self.w) @ self.v


@case(images(5, 6))
class matmul_spreads_the_input(nn.Module):
    """The parameter has a group axis that the input lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.w = parameter(2, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x.unsqueeze(1).matmul(self.w)


@case(images(6))
class matmul_vectors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.v, self.u = parameter(6, 5), parameter(5), parameter(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([torch.mv(x @ self.w, self.v), x @ self.u], 1)


@case(images(5, 6))
class matmul_of_merged_axes(nn.Module):
    """GPT-2's Conv1D: `addmm` on `[B * T, D]`, the weight stored transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b, self.v = parameter(6, 4), parameter(4), parameter(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.addmm(self.b, x.reshape(-1, 6), self.w).tanh()
        return torch.mm(h, self.v).view(x.shape[0], 5, 3)


@case(images(5, 6))
class addmm_scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b, self.c = parameter(6, 4), parameter(5, 1), parameter(4)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        h = torch.baddbmm(self.b, x, self.w.expand(n, 6, 4), beta=0.5, alpha=2.0)
        return torch.addmm(self.c, h.sum(1), self.w.t() @ self.w, beta=3.0)


@case(images(5, 6))
class baddbmm_of_values(nn.Module):
    """Only the addend is a parameter: both factors carry examples."""

    def __init__(self) -> None:
        super().__init__()
        self.b = parameter(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.b, x, x.transpose(1, 2)).softmax(-1) @ x


@case(images(5, 6))
class einsums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.v, self.u = parameter(2, 6, 3), parameter(2, 3, 4), parameter(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        heads = torch.einsum("btd,hde->bhte", x, self.w).tanh()
        mixed = torch.einsum("...hte, hef -> ...thf", heads, self.v)
        return torch.einsum("bthf,fh", mixed, self.u)


@case(images(5, 6))
class einsums_by_the_fallback(nn.Module):
    """Three operands, a repeated label, interleaved axes, a parameter summed by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v, self.u = parameter(6, 3), parameter(3, 6, 2, 5), parameter(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.einsum("bti,ij,bti->btj", x, self.w, x)
        b = torch.einsum("bti,jikt->btjk", x, self.v)
        c = torch.einsum("bti,ii->bt", x, self.u)
        d = torch.einsum("bti,jk->btj", x, self.w)
        return torch.cat([a, b.flatten(2), c.unsqueeze(2), d], 2)


@case(images())
class einsum_of_scalars(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = parameter()

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("a,->a", x, self.w)


# Transposed convolutions


@case(images(4, 7))
def conv_transpose1d() -> nn.Module:
    return nn.ConvTranspose1d(4, 3, 3, stride=2, padding=1, output_padding=1)


@case(images(4, 5, 6))
def conv_transpose2d() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(4, 6, 3, stride=(2, 1), padding=(0, 1), groups=2), nn.Tanh(), nn.ConvTranspose2d(6, 2, 2)
    )


@case(images(2, 3, 4, 3))
def conv_transpose3d() -> nn.Module:
    return nn.ConvTranspose3d(2, 4, 2, stride=2, dilation=2, output_padding=1, groups=2, bias=False)


@case(images(4, 5, 5))
def conv_transpose2d_padded_beyond_the_kernel() -> nn.Module:
    """output_padding as large as the stride allows with dilation: some positions see no kernel."""
    return nn.ConvTranspose2d(4, 4, 2, stride=1, dilation=3, padding=1, output_padding=2, groups=4)


@case(images(3, 2, 5, 5))
class conv_transpose2d_of_frames(nn.Module):
    """Frames merged with the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 3, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x.flatten(0, 1)).unflatten(0, (x.shape[0], 3))


# Bilinear, PReLU, EmbeddingBag


@case(lambda n: (torch.randn(n, 4), torch.randn(n, 5)))
def bilinear() -> nn.Module:
    return nn.Bilinear(4, 5, 3)


@case(lambda n: (torch.randn(n, 3, 4), torch.randn(n, 3, 5)))
class bilinear_of_sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Bilinear(4, 5, 3, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.pair(x.tanh(), y.sin())


@case(images(3, 5))
def prelu_shared() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.PReLU(), nn.Linear(4, 2), nn.PReLU())


@case(images(3, 5, 5))
def prelu_per_channel() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 2), nn.PReLU(4))


@case(images(4))
def prelu_of_features() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.PReLU(4))


@case(ids(5, 7))
def embedding_bag_sum() -> nn.Module:
    return nn.EmbeddingBag(5, 3, mode="sum", padding_idx=1)


@case(ids(5, 7))
def embedding_bag_mean() -> nn.Module:
    return nn.EmbeddingBag(5, 3, mode="mean", padding_idx=-2)


@case(ids(5, 7))
def embedding_bag_max() -> nn.Module:
    return nn.EmbeddingBag(5, 3, mode="max")


@case(lambda n: (torch.randint(0, 5, (n, 7)), torch.randn(n, 7)))
class embedding_bag_weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.scale = nn.EmbeddingBag(5, 3, mode="sum"), parameter(7)

    def forward(self, ids: Tensor, weights: Tensor) -> Tensor:
        return self.bag(ids, per_sample_weights=weights * self.scale)


# Ties, adapters, repeated calls


@case(ids(9, 5))
class tied_head(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(ids))))


@case(images(5, 4))
class tied_transposed(nn.Module):
    """An autoencoder: the decoder is the encoder's transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.encode(x)) @ self.encode.weight


@case(images(5, 6))
class adapters(nn.Module):
    """LoRA: low-rank products over frozen weights."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 4).requires_grad_(False)
        self.down, self.up = parameter(2, 6), parameter(4, 2)
        self.merged = nn.Linear(4, 4).requires_grad_(False)
        self.left, self.right = parameter(4, 1), parameter(1, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.base(x) + 0.5 * F.linear(F.linear(x, self.down), self.up)
        return F.linear(h.tanh(), self.merged.weight + self.left @ self.right, self.merged.bias)


# What no rule knows


@case(images(5, 4))
class by_the_fallback(nn.Module):
    """Operations with a gradient and without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.centers, self.slope = parameter(4), parameter(5, 1), parameter(3, 4), parameter()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.where(x > 0, x, self.a)
        h = torch.maximum(h, self.b) + (1.5 + x.sigmoid()) ** self.slope
        h = torch.lerp(h, self.a, 0.3) + torch.atan2(self.b, h)
        return torch.cdist(h, self.centers) + F.cosine_similarity(h.unsqueeze(2), self.centers, dim=-1)


@case(images(5, 4))
class fallback_to_several_results(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.rows = parameter(4), parameter(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([x, torch.broadcast_to(self.rows, (x.shape[0], 2, 4))], 1)
        far, near = torch.broadcast_tensors(both, self.a)
        low, high = torch.aminmax(torch.maximum(far, near), dim=2)
        return torch.stack([low, high], 2)


@case(images(6, 4))
class fallback_reads_sizes(nn.Module):
    """A size that follows the batch is that of one example when the operation runs example by example."""

    def __init__(self) -> None:
        super().__init__()
        self.a = parameter(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        h = torch.hypot(x, self.a).reshape(n * t, d)
        return F.linear(h, torch.ones(2, d, dtype=x.dtype)).reshape(n, t, 2)


@case(images(6))
class distances_to_prototypes(nn.Module):
    """Parameter-free modules that are given parameters and examples together."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.prototypes = nn.Linear(6, 4), parameter(3, 4)
        self.cosine, self.distance = nn.CosineSimilarity(dim=2), nn.PairwiseDistance(keepdim=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)[:, None]
        return self.cosine(h, self.prototypes[None]) + self.distance(h, self.prototypes)


# Idioms


@case(images(2, 6, 6))
def pooled_to_a_pixel_channels_last() -> nn.Module:
    """Pooling to one pixel says a memory format in place."""
    layers = [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


@case(images(5, 6))
class pooled_transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.adaptive_avg_pool1d(self.first(x).transpose(1, 2), 1).squeeze(2))


@case(images(5, 6))
class tensordots(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = parameter(6, 4), parameter(5, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensordot(torch.tensordot(x, self.w, dims=1).tanh(), self.v, dims=([1, 2], [0, 1]))


@case(images(6))
class empty_parts(nn.Module):
    """A rotary embedding of all features leaves nothing to pass by."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(torch.cat([h[..., :6].sin(), h[..., 6:]], dim=-1))


@case(images(6))
class weights_by_batch_norm(nn.Module):
    """Weight standardisation as timm writes it: the statistics are of a weight's rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gain = nn.Linear(6, 4), parameter(4)

    def forward(self, x: Tensor) -> Tensor:
        w = F.batch_norm(self.layer.weight[None], None, None, weight=self.gain, training=True)[0]
        return F.linear(x, w, self.layer.bias)


@case(ids(5, 7))
class rows_selected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = parameter(5, 3), nn.Linear(3, 2)

    def forward(self, ids: Tensor) -> Tensor:
        rows = [self.table.index_select(0, ids[:, at]) for at in range(3)]
        return self.last(torch.stack(rows, 1).tanh().sum(1))


@case(images(6))
class keywords_nobody_gives(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor, *more: Tensor, **options: object) -> Tensor:
        return self.layer(x).tanh()
