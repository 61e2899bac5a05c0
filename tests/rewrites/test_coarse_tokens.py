"""Tokens of coarse images: a fourth of them where the model allows it, the fine number where it does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import perexfx
from perexfx.kernels.coarse import pooled_tokens
from tests.rewrites.test_downsample import DRAW, loss_of, one_at_a_time
from tests.support.oracle import norms_of


class ViT(nn.Module):
    """Patches, a token of the class where there is one, a table of positions, attention, and a head."""

    def __init__(self, head: str = "class", attention: str = "by hand", pixels: int = 32) -> None:
        super().__init__()
        self.head, count = head, (pixels // 4) ** 2
        self.patches, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
        self.first = nn.Parameter(torch.randn(1, 1, 8)) if head == "class" else None
        self.positions = nn.Parameter(torch.randn(1, count + (head == "class"), 8))
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = layer if attention == "encoder" else None
        self.last = nn.Linear(count * 8 if head == "flat" else 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        if self.first is not None:
            x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1)
        x = x + self.positions
        if self.encoder is not None:
            x = self.encoder(x)
        else:
            b, t, d = x.shape
            q, k, v = self.qkv(self.norm(x)).reshape(b, t, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
            x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))
        match self.head:
            case "class":
                return self.last(x[:, 0])
            case "mean":
                return self.last(x.mean(1))
            case "half":
                return self.last(x[:, :30].mean(1))
            case "taken":
                return self.last(x.index_select(1, torch.tensor([3, 9])).mean(1))
            case _:
                return self.last(x.flatten(1))


@pytest.mark.parametrize(
    ("head", "attention", "pixels"),
    [("class", "by hand", 32), ("mean", "by hand", 28), ("class", "encoder", 32), ("mean", "encoder", 36)],
)
def test_a_fourth_of_the_tokens(head: str, attention: str, pixels: int) -> None:
    torch.manual_seed(0)
    model = ViT(head, attention, pixels).double()
    x = torch.randn(3, 3, pixels, pixels, dtype=torch.float64)
    reduced = perexfx.downsample(model, x)
    fine, coarse = pixels // 4, -(-pixels // 8)
    changes = {change.place.node: change.after for change in reduced.rewriting.changes}
    assert changes["flatten"] == f"tokens of {coarse} x {coarse}"
    assert changes["positions"] == f"mean of blocks: {coarse} x {coarse}"
    assert fine == 2 * coarse or fine == 2 * coarse - 1
    assert reduced(x).shape == (3, 3)
    truth = norms_of(one_at_a_time(reduced, x))
    gm = perexfx.transform(reduced, x)
    torch.manual_seed(DRAW)
    loss_of(gm(x)).mean().backward()
    torch.testing.assert_close(gm.perexfx.norms, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("head", ["half", "taken", "flat"])
def test_tokens_that_are_taken_by_their_place_are_grown(head: str) -> None:
    model, x = ViT(head), torch.randn(2, 3, 32, 32)
    reduced = perexfx.downsample(model, x)
    changes = {change.place.node: change.after for change in reduced.rewriting.changes}
    assert changes["flatten"] == "the same, of images grown to 8 x 8"
    assert reduced(x).shape == (2, 3)


def test_a_table_of_tokens_is_the_mean_of_blocks() -> None:
    images = torch.randn(1, 5, 7, 6)
    table = torch.cat([torch.ones(1, 2, 5), images.flatten(2).transpose(1, 2)], 1)
    found = pooled_tokens(table, (7, 6), 2)
    assert torch.equal(found[:, :2], table[:, :2])
    expected = F.avg_pool2d(images, 2, ceil_mode=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found[:, 2:], expected)
    torch.testing.assert_close(pooled_tokens(table[0, 2:], (7, 6), 0), expected[0])


class _OfTokens(nn.Module):
    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.patches, self.operation = nn.Conv2d(3, 8, 4, 4), operation

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(self.patches(x).flatten(2).transpose(1, 2))


COUNTING: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda t: t.sum(1),
    "gram": lambda t: (t.transpose(1, 2) @ t).flatten(1),
    "einsum": lambda t: torch.einsum("bnc,bnd->bcd", t, t).flatten(1),
    "linear attention": lambda t: (F.elu(t) @ (F.elu(t).transpose(1, 2) @ t)).mean(1),
    "norm": lambda t: t.norm(dim=1),
    "normalized": lambda t: F.normalize(t, dim=1).mean(1),
    "cumulated": lambda t: t.cumsum(1).mean(1),
    "log of sums": lambda t: t.logsumexp(1),
    "every other": lambda t: t[:, ::2].mean(1),
    "the first eight": lambda t: t[:, :8].mean(1),
    "one": lambda t: t[:, 3],
    "the largest's place": lambda t: t.argmax(1).to(t.dtype),
    "windows": lambda t: F.avg_pool1d(t.transpose(1, 2), 2).mean(2),
    "features": lambda t: t.flatten(1)[:, :8],
}


@pytest.mark.parametrize("name", COUNTING)
def test_what_depends_on_their_number_reads_grown_ones(name: str) -> None:
    model, x = _OfTokens(COUNTING[name]), torch.randn(2, 3, 48, 48)
    changes = {c.place.node: c.after for c in perexfx.downsample(model, x).rewriting.changes}
    assert changes["flatten"] == "the same, of images grown to 12 x 12"


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda t: t.mean(1),
    "largest": lambda t: t.amax(1),
    "attention by hand": lambda t: ((t @ t.transpose(1, 2)).softmax(-1) @ t).mean(1),
    "attention": lambda t: F.scaled_dot_product_attention(t, t, t).mean(1),
    "heads": lambda t: t.reshape(t.shape[0], t.shape[1], 2, 4).transpose(1, 2).mean((1, 2)),
    "layer norm": lambda t: F.layer_norm(t, (8,)).mean(1),
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_does_not_stays_coarse(name: str) -> None:
    model, x = _OfTokens(PLAIN[name]), torch.randn(2, 3, 48, 48)
    reduced = perexfx.downsample(model, x)
    changes = {c.place.node: c.after for c in reduced.rewriting.changes}
    assert changes["flatten"] == "tokens of 6 x 6"
    assert reduced(x).shape == model(x).shape
