"""Both captures, their conditions, and arguments of any structure."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import perexfx
from perexfx.capture.forward import CaptureError
from perexfx.runtime.face import runtime_of
from tests.support.cases import BY_NAME, squares
from tests.support.oracle import Batch, assert_close, norms_of, one_at_a_time, train_step, weighted

TOLERANCE = 1e-9


def cannot_be_traced(*_: Any) -> Any:
    raise CaptureError("not traced, for this test.")


NOT_EXPORTED = {
    "transformer": "looks at the values of its mask",
}
"""What torch.export, or the analysis of its graph, refuses, and why; traced, these are exact."""


@pytest.mark.parametrize("name", NOT_EXPORTED)
def test_what_cannot_be_exported_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perexfx.capture.forward._traced", cannot_be_traced)
    case = BY_NAME[name]
    with pytest.raises(perexfx.PerexError):
        perexfx.transform(case.build(), case.batch().inputs, batch_dim=case.batch_dim)


@pytest.mark.parametrize("name", sorted(BY_NAME.keys() - NOT_EXPORTED.keys()))
def test_exported_models_are_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perexfx.capture.forward._traced", cannot_be_traced)
    case = BY_NAME[name]
    model, batch = case.build(), case.batch()
    gradients = one_at_a_time(model, batch, case.loss)
    norms = norms_of(gradients)
    clip_norm = float(norms.median())
    gm = perexfx.transform(model, batch.inputs, clip_norm=clip_norm, batch_dim=case.batch_dim)
    torch.testing.assert_close(gm(*batch.inputs), model(*batch.inputs), rtol=1e-12, atol=1e-12)
    for size in (batch.size, 1, 7):
        batch = case.batch(size)
        gradients = one_at_a_time(model, batch, case.loss)
        norms = norms_of(gradients)
        found = train_step(gm, batch, case.loss)
        assert_close({"norms": gm.perexfx.norms}, {"norms": norms}, TOLERANCE, name)
        assert_close(found, weighted(gradients, (clip_norm / norms).clamp(max=1) / size), TOLERANCE, name)


def agrees(gm: nn.Module, model: nn.Module, call: Any, loss: Any, n: int) -> None:
    """`call(module, rows)` gives the output for some rows; compared with one row at a time."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = [
        torch.autograd.grad(loss(call(model, slice(i, i + 1))), list(named.values()), allow_unused=True)
        for i in range(n)
    ]
    gradients = {
        name: torch.stack([torch.zeros_like(p) if row[at] is None else row[at] for row in rows])
        for at, (name, p) in enumerate(named.items())
    }
    norms = norms_of(gradients)
    model.zero_grad(set_to_none=True)
    loss(call(gm, slice(None))).backward()
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named.items()}
    assert_close({"norms": gm.perexfx.norms}, {"norms": norms}, TOLERANCE, "norms")
    assert_close(found, weighted(gradients, norms.clamp(min=1).reciprocal() / n), TOLERANCE, "gradients")


def mean_of_squares(output: Tensor) -> Tensor:
    return (output.flatten(1).square().sum(1) + output.flatten(1).sin().sum(1)).mean()


@dataclass
class Answer:
    logits: Tensor
    hidden: tuple[Tensor, ...]
    note: str | None = None


class Structured(nn.Module):
    """Nested containers in and out, `*args`, `**kwargs`, and control flow on shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, *values: Any, scale: float = 1.0, **options: Any) -> Answer:
        self.calls.add_(1)
        batch, lengths = values
        x = batch["image"][0]
        if x.shape[1] > 2:
            x = x[:, :2]
        h = torch.tanh(self.first(x)) * scale
        with torch.no_grad():
            weight = lengths.unsqueeze(1) / lengths.max().detach() if batch["weighted"] else lengths.unsqueeze(1)
        out = self.second(h.sum(1)) * weight + options["shift"] * torch.tensor([1.0, 2.0], dtype=x.dtype)
        return Answer(out, (h, weight))


def structured(n: int, length: int = 5) -> tuple[dict[str, Any], Tensor, Tensor]:
    torch.manual_seed(n)
    images = torch.randn(n, length, 4).double()
    return {"image": [images], "weighted": False}, torch.rand(n).double(), torch.randn(n, 1).double()


def test_arguments_and_outputs_of_any_structure() -> None:
    model = Structured().double()
    batch, lengths, shift = structured(3)

    class Called(nn.Module):
        """Without `*args`, which `example_inputs` of both kinds at once would need."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, batch: Any, lengths: Tensor, **options: Any) -> Answer:
            return self.inner(batch, lengths, scale=0.5, **options)

    outer = Called()
    gm = perexfx.transform(outer, {"batch": batch, "lengths": lengths, "shift": shift})
    for n, length in ((3, 5), (6, 5), (1, 5), (4, 7)):
        batch, lengths, shift = structured(n, length)

        def call(
            module: nn.Module, rows: slice, batch: Any = batch, lengths: Tensor = lengths, shift: Tensor = shift
        ) -> Any:
            given = {"image": [batch["image"][0][rows]], "weighted": False}
            return module(given, lengths[rows], shift=shift[rows])

        before = model.calls.clone()
        output = call(gm, slice(None))
        assert isinstance(output, Answer)
        assert model.calls == before + 1
        torch.testing.assert_close(output.logits, call(outer, slice(None)).logits)
        agrees(gm, outer, call, lambda answer: mean_of_squares(answer.logits), n)


def test_star_arguments() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])

        def forward(self, *xs: Tensor) -> Tensor:
            return torch.stack([layer(x) for layer, x in zip(self.layers, xs, strict=True)], 1).tanh()

    model = Pair().double()
    xs = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    gm = perexfx.transform(model, xs)
    agrees(gm, model, lambda module, rows: module(*(x[rows] for x in xs)), mean_of_squares, 5)


def test_control_flow_on_shapes_and_ranks() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            if x.dim() == 3:
                x = x.mean(1)
            for _ in range(x.shape[1] - 1):
                x = self.layer(x).tanh()
            return x

    model = Branches().double()
    x = torch.randn(4, 5, 3).double()
    with pytest.raises(perexfx.CaptureError, match="Or pass `example_inputs` to `transform`"):
        perexfx.transform(model)
    gm = perexfx.transform(model, x)
    agrees(gm, model, lambda module, rows: module(x[rows]), mean_of_squares, 4)
    with pytest.raises(perexfx.ArgumentError, match=r"Argument `x` should be of shape \[.*\].*Found \[4, 3\]"):
        gm(x[:, 0])


def test_dropout_of_an_exported_model_follows_the_mode() -> None:
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.drop = nn.Linear(8, 8), nn.Dropout(0.5)

        def forward(self, *xs: Tensor) -> Tensor:
            x = self.drop(self.layer(xs[0]))
            q = x.unsqueeze(1)
            attended = F.scaled_dot_product_attention(q, q, q, dropout_p=0.5 if self.training else 0.0).squeeze(1)
            return attended * (2.0 if self.training else 1.0)

    model, x = Drops(), torch.randn(6, 8)
    for mode in (True, False):
        gm = perexfx.transform(model.train(mode), (x,))
        assert not runtime_of(gm).captured.fixed_modes
        gm.train()
        torch.manual_seed(0)
        found = gm(x)
        torch.manual_seed(0)
        torch.testing.assert_close(found, model.train()(x))
        torch.testing.assert_close(gm.eval()(x), model.eval()(x))


def test_another_path_for_one_example_is_said() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, *xs: Tensor) -> Tensor:
            return self.layer(xs[0]).tanh() if xs[0].shape[0] > 1 else self.layer(xs[0])

    x = torch.randn(4, 3)
    gm = perexfx.transform(Alone(), (x,))
    gm(x)
    with pytest.raises(perexfx.ArgumentError, match="does not hold for a batch of one: it computes `tanh` or not"):
        gm(x[:1])


def test_relations_between_sizes_are_checked() -> None:
    class Few(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, *xs: Tensor) -> Tensor:
            x, y = xs
            return self.layer(x) if x.shape[0] <= 10 and x.shape[1] == y.shape[1] else self.layer(x) * 2

    x, y = torch.randn(4, 5, 3), torch.randn(4, 5)
    gm = perexfx.transform(Few(), (x, y))
    gm(x[:2], y[:2])
    with pytest.raises(perexfx.ArgumentError, match=r"captured graph holds for"):
        gm(torch.randn(11, 5, 3), torch.randn(11, 5))
    with pytest.raises(perexfx.ArgumentError, match=r"xs\[0\].size\(\)\[1\] == xs\[1\].size\(\)\[1\]"):
        gm(torch.randn(4, 6, 3), y)


def test_relations_of_sizes_hold_for_no_examples() -> None:
    """The export keeps a size modulo another, which is zero: it is asked of two examples instead."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, *xs: Tensor) -> Tensor:
            n, t, d = xs[0].shape
            h = self.layer(xs[0])
            return h if (15 * n) % (n * t) == 0 else h.reshape(n, d, t).tanh()

    gm = perexfx.transform(Rows(), (torch.randn(4, 5, 6),))
    gm(torch.randn(3, 5, 6))
    assert gm(torch.randn(0, 5, 6)).shape == (0, 5, 6)
    with pytest.raises(perexfx.ArgumentError, match=r"captured graph holds for inputs with .*%"):
        gm(torch.randn(3, 7, 6))


def test_a_fixed_number_of_examples_is_refused() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, *xs: Tensor) -> Tensor:
            if xs[0].shape[0] == 4:
                return self.layer(xs[0])
            return sum(self.layer(row) for row in xs[0].unbind())

    with pytest.raises(perexfx.CaptureError, match="fixes the number of examples"):
        perexfx.transform(Fixed(), (torch.randn(4, 3),))


def test_both_reasons_are_shown_when_both_captures_fail() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if x.sum() > 0 else x

    with pytest.raises(perexfx.CaptureError) as refused:
        perexfx.transform(Branches(), torch.randn(4, 3))
    message = str(refused.value)
    assert "could not be traced at test_forward.py:" in message
    assert "Nor could it be exported: `torch.export` fails at test_forward.py:" in message


def test_what_an_export_would_freeze_is_refused() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, *xs: Tensor) -> Tensor:
            import random

            return self.layer(xs[0]) * random.random()

    class Mixed(Noisy):
        def forward(self, *xs: Tensor) -> Tensor:
            with torch.autocast("cpu"):
                return self.layer(xs[0])

    with pytest.raises(perexfx.CaptureError, match="draws random numbers from Python's `random`"):
        perexfx.transform(Noisy(), (torch.randn(4, 3),))
    with pytest.raises(perexfx.CaptureError, match="switches autocast on"):
        perexfx.transform(Mixed(), (torch.randn(4, 3),))


@pytest.mark.parametrize("how", ["deepcopy", "save"])
def test_copies_of_exported_models(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perexfx.capture.forward._traced", cannot_be_traced)
    case = BY_NAME["tied_head"]
    model, batch = case.build(), case.batch()
    gm = perexfx.transform(model, batch.inputs)
    if how == "deepcopy":
        twin = copy.deepcopy(gm)
    else:
        buffer = io.BytesIO()
        torch.save(gm, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    expected = train_step(gm, batch, squares)
    assert_close(train_step(twin, batch, squares), expected, TOLERANCE, how)


def test_places_survive_the_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perexfx.capture.forward._traced", cannot_be_traced)
    case = BY_NAME["tied_head"]
    gm = perexfx.transform(case.build(), case.batch().inputs)
    places = {site.name: site.place for site in gm.perexfx.sites}
    assert {"embed", "body", "head"} == places.keys()
    assert places["body"].module == "body"
    assert places["body"].source.startswith("cases_uses.py:")


class Positions(nn.Module):
    """Its first input is no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.positions = nn.Linear(6, 4), nn.Embedding(9, 6)

    def forward(self, first: Tensor, x: Tensor) -> Tensor:
        if first.is_floating_point():
            return first @ self.layer(x)
        return self.layer(x + self.positions(first)).tanh()


@pytest.mark.parametrize("first", [torch.randn(5, 5).double(), torch.arange(5)[None], torch.arange(5)])
def test_the_batch_is_what_reaches_the_output(first: Tensor) -> None:
    torch.manual_seed(0)
    model, x, targets = Positions().double(), torch.randn(4, 5, 6).double(), torch.randn(4).double()
    gm = perexfx.transform(model, (first, x), clip_norm=None)
    squares(gm(first, x), targets).backward()
    for i in range(4):
        model.zero_grad()
        squares(model(first, x[i : i + 1]), targets[i : i + 1]).backward()
        norm = norms_of({n: p.grad[None] for n, p in model.named_parameters() if p.grad is not None})
        torch.testing.assert_close(gm.perexfx.norms[i : i + 1], norm)


class Activated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor, activation: Any = F.relu, **options: Any) -> Any:
        return {"y": activation(self.layer(x)), **options}


def test_functions_as_arguments() -> None:
    x = torch.randn(4, 6)
    model = Activated()
    gm = perexfx.transform(model, x)
    torch.testing.assert_close(gm(x)["y"], model(x)["y"])
    gm = perexfx.transform(model, {"x": x, "activation": torch.tanh})
    torch.testing.assert_close(gm(x, torch.tanh)["y"], model(x, torch.tanh)["y"])
    with pytest.raises(perexfx.ArgumentError, match="Argument `activation` was"):
        gm(x, torch.sin)


def test_keywords_that_were_not_given_are_refused() -> None:
    gm = perexfx.transform(nn.Sequential(nn.Linear(6, 6)), torch.randn(4, 6))
    with pytest.raises(TypeError):
        gm(torch.randn(4, 6), more=1)
    open_ended = perexfx.transform(BY_NAME["keywords_nobody_gives"].build(), torch.randn(4, 6).double())
    with pytest.raises(perexfx.ArgumentError, match=r"Argument `options` was \{\} when the model was transformed"):
        open_ended(torch.randn(4, 6).double(), scale=2.0)


def test_ordered_outputs_stay_ordered() -> None:
    class Ordered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Any:
            return OrderedDict(last=self.layer(x), first=x)

    x = torch.randn(4, 6)
    found = perexfx.transform(Ordered(), x)(x)
    assert type(found) is OrderedDict
    assert list(found) == ["last", "first"]


def test_transforms_of_functions_in_a_forward_are_refused() -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(self.layer)(x)

    with pytest.raises(perexfx.CaptureError, match=r"uses a transform of torch.func .* at test_forward.py:\d+"):
        perexfx.transform(Mapped(), torch.randn(4, 6))


def test_indexed_parts_are_written_in_place() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
            self.register_buffer("at", torch.tensor([0, 2]))

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x).tanh().clone()
            h[:, self.at] = 0.5
            h[..., self.at + 1] += x[..., self.at]
            return self.last(h)

    torch.manual_seed(0)
    model = Written().double()
    batch = Batch((torch.randn(4, 6).double(),), torch.randn(4).double())
    gm = perexfx.transform(model, batch.inputs, clip_norm=None)
    gradients = one_at_a_time(model, batch, squares)
    found = train_step(gm, batch, squares)
    assert_close(found, weighted(gradients, torch.full((4,), 0.25)), TOLERANCE, "gradients")
    assert_close({"norms": gm.perexfx.norms}, {"norms": norms_of(gradients)}, TOLERANCE, "norms")
