"""The step as one graph: the same loss, norms and gradients as an eager step, and nothing read besides its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import perexfx
from perexfx.bench.models import LanguageModel, ResNet18, SequenceClassifier, mlp, small_cnn
from tests.support.cases import BY_NAME
from tests.support.oracle import Batch, assert_close, norms_of, one_at_a_time, weighted

Loss = Callable[[Any, Any], Tensor]


def mean_of_tokens(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), targets.flatten())


def images(n: int, *shape: int) -> Callable[[], Batch]:
    return lambda: Batch((torch.randn(n, *shape),), torch.randint(0, 10, (n,)))


def tokens() -> Batch:
    ids = torch.randint(0, 20, (3, 6))
    return Batch((ids,), ids)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch], Loss]] = {
    "mlp": (lambda: mlp((12, 8, 10)), images(5, 12), F.cross_entropy),
    "cnn": (small_cnn, images(4, 1, 28, 28), F.cross_entropy),
    "resnet": (lambda: ResNet18(width=4), images(3, 3, 32, 32), F.cross_entropy),
    "transformer": (lambda: LanguageModel(20, 8, 1, 2, 6), tokens, mean_of_tokens),
    "lstm": (lambda: SequenceClassifier(4, 5), images(3, 6, 4), F.cross_entropy),
}


def parts(gm: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return (
        {name: value.detach().clone() for name, value in gm.named_parameters()},
        {name: value.detach().clone() for name, value in gm.named_buffers()},
    )


def check(model: nn.Module, batch: Batch, loss: Loss, **options: Any) -> torch.fx.GraphModule:
    """Made from one batch, right for another; parameters are those given, whatever became of the module's."""
    model, batch = model.double(), batch.double()
    graph = perexfx.step_graph(perexfx.transform(model, **options), loss, batch.inputs, batch.targets)
    other = batch.take(torch.arange(batch.size).flip(0))
    gradients = one_at_a_time(model, other, loss)
    norms = norms_of(gradients)
    factors = (options.get("clip_norm", 1.0) / norms).clamp(max=1) / other.size
    given = parts(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        found = graph(*given, other.inputs, other.targets)
    value, found_norms, found_gradients = found
    assert_close({"norms": found_norms}, {"norms": norms}, 1e-9, "norms")
    expected = weighted(gradients, factors)
    reached = {name: value for name, value in found_gradients.items() if value is not None}
    assert all(not expected[name].any() for name in expected.keys() - reached.keys())
    assert_close(reached, {name: expected[name] for name in reached}, 1e-9, "gradients")
    assert value.dim() == 0
    return graph


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    torch.manual_seed(0)
    make, draw, loss = MODELS[name]
    graph = check(make(), draw(), loss, clip_norm=0.1)
    assert all(node.op in ("placeholder", "call_function", "output", "get_attr") for node in graph.graph.nodes)


@pytest.mark.parametrize("name", BY_NAME)
def test_cases(name: str) -> None:
    case = BY_NAME[name]
    check(case.build(), case.batch(), case.loss, clip_norm=0.2, batch_dim=case.batch_dim)


def test_the_module_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    gm, x, y = perexfx.transform(mlp((6, 5, 10))), torch.randn(4, 6), torch.randint(0, 10, (4,))
    F.cross_entropy(gm(x), y).backward()
    before = {name: parameter.grad for name, parameter in gm.named_parameters()}
    norms, values = gm.perexfx.norms, {name: value.clone() for name, value in gm.state_dict().items()}
    perexfx.step_graph(gm, F.cross_entropy, x[:3], y[:3])
    assert gm.perexfx.norms is norms
    assert all(parameter.grad is before[name] for name, parameter in gm.named_parameters())
    assert all(torch.equal(value, values[name]) for name, value in gm.state_dict().items())
    assert all(isinstance(parameter, nn.Parameter) for parameter in gm.parameters())


def test_an_example_that_is_not_finite_counts_as_zero() -> None:
    torch.manual_seed(0)
    model, y = mlp((6, 5, 10)).double(), torch.randint(0, 10, (4,))
    x = torch.randn(4, 6).double()
    gm = perexfx.transform(model, loss_reduction="sum")

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output, targets, reduction="sum")

    graph = perexfx.step_graph(gm, loss, x, y)
    broken = x.clone()
    broken[1, 2] = float("inf")
    _, norms, found = graph(*parts(gm), broken, y)
    keep = [0, 2, 3]
    loss(gm(x[keep]), y[keep]).backward()
    assert not torch.isfinite(norms[1])
    assert_close(found, {name: p.grad for name, p in gm.named_parameters() if p.grad is not None}, 1e-12, "sums")


@pytest.mark.parametrize("clipping", ["automatic", "per_layer", lambda norms: 1 / (1 + norms)])
def test_kinds_of_clipping(clipping: Any) -> None:
    torch.manual_seed(0)
    model, x, y = mlp((6, 5, 10)).double(), torch.randn(4, 6).double(), torch.randint(0, 10, (4,))
    gm = perexfx.transform(model, clipping=clipping, clip_norm=0.3)
    _, norms, found = perexfx.step_graph(gm, F.cross_entropy, x, y)(*parts(gm), x, y)
    F.cross_entropy(gm(x), y).backward()
    assert gm.perexfx.norms is not None
    assert_close({"norms": norms}, {"norms": gm.perexfx.norms}, 1e-12, "norms")
    assert_close(found, {name: p.grad for name, p in gm.named_parameters() if p.grad is not None}, 1e-12, "sums")


class Scaled(nn.Module):
    """Keyword inputs, one of them a number, and parameters that are frozen or not reached."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.frozen = nn.Linear(3, 10), nn.Linear(10, 10).requires_grad_(False)

    def forward(self, image: Tensor, scale: float = 1.0) -> Tensor:
        return self.frozen(self.used(image)) * scale


def test_keywords_numbers_and_frozen_parameters() -> None:
    torch.manual_seed(0)
    x, y = {"image": torch.randn(4, 3), "scale": 3.0}, torch.randint(0, 10, (4,))
    gm = perexfx.transform(Scaled(), x)
    value, norms, found = perexfx.step_graph(gm, F.cross_entropy, x, y)(*parts(gm), x, y)
    expected = F.cross_entropy(gm(**x), y)
    expected.backward()
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(norms, gm.perexfx.norms)
    assert found.keys() == {"used.weight", "used.bias"}


def test_what_cannot_be_a_graph() -> None:
    gm, x, y = perexfx.transform(mlp((3, 2))), torch.randn(4, 3), torch.zeros(4)

    def reads(output: Tensor, targets: Tensor) -> Tensor:
        return output.sum() if targets.sum() > 0 else output.mean()

    with pytest.raises(perexfx.CaptureError, match="value of a tensor"):
        perexfx.step_graph(gm, reads, x, y)
    with pytest.raises(perexfx.ArgumentError, match="scalar"):
        perexfx.step_graph(gm, lambda output, _: output, x, y)
    with pytest.raises(perexfx.ArgumentError, match="transform"):
        perexfx.step_graph(nn.Linear(2, 2), F.cross_entropy, x, y)  # pyright: ignore[reportArgumentType]


def test_a_loss_may_close_over_tensors() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(6, 3), torch.randn(4, 6), torch.randint(0, 3, (4,))
    loss = nn.CrossEntropyLoss(weight=torch.rand(3), reduction="sum")
    gm = perexfx.transform(model, x, loss_reduction="sum")
    graph = perexfx.step_graph(gm, loss, x, y)
    _, norms, gradients = graph(*parts(gm), x, y)
    loss(gm(x), y).backward()
    assert torch.equal(norms, gm.perexfx.norms)
    assert torch.equal(gradients["weight"], model.weight.grad)
