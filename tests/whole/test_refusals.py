"""What must be refused is refused by name: node, module, line, and what to do."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import perexfx


class Wrapped(nn.Module):
    """A linear layer, then something."""

    def __init__(self, after: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.after = nn.Linear(6, 6), after

    def forward(self, x: Tensor) -> Any:
        return self.after(self.layer(x))


MIXING: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "mean": (lambda h: h - h.mean(0), "reduces over the example axis"),
    "mean_keepdim": (lambda h: h - h.mean(dim=0, keepdim=True), "reduces over the example axis"),
    "mean_of_all": (lambda h: h / h.mean(), "reduces over the example axis"),
    "max": (lambda h: h - h.max(dim=0).values, "reduces over the example axis"),
    "softmax": (lambda h: h.softmax(0), "runs along the example axis"),
    "log_softmax": (lambda h: F.log_softmax(h, dim=0), "runs along the example axis"),
    "cumsum": (lambda h: h.cumsum(0), "runs along the example axis"),
    "sort": (lambda h: h.sort(0).values, "runs along the example axis"),
    "topk": (lambda h: h.topk(2, dim=0).values, "runs along the example axis"),
    "contrastive": (lambda h: h @ h.t(), "multiplies every example with every other"),
    "gram_of_features": (lambda h: h.t() @ h, "sums products over the example axis"),
    "einsum": (lambda h: torch.einsum("nd,md->nm", h, h), "."),
    "roll": (lambda h: h - h.roll(1, 0), "moves examples"),
    "flip": (lambda h: h + h.flip(0), "moves examples"),
    "first": (lambda h: h - h[0], "picks one example by its position"),
    "every_second": (lambda h: h[::2], "picks examples by their position"),
    "by_index": (lambda h: h[torch.tensor([1, 0, 2])], "picks examples by position"),
    "split_batch": (lambda h: torch.cat(h.chunk(2)[::-1]), "."),
    "all_pairs": (lambda h: h[:, None] - h[None], "carry their examples differently"),
    "reshaped": (lambda h: h.reshape(6, -1), "."),
    "scaled_by_batch_size": (lambda h: h / h.shape[0], "computes with the number of examples"),
    "batch_norm": (lambda h: F.batch_norm(h, None, None, training=True), "whole batch"),
    "layer_norm": (lambda h: F.layer_norm(h.t().unsqueeze(0), [6, h.shape[0]]), "."),
    "norm": (lambda h: h / h.norm(dim=0), "reduces over the example axis"),
    "std": (lambda h: h / h.std(0), "reduces over the example axis"),
    "attention": (lambda h: F.scaled_dot_product_attention(h, h, h), "."),
    "conv": (lambda h: F.conv1d(h.t().unsqueeze(0), torch.ones(1, 6, 1)), "."),
    "pool": (lambda h: F.max_pool1d(h.t(), 2), "works within the example axis"),
    "accumulated": (lambda h: torch.zeros(6, dtype=h.dtype).copy_(h.sum(0)), "reduces over the example axis"),
}


# Values that depend on how many examples there are, or on where an example stands.
POSITIONAL: dict[str, Callable[[Tensor], Any]] = {
    "full": lambda h: h / torch.full((h.shape[0], 1), h.shape[0]),
    "new_full": lambda h: h / h.new_full((1,), h.shape[0]),
    "full_like": lambda h: h / torch.full_like(h, h.shape[0]),
    "scalar_tensor": lambda h: h / torch.scalar_tensor(h.shape[0]),
    "filled": lambda h: h / torch.empty_like(h).fill_(h.shape[0]),
    "where": lambda h: torch.where(h > 0, h, h.shape[0]),
    "padded": lambda h: F.pad(h, (1, 1), value=h.shape[0]),
    "order_of_norm": lambda h: h.norm(p=h.shape[0], dim=1),
    "eps": lambda h: F.layer_norm(h, [6], eps=h.shape[0]),
    "features_up_to": lambda h: h[:, : h.shape[0]],
    "feature_at": lambda h: h[:, h.shape[0] - 1],
    "rolled_features": lambda h: h.roll(h.shape[0], 1),
    "counted": lambda h: h * torch.ones(2 * h.shape[0]).sum(),
    "traced": lambda h: h * torch.eye(h.shape[0]).sum(),
    "last_of_range": lambda h: h * torch.arange(h.shape[0] + 1)[-1],
    "copies_summed": lambda h: h.unsqueeze(1).expand(-1, h.shape[0], -1).sum(1),
    "range": lambda h: h * torch.arange(h.shape[0])[:, None],
    "linspace": lambda h: h * torch.linspace(0, 1, h.shape[0])[:, None],
    "diagonal": lambda h: h[:, :3] + h.diagonal()[:, None],
    "parity": lambda h: h * (h.shape[0] % 2),
    "picked_feature": lambda h: h[:, h.shape[0] // 64 : h.shape[0] // 64 + 1],
    "picked_entry": lambda h: h * torch.tensor([1.0, 5.0])[h.shape[0] // 64],
    "picked_chunk": lambda h: h.chunk(2, 1)[h.shape[0] // 64],
    "rounded": lambda h: h / (h.shape[0] // 4 + 1),
    "softmax_of_reshaped": lambda h: h.unsqueeze(1).expand(-1, 3, -1).reshape(3, h.shape[0], 6).softmax(1),
    "rows_by_three": lambda h: h.repeat(1, 5).view(15, -1).softmax(-1),
}


@pytest.mark.parametrize("name", POSITIONAL)
def test_counting_or_numbering_examples_is_refused(name: str) -> None:
    model, x = Wrapped(POSITIONAL[name]).double(), torch.randn(4, 6).double()
    with pytest.raises(perexfx.PerexError, match=r"test_refusals.py:\d+"):
        perexfx.transform(model, x)


def test_a_position_table_along_the_batch_is_refused() -> None:
    """The classic (T, B) table inside a batch-first model."""

    class WrongAxis(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.register_buffer("table", torch.randn(50, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.table[: x.shape[0]].unsqueeze(1)

    with pytest.raises(perexfx.MixingError, match="depends on their number or position"):
        perexfx.transform(WrongAxis(), torch.randn(4, 5, 3))


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("name", MIXING)
def test_mixing_is_refused(name: str, ahead: bool) -> None:
    after, reason = MIXING[name]
    model, x = Wrapped(after).double(), torch.randn(6, 6).double()
    with pytest.raises(perexfx.RefusedError, match=reason) as refused:
        perexfx.transform(model, x if ahead else None)(x)
    places = [refusal.place for refusal in refused.value.refusals]
    assert all(place is not None and place.node for place in places)
    assert any(place.source.startswith("test_refusals.py:") for place in places)


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, track_running_stats=False)]
)
def test_batch_norm_in_training_is_refused_at_once(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(layer, nn.ReLU()))
    with pytest.raises(perexfx.MixingError) as refused:
        perexfx.transform(model)
    message = str(refused.value)
    assert "in module `1.0`" in message
    assert "BatchNorm in training mode" in message
    assert "Replace module `1.0` by GroupNorm with `perexfx.replace_batchnorm(model)`" in message
    assert "`model.get_submodule('1.0').eval()` before the transform" in message
    assert "test_refusals.py:" in message


def test_running_statistics_of_instance_norm_are_refused() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.InstanceNorm1d(4, track_running_stats=True))
    with pytest.raises(perexfx.MixingError, match="InstanceNorm with running statistics in training mode"):
        perexfx.transform(model)


def test_a_call_of_batch_norm_is_told_what_it_can_do() -> None:
    model = Wrapped(lambda h: F.batch_norm(h, None, None, training=True))
    with pytest.raises(perexfx.MixingError, match=r"`perexfx.replace_batchnorm` cannot replace a call of a function"):
        perexfx.transform(model)


def test_batch_norm_with_a_forward_of_its_own_is_not_taken_for_torchs() -> None:
    class Activated(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    with pytest.raises(perexfx.CaptureError, match=r"in module `1` \(Activated\)"):
        perexfx.transform(nn.Sequential(nn.Conv2d(3, 4, 3), Activated(4)).eval())


def test_hooks_of_batch_norm_are_captured() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    model[1].register_forward_hook(lambda module, inputs, output: output * 2)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(perexfx.transform(model)(x), model(x))
    assert "forward" not in vars(model[1])


def test_frozen_batch_norm_stays_frozen() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)).eval()
    gm = perexfx.transform(model)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(gm(x), model(x))
    gm.train()
    with pytest.raises(perexfx.ModeError, match=r"Module `1` .*captured in eval mode. Call `.eval\(\)` on it"):
        gm(x)
    gm.get_submodule("1").eval()
    gm(x)


def test_all_refusals_are_collected() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.div(x, self.a, rounding_mode="floor") + torch.div(x, self.b, rounding_mode="trunc")

    with pytest.raises(perexfx.CoverageError) as refused:
        perexfx.transform(Two())
    assert [refusal.place.node for refusal in refused.value.refusals] == ["div", "div_1"]
    message = str(refused.value)
    assert "Parameter `a` is used by `div` (test_refusals.py:" in message
    assert "a rounded quotient has no gradient" in message
    assert "Every use of a trainable parameter must be covered. Freeze it" in message


def test_an_uncovered_use_names_all_its_parameters() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.div(x, self.a * self.b, rounding_mode="floor")

    with pytest.raises(perexfx.CoverageError, match="Parameters `a`, `b` are used by `div`"):
        perexfx.transform(Both())


def test_a_parameter_in_the_output_is_refused() -> None:
    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Linear(3, 3), nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x), self.scale * 2

    with pytest.raises(perexfx.CoverageError, match=r"Parameter `scale` is used by `output`.*returned by the forward"):
        perexfx.transform(Returns())


def test_in_place_use_that_others_see_is_refused() -> None:
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.shift = nn.Linear(3, 4), nn.Parameter(torch.randn(2))

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            half = h[:, :2]
            half += self.shift
            return h

    with pytest.raises(perexfx.CoverageError, match="it writes in place into a value that others may read"):
        perexfx.transform(Aliased())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"scale_grad_by_freq": True}, "how often an id occurs in the whole batch"),
        ({"max_norm": 1.0}, "rescales rows of the table in place"),
        ({"sparse": True}, "sparse gradients"),
    ],
)
def test_embedding_options_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(perexfx.CoverageError, match=reason):
        perexfx.transform(nn.Embedding(5, 3, **options))


def test_parameters_passed_to_modules_are_refused() -> None:
    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unpool, self.values = nn.MaxUnpool1d(2), nn.Parameter(torch.randn(1, 3))

        def forward(self, at: Tensor) -> Tensor:
            return self.unpool(self.values, at)

    with pytest.raises(perexfx.CoverageError, match=r"`values` is used by `unpool`.*passed to the module"):
        perexfx.transform(Placed())


def test_random_operations_have_no_fallback() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.rand(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.normal(x, self.a.abs())

    with pytest.raises(perexfx.CoverageError, match="draws random numbers, which the fallback could not draw again"):
        perexfx.transform(Noisy())


def test_control_flow_names_the_line() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                x = -x
            return self.layer(x)

    with pytest.raises(perexfx.CaptureError, match=r"`Branches` could not be traced at test_refusals.py:\d+"):
        perexfx.transform(Branches())


def test_modules_that_cannot_be_traced_are_named() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            loss = nn.AdaptiveLogSoftmaxWithLoss(3, 9, [4], div_value=1.0)
            self.parts = nn.ModuleDict({"first": nn.Linear(3, 3), "loss": loss})

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.parts["loss"](self.parts["first"](x), y).output

    place = r"in module `parts.loss` \(AdaptiveLogSoftmaxWithLoss\) at test_refusals.py:\d+"
    with pytest.raises(perexfx.CaptureError, match=place):
        perexfx.transform(Tagger())


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_numbers_are_refused(dtype: torch.dtype) -> None:
    x = torch.randn(4, 6, dtype=dtype)
    for model in (nn.Linear(6, 3, dtype=dtype), Uses(lambda m, x: x * m.weight[0])):
        with pytest.raises(perexfx.CoverageError, match="complex numbers"):
            perexfx.transform(model, x)


def test_hard_coded_batch_sizes_are_refused() -> None:
    class HardCoded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).reshape(8, 3)

    x = torch.randn(8, 3)
    with pytest.raises(perexfx.RefusedError, match=r"`reshape` \(test_refusals.py:\d+\) fails when its shapes"):
        perexfx.transform(HardCoded(), x)


def test_squeezing_the_batch_away_is_an_error_not_a_number() -> None:
    class Squeezes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).unsqueeze(1).squeeze())

    gm = perexfx.transform(Squeezes())
    gm(torch.randn(4, 3))
    with pytest.raises(perexfx.ShapeError, match=r"should be of shape \[1, 3\].*Found \[3\]"):
        gm(torch.randn(1, 3))


def test_a_mode_that_takes_another_path_is_refused() -> None:
    class Modes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if self.training else self.layer(x).relu()

    gm = perexfx.transform(Modes())
    x = torch.randn(2, 3)
    gm(x)
    gm.eval()
    with pytest.raises(perexfx.ModeError, match=r"`Modes` computes something else in eval mode"):
        gm(x)


def test_autocast_inside_the_forward_is_refused() -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu"):
                return self.layer(x)

    with pytest.raises(perexfx.CaptureError, match=r"switches autocast at test_refusals\.py"):
        perexfx.transform(Casts())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clip_norm": 0}, "`clip_norm` should be a positive number"),
        ({"clip_norm": -1.0}, "`clip_norm` should be a positive number"),
        ({"clip_norm": float("nan")}, "`clip_norm` should be a positive number"),
        ({"clip_norm": "1"}, "`clip_norm` should be a positive number.*Found '1'"),
        ({"clipping": "ghost"}, "`clipping` should be \"flat\".*Found 'ghost'"),
        ({"loss_reduction": "none"}, '`loss_reduction` should be "mean" or "sum".*Found \'none\''),
        ({"memory_budget": -1}, "`memory_budget` should be a number of bytes"),
        ({"memory_budget": 1e9}, "`memory_budget` should be a number of bytes"),
        ({"batch_dim": -1}, "`batch_dim` should be an axis counted from the front"),
        ({"strategy": "ghost"}, "There is no strategy 'ghost'. The strategies are auto, outer"),
        ({"strategy": {"nowhere": "gram"}}, "There is no site 'nowhere'. The sites are 0, 2"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(perexfx.PerexError, match=message):
        perexfx.transform(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1)), **arguments)


def test_what_is_not_a_model() -> None:
    with pytest.raises(perexfx.ArgumentError, match=r"`model` should be a torch.nn.Module. Found function"):
        perexfx.transform(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(perexfx.ArgumentError, match="was transformed already"):
        perexfx.transform(perexfx.transform(nn.Linear(2, 2)))
    with pytest.raises(perexfx.ArgumentError, match="All parameters are frozen"):
        perexfx.transform(nn.Linear(2, 2).requires_grad_(False))


def test_example_inputs_that_do_not_fit() -> None:
    with pytest.raises(perexfx.ArgumentError, match=r"does not fit `Linear\.forward"):
        perexfx.transform(nn.Linear(2, 2), (torch.randn(3, 2), torch.randn(3)))
    with pytest.raises(perexfx.ArgumentError, match=r"does not fit `Linear\.forward"):
        perexfx.transform(nn.Linear(2, 2), {"x": torch.randn(3, 2)})
    with pytest.raises(perexfx.ArgumentError, match="have no axis for the examples on axis 1"):
        perexfx.transform(nn.Linear(2, 2), torch.randn(2), batch_dim=1)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("grouped", "'grouped' does not apply to site `0` at `linear` in module `0`.*it is not a convolution"),
        ({"0": "loop"}, "'loop' does not apply to site `0`.*The site is linear, 3 -> 4, 5 positions. Applicable are"),
        ({"0": "outer"}, "a sum over 5 positions, not one outer product"),
    ],
)
def test_impossible_strategies_say_why(strategy: str | dict[str, str], message: str) -> None:
    with pytest.raises(perexfx.StrategyError, match=message):
        perexfx.transform(nn.Sequential(nn.Linear(3, 4)), torch.randn(2, 5, 3), strategy=strategy)


class Uses(nn.Module):
    """A parameter, and something done with it."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.use = nn.Parameter(torch.randn(6, 6)), use
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


def test_random_parameter_expressions_are_refused() -> None:
    for use in (
        lambda m, x: F.linear(x, F.dropout(m.weight, 0.5, m.training)),
        lambda m, x: x + F.dropout(m.weight[0], 0.5),
        lambda m, x: F.linear(x, torch.bernoulli(m.weight.sigmoid())),
    ):
        with pytest.raises(perexfx.CoverageError, match="which draws random numbers"):
            perexfx.transform(Uses(use))


def test_random_constants_are_refused() -> None:
    with pytest.raises(perexfx.CaptureError, match=r"draws random numbers at test_refusals.py:\d+ .*for ever"):
        perexfx.transform(Uses(lambda m, x: F.linear(x, m.weight) + torch.randn(6)))


def test_random_numbers_from_elsewhere_are_refused() -> None:
    generator = torch.Generator()
    for draw in (
        lambda: torch.randn(6, generator=generator),
        random.random,
        lambda: float(np.random.rand()),
        lambda: torch.from_numpy(np.random.rand(6)),
    ):
        with pytest.raises(perexfx.CaptureError, match=r"draws random numbers .*for ever"):
            perexfx.transform(Uses(lambda m, x, draw=draw: F.linear(x, m.weight) * draw()))


def test_transforms_in_several_threads() -> None:
    models = [nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)) for _ in range(12)]
    with ThreadPoolExecutor(4) as pool:
        transformed = list(pool.map(lambda model: perexfx.transform(model, torch.randn(3, 6)), models))
    for gm in transformed:
        gm(torch.randn(3, 6)).sum().backward()
        assert gm.perexfx.norms.shape == (3,)


def test_writes_under_no_grad_are_refused() -> None:
    def use(module: Any, x: Tensor) -> Tensor:
        h = F.linear(x, module.weight)
        with torch.no_grad():
            h.mul_(2.0)
        return h

    with pytest.raises(perexfx.CaptureError, match=r"writes in place under torch.no_grad\(\) at test_refusals.py:\d+"):
        perexfx.transform(Uses(use))


def test_buffers_assigned_in_the_forward_are_refused() -> None:
    def use(module: Any, x: Tensor) -> Tensor:
        module.count = module.count + 1
        return F.linear(x, module.weight)

    model = Uses(use)
    with pytest.raises(perexfx.CaptureError, match="assigns the buffer `count` at test_refusals"):
        perexfx.transform(model)
    assert isinstance(model.count, Tensor)


def test_what_a_forward_leaves_on_the_model_is_cleaned_up() -> None:
    def use(module: Any, x: Tensor) -> Tensor:
        module.calls = getattr(module, "calls", 0) + 1
        module.last = F.linear(x, module.weight)
        module.count += 1
        return module.last

    model = Uses(use)
    gm = perexfx.transform(model)
    assert not hasattr(model, "last")
    assert not hasattr(model, "calls")
    gm(torch.randn(2, 6))
    assert model.count == 1


def test_hooks_of_the_model_itself_are_refused() -> None:
    model = nn.Linear(3, 3)
    model.register_forward_hook(lambda module, inputs, output: output - output.mean(0))
    with pytest.raises(perexfx.CaptureError, match="has forward hooks of its own"):
        perexfx.transform(model)


def test_other_tensors_that_require_a_gradient_are_refused() -> None:
    model = Uses(lambda m, x: F.linear(x, m.weight) * m.scale)
    model.scale = torch.ones(6, requires_grad=True)
    with pytest.raises(perexfx.CoverageError, match=r"requires a gradient and is not a parameter"):
        perexfx.transform(model)


def test_an_optimizer_step_before_the_backward_is_an_error() -> None:
    gm = perexfx.transform(Uses(lambda m, x: F.linear(x, m.weight * m.weight)))
    loss = gm(torch.randn(2, 6)).sum()
    with torch.no_grad():
        gm.weight.mul_(3)
    with pytest.raises(perexfx.ModeError, match="`weight` was changed between the forward and the backward"):
        loss.backward()


def test_baked_modes_of_submodules_are_checked_without_grad_too() -> None:
    class Doubles(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if self.training else x

    gm = perexfx.transform(nn.Sequential(nn.Linear(3, 3), Doubles()))
    gm.get_submodule("1").eval()
    with torch.no_grad(), pytest.raises(perexfx.ModeError, match="Module `1` computes something else in eval mode"):
        gm(torch.randn(2, 3))


def test_lazy_modules_need_their_shapes() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls lazy modules experimental
        model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(perexfx.ArgumentError, match=r"Parameter `0.weight` has no shape yet. Call the model once"):
        perexfx.transform(model)
    model(torch.randn(2, 4))
    perexfx.transform(model)(torch.randn(2, 4)).sum().backward()


@pytest.mark.parametrize("name", ["class", "None", 'a"b', "a\\b", "a\nb"])
def test_names_that_no_code_can_have(name: str) -> None:
    model = nn.Sequential(nn.ModuleDict({"fine": nn.Linear(3, 2)}))
    model[0].add_module(name, nn.Linear(3, 2))
    with pytest.raises(perexfx.ArgumentError, match=r"^The name '0\..*' cannot stand in the code of a graph"):
        perexfx.transform(model)


def test_scripted_modules() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls scripting outdated
        model = torch.jit.script(nn.Linear(3, 2))
    with pytest.raises(perexfx.ArgumentError, match="`model` is a scripted module"):
        perexfx.transform(model)


def test_names_that_graph_modules_need() -> None:
    model = nn.Linear(3, 3)
    model.graph = torch.ones(1)
    with pytest.raises(perexfx.ArgumentError, match="has an attribute `graph`"):
        perexfx.transform(model)


def test_autocast_around_the_model_is_refused() -> None:
    gm = perexfx.transform(nn.Linear(3, 3))
    with torch.autocast("cpu"), pytest.raises(perexfx.ModeError, match="Autocast is on"):
        gm(torch.randn(2, 3))


def test_inputs_that_disagree() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.layer(x) + y

    gm = perexfx.transform(Two(), (torch.randn(4, 3), torch.randn(4, 3)))
    with pytest.raises(perexfx.ArgumentError, match=r"disagree about the number of examples.*`y` of shape \[1, 3\]"):
        gm(torch.randn(4, 3), torch.randn(1, 3))
    with pytest.raises(perexfx.ArgumentError, match="Found `input` of type list"):
        perexfx.transform(nn.Linear(2, 2))([1, 2])


@pytest.mark.parametrize("strategy", [3, None])
def test_strategies_of_the_wrong_type(strategy: Any) -> None:
    with pytest.raises(perexfx.ArgumentError, match="`strategy` should be one of auto, outer"):
        perexfx.transform(nn.Linear(2, 2), strategy=strategy)


def _through_a_view(module: Any, x: Tensor) -> Tensor:
    w = module.weight * 2
    w[:1].mul_(3)
    return F.linear(x, w)


def _under_its_old_name(module: Any, x: Tensor) -> Tensor:
    w = module.weight * 2
    w.relu_()
    return F.linear(x, w)


def _between_two_uses(module: Any, x: Tensor) -> Tensor:
    w = module.weight * 2
    y = F.linear(x, w)
    w.clamp_(min=0)
    return y + F.linear(x, w)


def _into_constants(module: Any, x: Tensor) -> Tensor:
    w = module.table.clone()
    w.view(-1).add_(module.weight.view(-1) ** 2)
    return F.linear(F.linear(x, module.weight), w)


def _what_was_read(module: Any, x: Tensor) -> Tensor:
    shift = module.table.clone()
    w = (module.weight + shift) ** 2
    shift.view(-1).mul_(3)
    return F.linear(x, w)


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize(
    "use", [_through_a_view, _under_its_old_name, _between_two_uses, _into_constants, _what_was_read]
)
def test_writes_into_parameter_expressions_are_refused(use: Callable[[Any, Tensor], Tensor], ahead: bool) -> None:
    model, x = Uses(use), torch.randn(4, 6)
    model.register_buffer("table", torch.randn(6, 6))
    with pytest.raises(perexfx.CoverageError, match="writes in place into what a parameter expression is made of"):
        perexfx.transform(model, x if ahead else None)(x)


def test_weights_may_be_clamped_under_no_grad() -> None:
    def use(module: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            module.weight.clamp_(min=0)
        return F.linear(x, module.weight)

    model, x = Uses(use), torch.randn(4, 6)
    perexfx.transform(model, x)(x).sum().backward()
    assert bool(model.weight.ge(0).all())


def test_a_buffer_changed_before_the_backward_is_an_error() -> None:
    model = Uses(lambda m, x: F.linear(x, (m.weight + m.count) ** 2))
    gm = perexfx.transform(model)
    loss = gm(torch.randn(2, 6)).sum()
    model.count += 1
    with pytest.raises(perexfx.ModeError, match="at site `weight` reads was changed between the forward and the"):
        loss.backward()
