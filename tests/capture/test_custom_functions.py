"""Custom functions, hooks and kept values: what autograd alone, or a graph alone, would not see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

import perexfx
from tests.support.cases import squares
from tests.support.oracle import Batch, assert_close, norms_of, one_at_a_time, train_step, weighted


class Swish(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad_output * s * (1 + x * (1 - s))


class Rounded(Function):
    """Straight through, in the newer form, with a default."""

    @staticmethod
    def forward(x: Tensor, steps: float = 2.0) -> Tensor:
        return (x * steps).round() / steps

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.steps = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output * ctx.steps, None


class Product(Function):
    """A layer of its own, as in torch's tutorial; gradients of the parameters are sums over the examples."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t() + bias

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad_output @ weight, grad_output.t() @ x, grad_output.sum(0)


class Centered(Function):
    """Its forward keeps the examples apart, its backward does not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return grad_output - grad_output.mean(0)


class Normed(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return grad_output.clamp(-1, 1)


swish = Swish.apply  # a reference from before the capture


class Uses(nn.Module):
    def __init__(self, use: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.last, self.use = nn.Linear(6, 6), nn.Linear(6, 3), use
        self.kept: Any = None
        self.seen: list[Any] = []
        self.calls = 0

    def forward(self, x: Tensor) -> Any:
        return self.use(self, x)


def _in_no_grad(m: Any, x: Tensor) -> Tensor:
    h = m.first(x)
    with torch.no_grad():
        gate = swish(h)
    return m.last(h * gate)


def _only_stored(m: Any, x: Tensor) -> Tensor:
    m.kept = m.first(x)
    m.seen.append(m.kept)
    return m.last(m.kept)


EXACT: dict[str, Callable[[Any, Tensor], Any]] = {
    "activation": lambda m, x: m.last(swish(m.first(x))),
    "default": lambda m, x: m.last(Rounded.apply(m.first(x))),
    "argument": lambda m, x: m.last(Rounded.apply(m.first(x), 3.0)),
    "of a weight": lambda m, x: m.last(F.linear(x, Rounded.apply(m.first.weight * 3), m.first.bias)),
    "of a weight, older form": lambda m, x: m.last(F.linear(x, swish(m.first.weight))),
    "layer": lambda m, x: m.last(Product.apply(x, m.first.weight, m.first.bias)),
    "under no_grad": _in_no_grad,
    "checkpoint": lambda m, x: m.last(checkpoint(lambda y: m.first(y).tanh(), x, use_reentrant=False)),
    "only stored": _only_stored,
}


def assert_exact(model: nn.Module, ahead: bool) -> None:
    torch.manual_seed(0)
    batch = Batch((torch.randn(4, 6).double(),), torch.randn(4).double())
    gm = perexfx.transform(model, batch.inputs if ahead else None, clip_norm=0.5)
    gradients = one_at_a_time(model, batch, squares)
    norms = norms_of(gradients)
    found = train_step(gm, batch, squares)
    assert_close({"norms": gm.perexfx.norms}, {"norms": norms}, 1e-9, "norms")
    assert_close(found, weighted(gradients, (0.5 / norms).clamp(max=1) / 4), 1e-9, "gradients")


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("name", EXACT)
def test_exact(name: str, ahead: bool) -> None:
    torch.manual_seed(1)
    assert_exact(Uses(EXACT[name]).double(), ahead)


def test_a_reentrant_checkpoint_is_what_it_checkpoints() -> None:
    """Torch's own gives no gradient to a model whose inputs need none; the captured graph does."""
    torch.manual_seed(1)
    model = Uses(lambda m, x: m.last(checkpoint(lambda y: m.first(y).tanh(), x, use_reentrant=True))).double()
    plain = Uses(lambda m, x: m.last(m.first(x).tanh())).double()
    plain.load_state_dict(model.state_dict())
    batch = Batch((torch.randn(4, 6).double(),), torch.randn(4).double())
    gm = perexfx.transform(model, batch.inputs, clip_norm=None)
    assert_close(train_step(gm, batch, squares), train_step(plain, batch, squares), 1e-9, "gradients")


@pytest.mark.parametrize("on_weight", [True, False])
def test_a_backward_that_is_not_linear_is_refused(on_weight: bool) -> None:
    def use(m: Any, x: Tensor) -> Tensor:
        return m.last(F.linear(x, Normed.apply(m.first.weight)) if on_weight else Normed.apply(m.first(x)))

    message = r"`normed` \(test_custom_functions.py:\d+\) has a backward that is not known to be linear.*`clamp`"
    with pytest.raises(perexfx.RefusedError, match=message):
        perexfx.transform(Uses(use), torch.randn(4, 6))


def test_a_backward_that_mixes_examples_is_refused() -> None:
    with pytest.raises(perexfx.MixingError, match=r"`centered` .*example axis"):
        perexfx.transform(Uses(lambda m, x: m.last(Centered.apply(m.first(x)))), torch.randn(4, 6))


def test_functions_are_themselves_again_after_a_capture() -> None:
    before = Swish.__dict__["forward"], Rounded.__dict__["setup_context"], torch.Tensor.register_hook
    perexfx.transform(Uses(EXACT["activation"]), torch.randn(4, 6))
    assert before == (Swish.__dict__["forward"], Rounded.__dict__["setup_context"], torch.Tensor.register_hook)


def test_exports_refuse_custom_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise perexfx.CaptureError("not this one.")

    monkeypatch.setattr("perexfx.capture.forward._traced", fails)
    with pytest.raises(perexfx.CaptureError, match=r"torch.autograd.Function `Swish` at test_custom_functions.py:\d+"):
        perexfx.transform(Uses(EXACT["activation"]), torch.randn(4, 6))


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_are_refused(kind: str) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2))
    getattr(model[1], kind)(lambda *_: None)
    with pytest.raises(perexfx.CaptureError, match=r"Module `1` \(Linear\) has backward hooks"):
        perexfx.transform(model, torch.randn(4, 6))


def _with_hook(m: Any, x: Tensor) -> Tensor:
    h = m.first(x)
    h.register_hook(lambda gradient: gradient / 2)
    return m.last(h)


def _kept_for_the_next_call(m: Any, x: Tensor) -> Tensor:
    h = m.first(x) if m.kept is None else m.first(x) + m.kept
    m.kept = h.detach()
    return m.last(h)


def _counted(m: Any, x: Tensor) -> Tensor:
    m.calls += 1
    return m.last(m.first(x)) * min(1.0, m.calls / 10)


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize(
    ("use", "message"),
    [
        (_with_hook, r"registers a hook on a tensor at test_custom_functions.py:\d+"),
        (_kept_for_the_next_call, "keeps values in `kept` for later calls"),
        (_counted, "assigns `calls`, which was 0 and is 1 after one call"),
    ],
)
def test_what_no_graph_records_is_refused(use: Callable[[Any, Tensor], Tensor], message: str, ahead: bool) -> None:
    with pytest.raises(perexfx.CaptureError, match=message) as error:
        perexfx.transform(Uses(use), torch.randn(4, 6) if ahead else None)
    assert "Nor could it be exported" not in str(error.value)


def test_models_may_be_compiled_around() -> None:
    """`torch.compile` leaves a transformed model alone."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    batch = Batch((torch.randn(4, 6).double(),), torch.randn(4).double())
    gm = perexfx.transform(model, batch.inputs, clip_norm=0.1)
    expected = train_step(gm, batch, squares)
    found = train_step(torch.compile(gm, backend="eager"), batch, squares)
    assert_close({name.removeprefix("_orig_mod."): value for name, value in found.items()}, expected, 1e-12, "compiled")
