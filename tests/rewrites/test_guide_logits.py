"""Guided models: equal to the plain merge where they should be, and else off by the coefficients and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import perexfx
from perexfx.ir.node import info_of
from perexfx.rewrites import subject_of
from perexfx.views.drawing import drawing_of
from tests.support.oracle import Batch, norms_of, one_at_a_time

WIDTH, N = 5, 6


class Columns(nn.Module):
    """Heads of their own on one input, merged as a function says."""

    def __init__(self, pathways: int, num_classes: int, merged: Callable[..., Any], dtype: Any = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(pathways * num_classes)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, num_classes, dtype=dtype) for _ in range(pathways))
        self.weights = nn.Parameter(torch.linspace(0.2, 1.3, pathways, dtype=dtype))
        self.merged = merged

    def forward(self, x: Tensor) -> Any:
        return self.merged([head(x) for head in self.heads], self.weights)


def total(heads: Sequence[Tensor], weights: Tensor) -> Any:
    return sum(heads)


def mean(heads: Sequence[Tensor], weights: Tensor) -> Tensor:
    return torch.stack(list(heads)).mean(0)


def halved(heads: Sequence[Tensor], weights: Tensor) -> Any:
    return sum(heads) / len(heads)


def weighted(heads: Sequence[Tensor], weights: Tensor) -> Any:
    return sum(weights[at] * head for at, head in enumerate(heads))


def apart(heads: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    return list(heads)


MERGES = [total, mean, halved, weighted]


def batch(num_classes: int, dtype: Any = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(N, WIDTH, dtype=dtype), torch.randint(num_classes, (N,))


def gradients(output: Tensor, y: Tensor, model: nn.Module) -> list[Tensor]:
    found = torch.autograd.grad(F.cross_entropy(output, y), list(model.parameters()), allow_unused=True)
    return [torch.zeros(0) if each is None else each for each in found]


def same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def unequal(g: nn.Module) -> nn.Module:
    """With weaknesses that differ."""
    torch.manual_seed(2)
    g.guide.weakness.copy_(torch.rand_like(g.guide.weakness) + 0.1)
    return g


@pytest.mark.parametrize("merged", MERGES)
@pytest.mark.parametrize("per", ["class", "target"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("choose", ["soft", "weakest"])
def test_equal_scores_are_the_plain_merge_to_the_last_bit(merged: Any, per: str, dtype: Any, choose: str) -> None:
    for pathways in range(2, 17):
        num_classes = (2, 3, 10, 1000)[pathways % 4]
        model = Columns(pathways, num_classes, merged, dtype)
        x, y = batch(num_classes, dtype)
        plain = model(x)
        expected = gradients(plain, y, model)
        for source in ("batch", "given"):
            g = perexfx.guide_logits(model, x, num_classes=num_classes, per=per, choose=choose, table_from=source)
            for weakness in (0.0, 0.7):
                g.guide.weakness.fill_(weakness)
                g.guide.pending_classes.zero_()
                out = g(x, targets=y)
                assert torch.equal(out, plain)
                assert same(gradients(out, y, g), expected)


def test_unequal_scores_are_not_the_plain_merge() -> None:
    model, (x, y) = Columns(3, 4, total), batch(4)
    for per in ("class", "target"):
        g = unequal(perexfx.guide_logits(model, num_classes=4, per=per))
        out = g(x, targets=y)
        assert torch.equal(out, model(x)) is (per == "class")
        assert not same(gradients(out, y, g), gradients(model(x), y, model))


@pytest.mark.parametrize("merged", [*MERGES, apart])
@pytest.mark.parametrize("choose", ["soft", "weakest"])
@pytest.mark.parametrize("per", ["class", "target"])
@pytest.mark.parametrize("source", ["batch", "given"])
def test_a_pathway_gets_its_share_of_the_merges_gradient(merged: Any, choose: str, per: str, source: str) -> None:
    P, C = 3, 4
    model, (x, y) = Columns(P, C, merged, torch.float64), batch(C, torch.float64)
    g = unequal(
        perexfx.guide_logits(
            model, x, num_classes=C, choose=choose, per=per, temperature=0.7, table_from=source, momentum=0.5
        )
    )
    W = g.guide.weakness.clone()
    if choose == "soft":
        powers = (W + 1e-3) ** (1 / 0.7)
        a = powers / powers.sum(0)
    else:
        a = W.eq(W.max(0).values).double()
    logits = [head(x) for head in model.heads]
    own = {total: torch.ones(P, dtype=torch.float64), weighted: model.weights.detach()}
    scale = own.get(merged, torch.full((P,), 1 / P, dtype=torch.float64))
    terms = torch.stack([w * z for w, z in zip(scale, logits, strict=True)])
    plain = terms.sum(0)
    value = plain if per == "class" else P * torch.einsum("pn,pnc->nc", a[:, y], terms)
    out = g(x, targets=y)
    torch.testing.assert_close(out, value, rtol=0, atol=1e-12)
    error = (torch.softmax(value, -1) - F.one_hot(y, C)).detach() / N  # the plain merge's gradient, at its value
    shares = a.unsqueeze(1) if per == "class" else a[:, y].unsqueeze(-1)
    by_logits = P * shares * scale.view(P, 1, 1) * error
    found = gradients(out, y, g)
    for at, head in enumerate(model.heads):
        expected = torch.autograd.grad(logits[at], [head.weight, head.bias], by_logits[at], retain_graph=True)
        own = [found[i] for i, p in enumerate(g.parameters()) if p is head.weight or p is head.bias]
        torch.testing.assert_close(own, list(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("merged", MERGES)
@pytest.mark.parametrize("per", ["class", "target"])
@pytest.mark.parametrize("source", ["batch", "given"])
def test_eval_is_the_plain_model(merged: Any, per: str, source: str) -> None:
    model, (x, y) = Columns(3, 4, merged), batch(4)
    g = unequal(perexfx.guide_logits(model, x, num_classes=4, per=per, table_from=source)).eval()
    before = copy.deepcopy(g.state_dict())
    assert torch.equal(g(x), model(x))
    assert torch.equal(g(x, targets=y), model(x))
    assert torch.equal(g(x, targets=torch.full((N,), -100)), model(x))
    assert same(gradients(g(x), y, g), gradients(model(x), y, model))
    assert all(torch.equal(g.state_dict()[name], value) for name, value in before.items())


def test_guided_in_eval_follows_train_and_back() -> None:
    model, (x, y) = Columns(3, 4, total).eval(), batch(4)
    g = unequal(perexfx.guide_logits(model, num_classes=4, per="target"))
    assert torch.equal(g(x), model(x))
    assert not torch.equal(g.train()(x, targets=y), model(x))


def test_heads_returned_apart_become_their_mean() -> None:
    model, (x, y) = Columns(3, 4, apart), batch(4)
    g = perexfx.guide_logits(model, x, num_classes=4)
    assert torch.equal(g(x, targets=y), torch.stack(model(x)).mean(0))
    assert torch.equal(g.eval()(x), torch.stack(model(x)).mean(0))


@pytest.mark.parametrize("per", ["class", "target"])
@pytest.mark.parametrize("source", ["batch", "given"])
def test_infinite_logits_stay_what_they_are(per: str, source: str) -> None:
    def masked(heads: Sequence[Tensor], weights: Tensor) -> Any:
        mask = torch.tensor([0.0, 0.0, -torch.inf, 0.0])
        return sum(head + mask for head in heads)

    model, (x, _) = Columns(3, 4, masked), batch(4)
    y = torch.tensor([0, 1, 3, 0, 1, 3])
    g = perexfx.guide_logits(model, x, num_classes=4, per=per, table_from=source)
    for equal in (True, False):
        out = (g if equal else unequal(g))(x, targets=y)
        assert torch.equal(out.isinf(), model(x).isinf())
        found = gradients(out, y, g)
        assert all(each.isfinite().all() for each in found)
        assert same(found, gradients(model(x), y, model)) is equal
    assert torch.equal(g.eval()(x), model(x))


def test_no_number_is_not_hidden() -> None:
    model, (x, y) = Columns(3, 4, total), batch(4)
    x[2] = torch.nan
    g = unequal(perexfx.guide_logits(model, num_classes=4, per="target"))
    assert g(x, targets=y)[2].isnan().all()
    g(x, targets=y)
    assert g.guide.weakness.isfinite().all()


def test_the_parameters_are_the_models_own() -> None:
    model, (x, _) = Columns(3, 4, total), batch(4)
    names = dict(model.named_parameters())
    g = perexfx.guide_logits(model, x, num_classes=4)
    found = dict(g.named_parameters())
    assert list(found) == list(names)
    assert all(found[name] is parameter for name, parameter in names.items())
    assert not hasattr(model, "guide")
    assert set(g.state_dict()) - set(model.state_dict()) == {
        f"guide.{name}" for name in ("weakness", "seen", "pending", "pending_classes")
    }


def test_what_a_guided_model_says_of_itself() -> None:
    g = perexfx.guide_logits(Columns(2, 4, total), num_classes=4, score="error")
    assert g.rewriting.name == "guide_logits"
    assert g.rewriting.summary == "The merge of 2 pathways, the sum of `linear`, `linear_1`, is guided."
    (change,) = g.rewriting.changes
    assert change.place.node == "add_1"
    assert change.before == "the sum of `linear`, `linear_1`"
    assert change.after == "guided: score error, soft choice, per class, table from the batch"
    assert "targets" not in [node.name for node in g.rewriting.before.nodes]
    before = [node.name for node in g.rewriting.before.nodes]
    added = [node for node in g.graph.nodes if node.name not in (*before, "targets")]
    assert [node.name for node in g.graph.nodes if node not in added] == ["x", "targets", *before[1:]]
    assert {info_of(node).module for node in added} == {"guide"}
    assert {info_of(node).source for node in added} == {change.place.source}


def trained(g: nn.Module, x: Tensor, y: Tensor, steps: int) -> nn.Module:
    optimizer = torch.optim.SGD(g.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(g(x, targets=y), y).backward()
        optimizer.step()
    return g


@pytest.mark.parametrize("source", ["batch", "given"])
def test_copies_and_files_go_on_as_the_original_does(source: str, tmp_path: Path) -> None:
    x, y = batch(4)
    g = perexfx.guide_logits(Columns(3, 4, total), num_classes=4, per="target", table_from=source)
    trained(unequal(g), x, y, 3)
    copied = copy.deepcopy(g)
    torch.save(g, tmp_path / "g.pt")
    loaded = torch.load(tmp_path / "g.pt", weights_only=False)
    fresh = perexfx.guide_logits(Columns(3, 4, total), num_classes=4, per="target", table_from=source)
    fresh.load_state_dict(copy.deepcopy(g.state_dict()))
    trained(g, x, y, 3)
    for other in (copied, loaded, fresh):
        trained(other, x, y, 3)
        assert all(torch.equal(other.state_dict()[name], value) for name, value in g.state_dict().items())
    assert copied.guide.weakness is not g.guide.weakness


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("per", ["class", "target"])
def test_a_checkpoint_that_runs_the_forward_again_counts_it_once(reentrant: bool, per: str) -> None:
    x, y = batch(4)
    x.requires_grad_()
    plain = perexfx.guide_logits(Columns(3, 4, total), num_classes=4, per=per)
    again = copy.deepcopy(plain)
    for _ in range(3):
        expected = gradients(plain(x, targets=y), y, plain)
        again.zero_grad()
        out = checkpoint(lambda given: again(given, targets=y), x, use_reentrant=reentrant)
        F.cross_entropy(out, y).backward()
        assert same([p.grad for p in again.parameters() if p.grad is not None], [e for e in expected if e.numel()])
        assert torch.equal(again.guide.weakness, plain.guide.weakness)
        assert torch.equal(again.guide.pending, plain.guide.pending)
    assert plain.guide.weakness.any()


def test_the_table_is_constant_within_a_step() -> None:
    x, y = batch(4)
    g = perexfx.guide_logits(Columns(3, 4, total), num_classes=4)
    g(x, targets=y)
    assert not g.guide.weakness.any()
    g(x, targets=y)
    first = g.guide.weakness.clone()
    assert first.any()
    out = g.eval()(x)
    assert torch.equal(g.guide.weakness, first)
    g.train()
    out = g(x, targets=y)
    loss = F.cross_entropy(out, y)
    once = torch.autograd.grad(loss, list(g.heads.parameters()), retain_graph=True)
    g(x, targets=y)
    assert same(torch.autograd.grad(loss, list(g.heads.parameters())), once)


@pytest.mark.parametrize("per", ["class", "target"])
@pytest.mark.parametrize("choose", ["soft", "weakest"])
@pytest.mark.parametrize("merged", [total, weighted, apart])
@pytest.mark.parametrize("known", [True, False])
def test_a_transformed_guided_model_is_one_example_at_a_time(per: str, choose: str, merged: Any, known: bool) -> None:
    C = 4
    model, (x, y) = Columns(3, C, merged, torch.float64), batch(C, torch.float64)
    g = unequal(perexfx.guide_logits(model, x, num_classes=C, per=per, choose=choose, table_from="given"))
    inputs = {"x": x, "targets": y} if per == "target" else {"x": x}

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output, targets, reduction="sum")

    rows = one_at_a_time(g, Batch((x, y), y), loss)
    t = perexfx.transform(g, inputs if known else None, clip_norm=0.5, loss_reduction="sum")
    loss(t(**inputs), y).backward()
    norms = norms_of(rows)
    torch.testing.assert_close(t.perexfx.norms, norms, rtol=1e-9, atol=1e-9)
    factors = (0.5 / norms).clamp(max=1)
    for name, parameter in t.named_parameters():
        expected = torch.einsum("n,n...->...", factors, rows[name])
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(t.eval()(x), g.eval()(x))


def test_a_transformed_guide_follows_updates() -> None:
    x, y = batch(4)
    model = Columns(3, 4, total)
    t = perexfx.transform(perexfx.guide_logits(model, num_classes=4, per="target", table_from="given"))
    before = t(x, targets=y)
    t.guide.update([head(x) for head in model.heads], y)
    assert not torch.equal(t(x, targets=y), before)


class Around(nn.Module):
    """A guided model inside of another."""

    def __init__(self, g: nn.Module) -> None:
        super().__init__()
        self.g = g

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return 2 * self.g(x, targets=y)


@pytest.mark.parametrize("per", ["class", "target"])
@pytest.mark.parametrize("known", [True, False])
def test_a_guided_model_inside_of_another_can_be_transformed(per: str, known: bool) -> None:
    x, y = batch(4, torch.float64)
    model = Columns(3, 4, total, torch.float64)
    around = Around(unequal(perexfx.guide_logits(model, num_classes=4, per=per, table_from="given")))
    t = perexfx.transform(around, (x, y) if known else None, clip_norm=None)
    out = t(x, y)
    torch.testing.assert_close(out, around(x, y))
    F.cross_entropy(out, y).backward()

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output, targets)

    rows = one_at_a_time(around, Batch((x, y), y), loss)
    torch.testing.assert_close(t.perexfx.norms, norms_of(rows), rtol=1e-9, atol=1e-9)
    assert torch.equal(t.eval()(x, y), 2 * model(x))


@pytest.mark.parametrize("inside", [False, True])
def test_a_table_from_the_batch_is_refused_where_examples_are_told_apart(inside: bool) -> None:
    g = perexfx.guide_logits(Columns(3, 4, total), num_classes=4)
    path = "g.guide" if inside else "guide"
    with pytest.raises(
        perexfx.ArgumentError, match=f"^The table of `{path}` is made from the batches' targets"
    ) as error:
        perexfx.transform(Around(g) if inside else g)
    assert 'Pass `table_from="given"`' in str(error.value)
    assert "privacy you account for" in str(error.value)


def test_half_precision_keeps_a_precise_table() -> None:
    model, (x, y) = Columns(3, 4, total).to(torch.bfloat16), batch(4, torch.bfloat16)
    for per in ("class", "target"):
        g = perexfx.guide_logits(model, num_classes=4, per=per)
        expected = gradients(model(x), y, model)
        out = g(x, targets=y)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, model(x))
        assert same(gradients(out, y, g), expected)
        g(x, targets=y)
        assert g.guide.weakness.dtype == torch.float32
        g.to(torch.bfloat16)
        assert g.guide.weakness.dtype == torch.float32
        assert g.double().guide.weakness.dtype == torch.float64
        model.to(torch.bfloat16)


@pytest.mark.parametrize("source", ["batch", "given"])
def test_looking_at_shapes_moves_no_table(source: str) -> None:
    x, y = batch(4)
    g = perexfx.guide_logits(Columns(3, 4, total), num_classes=4, table_from=source)
    trained(g, x, y, 2)
    before = copy.deepcopy(g.state_dict())
    shapes = subject_of(g, {"x": x, "targets": y}).shapes
    assert shapes is not None
    assert shapes["guide" if source == "batch" else "sub_2"] == (N, 4)
    assert all(torch.equal(g.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("per", ["class", "target"])
def test_a_given_table_goes_through_vmap(per: str) -> None:
    model, (x, y) = Columns(3, 4, weighted, torch.float64), batch(4, torch.float64)
    g = unequal(perexfx.guide_logits(model, num_classes=4, per=per, table_from="given"))
    parameters = {name: parameter.detach() for name, parameter in g.named_parameters()}

    def loss(given: dict[str, Tensor], example: Tensor, target: Tensor) -> Tensor:
        targets = target.unsqueeze(0)
        out = torch.func.functional_call(g, given, (example.unsqueeze(0),), {"targets": targets})
        return F.cross_entropy(out, targets)

    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, y)
    rows = one_at_a_time(g, Batch((x, y), y), F.cross_entropy)
    torch.testing.assert_close(found, rows, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("source", ["batch", "given"])
def test_autocast_is_left_to_the_model(source: str) -> None:
    model, (x, y) = Columns(3, 4, weighted), batch(4)
    g = perexfx.guide_logits(model, num_classes=4, per="target", table_from=source)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = g(x, targets=y)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, model(x))
        assert torch.equal(unequal(g).eval()(x), model(x))


def test_batch_norm_follows_the_mode_and_its_statistics_are_the_models() -> None:
    model = nn.Sequential(nn.BatchNorm1d(WIDTH), Columns(3, 4, total))
    x, y = batch(4)
    twin = copy.deepcopy(model)
    g = perexfx.guide_logits(model, num_classes=4)
    for _ in range(2):
        assert torch.equal(g(x, targets=y), twin(x))
    assert torch.equal(model[0].running_var, twin[0].running_var)
    assert torch.equal(g.eval()(x), twin.eval()(x))
    assert torch.equal(g.train()(x), twin.train()(x))


def test_compiled_it_is_the_same() -> None:
    x, y = batch(4)
    g = perexfx.guide_logits(Columns(3, 4, total), num_classes=4, per="target")
    other = copy.deepcopy(g)
    compiled = torch.compile(g, backend="eager")
    for _ in range(3):
        torch.testing.assert_close(compiled(x, targets=y), other(x, targets=y))
    torch.testing.assert_close(g.guide.weakness, other.guide.weakness)
    assert g.guide.weakness.any()


def test_guided_models_are_exported() -> None:
    x, _ = batch(4)
    model = Columns(3, 4, total)
    for source in ("batch", "given"):
        g = perexfx.guide_logits(model, num_classes=4, table_from=source).eval()
        exported = torch.export.export(g, (x,)).module()
        assert torch.equal(exported(x), model(x))


# Near the model: what is refused


class WithTargets(nn.Module):
    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return x


class WithMany(nn.Module):
    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return x


class WithOptions(nn.Module):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return x


class WithGuide(nn.Module):
    guide = 3

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (3, "`model` should be a torch.nn.Module. Found int."),
        (
            WithTargets(),
            "`WithTargets.forward` has an argument `targets`, which is the name of a guided forward's own.",
        ),
        (WithMany(), "`WithMany.forward` takes `*others`, beside which a guided forward cannot have"),
        (WithOptions(), "`WithOptions.forward` takes `**options`, beside which a guided forward cannot have"),
        (WithGuide(), "`WithGuide` has an attribute `guide`, a name that guided models need for their guide. Rename"),
    ],
)
def test_models_without_room_for_a_guide(model: Any, message: str) -> None:
    with pytest.raises(perexfx.ArgumentError) as error:
        perexfx.guide_logits(model, num_classes=4)
    assert str(error.value).startswith(message)


def test_a_guided_model_is_not_guided_again() -> None:
    g = perexfx.guide_logits(Columns(3, 4, total), num_classes=4)
    with pytest.raises(perexfx.ArgumentError, match="`Columns` is guided already"):
        perexfx.guide_logits(g, num_classes=4)


def test_a_transformed_model_is_not_guided() -> None:
    t = perexfx.transform(Columns(3, 4, total))
    with pytest.raises(perexfx.ArgumentError, match="Guide the original model, and transform the result"):
        perexfx.guide_logits(t, num_classes=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "`num_classes` should be a number of classes, at least 2. Found 1."),
        ({"num_classes": 4.0}, "`num_classes` should be a number of classes, at least 2. Found 4.0."),
        ({"score": "f1"}, '`score` should be "loss" or "error" or "probability". Found \'f1\'.'),
        ({"choose": "hard"}, '`choose` should be "soft" or "weakest". Found \'hard\'.'),
        ({"per": "example"}, '`per` should be "class" or "target". Found \'example\'.'),
        ({"table_from": "file"}, '`table_from` should be "batch" or "given". Found \'file\'.'),
        ({"temperature": 0}, "`temperature` should be a finite number, at least 0.001. Found 0."),
        ({"temperature": float("nan")}, "`temperature` should be a finite number, at least 0.001. Found nan."),
        ({"momentum": 1.0}, "`momentum` should be a number from 0 up to, not including, 1. Found 1.0."),
        ({"momentum": True}, "`momentum` should be a number from 0 up to, not including, 1. Found True."),
        ({"merge": 3}, '`merge` should be "auto" or the name of a node of the graph. Found 3.'),
    ],
)
def test_options_that_are_not_what_they_should_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(perexfx.ArgumentError) as error:
        perexfx.guide_logits(Columns(3, 4, total), **{"num_classes": 4, **options})
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("source", ["batch", "given"])
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([0, 1, 2, 3, 4, 0]), "Found 4."),
        (torch.tensor([0, 1, 2, -100, 3, 0]), "Found -100."),
        (torch.zeros(1, dtype=torch.long), "Found shape [1]."),
        (torch.zeros(N, 1, dtype=torch.long), "Found shape [6, 1]."),
        (torch.zeros(N), "Found torch.float32."),
        ([0] * N, "Found list."),
    ],
)
def test_targets_that_are_no_classes(source: str, targets: Any, message: str) -> None:
    x, _ = batch(4)
    g = perexfx.guide_logits(Columns(3, 4, total), num_classes=4, per="target", table_from=source)
    state = copy.deepcopy(g.state_dict())
    with pytest.raises(perexfx.ArgumentError) as error:
        g(x, targets=targets)
    expected = "`targets` should be the classes of the 6 examples: integers from 0 to 3, of shape [6]. "
    assert str(error.value) == expected + message
    assert all(torch.equal(g.state_dict()[name], value) for name, value in state.items())


@pytest.mark.parametrize("source", ["batch", "given"])
def test_training_without_targets(source: str) -> None:
    model, (x, _) = Columns(3, 4, total), batch(4)
    g = unequal(perexfx.guide_logits(model, num_classes=4, table_from=source))
    weakness = g.guide.weakness.clone()
    assert torch.equal(g(x), model(x))
    assert torch.equal(g.guide.weakness, weakness)
    g = perexfx.guide_logits(model, num_classes=4, per="target", table_from=source)
    with pytest.raises(
        perexfx.ArgumentError, match=r"Found None. Call the model as `model\(x, targets=y\)`, or in eval"
    ):
        g(x)


def test_logits_of_another_number_of_classes() -> None:
    x, y = batch(4)
    for source in ("batch", "given"):
        g = perexfx.guide_logits(Columns(3, 4, total), num_classes=5, table_from=source)
        with pytest.raises(perexfx.ArgumentError) as error:
            g(x, targets=y)
        assert str(error.value) == (
            "The logits of pathway 0 should have shape [6, 5]: examples first, and `num_classes` classes. Found [6, 4]."
        )


def test_a_merge_by_its_name() -> None:
    def twice(heads: Sequence[Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
        return heads[0] + heads[1], heads[2] + heads[3]

    model, (x, y) = Columns(4, 4, twice), batch(4)
    with pytest.raises(perexfx.RefusedError) as refused:
        perexfx.guide_logits(model, x, num_classes=4)
    lines = str(refused.value).splitlines()
    assert [line.split(" ")[0] for line in lines] == ["`add`", "`add_1`", "`output`"]
    assert lines[1].endswith(
        "is one of 3 merges: the sum of `linear_2`, `linear_3`. Only one merge is guided. "
        'Pass `merge="add_1"` to guide this one.'
    )
    assert "is one of 3 merges: 2 heads, `add`, `add_1`." in lines[2]
    g = unequal(perexfx.guide_logits(model, x, num_classes=4, merge="add_1", per="target"))
    plain, guided = g(x, targets=y)
    assert torch.equal(plain, model(x)[0])
    assert not torch.equal(guided, model(x)[1])
    with pytest.raises(perexfx.ArgumentError) as unknown:
        perexfx.guide_logits(model, x, num_classes=4, merge="sum_of_heads")
    assert str(unknown.value) == (
        "`merge` should be the name of a node of the graph, or \"auto\". Found 'sum_of_heads'. "
        "Merges are at `add`, `add_1`, `output`."
    )
    with pytest.raises(perexfx.RefusedError) as other:
        perexfx.guide_logits(model, x, num_classes=4, merge="linear")
    said = str(other.value)
    assert said.startswith("`linear` in module `heads.0` (")
    assert "neither adds nor averages two or more values of shape [6, 4]. A merge adds or averages logits" in said
    assert said.endswith("Merges are at `add`, `add_1`, `output`.")
    assert other.value.refusals[0].place is not None
    assert other.value.refusals[0].place.node == "linear"


def test_refusals_are_shown_on_the_graph(tmp_path: Path) -> None:
    def twice(heads: Sequence[Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
        return heads[0] + heads[1], heads[2] + heads[3]

    def none(heads: Sequence[Tensor], weights: Tensor) -> Tensor:
        return heads[0] * heads[1]

    for merged, nodes in ((twice, ["add", "add_1"]), (none, ["output"])):
        with pytest.raises(perexfx.RefusedError) as error:
            perexfx.guide_logits(Columns(4, 4, merged), num_classes=4)
        assert [refusal.place.node for refusal in error.value.refusals if refusal.place] == nodes
        drawn = drawing_of(error.value).before.nodes
        assert [node.id for node in drawn if node.role == "culprit"] == nodes
        assert perexfx.visualize(error.value, tmp_path / "merges.html").exists()
