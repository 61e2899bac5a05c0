"""Second backwards of parts of a graph: the same gradients, less memory, and an error rather than other numbers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import perexfx
from perexfx.bench.models import LanguageModel, ResNet18, ViT
from perexfx.ir.alternative import Alternative
from perexfx.ir.cost import Cost
from perexfx.ir.errors import BudgetError
from perexfx.ir.node import info_of
from perexfx.ir.strategy import REWEIGHT
from perexfx.planning.knapsack import choose
from perexfx.planning.plan import Decision
from perexfx.runtime.face import runtime_of
from perexfx.runtime.step_options import StepOptions
from perexfx.runtime.transformed import Transformed
from perexfx.strategies import Materialize
from tests.support.memory import measured, step_of
from tests.support.oracle import Batch, assert_close, norms_of, one_at_a_time, train_step, weighted


class Blocks(nn.Module):
    """Residual blocks with dropout on feature maps and a tied layer: seven segments, two of which cannot run again."""

    def __init__(self, p: float = 0.3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.convs = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)])
        self.norms = nn.ModuleList([nn.GroupNorm(2, 8) for _ in range(3)])
        self.tied, self.head = nn.Linear(8, 8), nn.Linear(8, 5)
        self.drop = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x))
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = F.relu(h + self.drop(norm(conv(h))))
        h = h.mean((2, 3))
        return self.head(self.tied(torch.tanh(self.tied(h))))


def batch_of(dtype: torch.dtype = torch.float64, n: int = 6) -> Batch:
    torch.manual_seed(3)
    return Batch((torch.randn(n, 3, 9, 9, dtype=dtype),), torch.randint(0, 5, (n,)))


def blocks(dtype: torch.dtype = torch.float64, p: float = 0.3) -> Blocks:
    torch.manual_seed(0)
    return Blocks(p).to(dtype)


def seeded_step(gm: nn.Module, batch: Batch) -> dict[str, Tensor]:
    torch.manual_seed(7)
    return train_step(gm, batch, F.cross_entropy)


def reruns(gm: Transformed) -> list[tuple[int, int]]:
    return [(rerun.first, rerun.last) for rerun in gm.perexfx.plan.reruns]


# The same gradients


@pytest.mark.parametrize("training", [True, False])
def test_what_is_random_is_drawn_again(training: bool) -> None:
    model, batch = blocks().train(training), batch_of()
    expected = seeded_step(perexfx.transform(model, batch.inputs, clip_norm=0.05), batch)
    after = torch.get_rng_state()
    gm = perexfx.transform(model, batch.inputs, clip_norm=0.05, strategy="reweight")
    assert reruns(gm) == [(0, 3), (6, 6)]
    assert_close(seeded_step(gm, batch), expected, 1e-11, "dropout")
    assert torch.equal(torch.get_rng_state(), after)


def test_channels_that_lie_last_and_random_numbers_among_them() -> None:
    torch.manual_seed(0)
    model, batch = nn.Sequential(Blocks(), nn.Identity()), batch_of(torch.float32, 16)
    wide = Batch((F.interpolate(batch.inputs[0], size=(40, 40)),), batch.targets)
    gm = perexfx.transform(model, wide.inputs, strategy="reweight", clip_norm=0.05)
    plain = perexfx.transform(model, wide.inputs, clip_norm=0.05)
    assert_close(seeded_step(gm, wide), seeded_step(plain, wide), 1e-5, "channels last")


@pytest.mark.parametrize(
    ("sites", "expected"),
    [
        (["convs.0"], [(1, 1)]),
        (["stem", "convs.2"], [(0, 0), (3, 3)]),
        (["convs.0", "convs.1"], [(1, 2)]),
        (["head"], [(6, 6)]),
        (["stem", "convs.0", "convs.1", "convs.2", "head"], [(0, 3), (6, 6)]),
    ],
)
def test_some_sites(sites: list[str], expected: list[tuple[int, int]]) -> None:
    model, batch = blocks(), batch_of()
    gm = perexfx.transform(model, batch.inputs, clip_norm=0.05, strategy=dict.fromkeys(sites, "reweight"))
    assert reruns(gm) == expected
    plain = perexfx.transform(model, batch.inputs, clip_norm=0.05)
    assert_close(seeded_step(gm, batch), seeded_step(plain, batch), 1e-11, str(sites))


def test_segments_of_small_gradients_alone_are_bridges() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    batch = Batch((torch.randn(4, 6).double(),), torch.randint(0, 5, (4,)))
    gm = perexfx.transform(model, batch.inputs, clip_norm=0.1, strategy={"0": "reweight", "2": "reweight"})
    assert reruns(gm) == [(0, 2)]
    assert reruns(perexfx.transform(model, batch.inputs, strategy={"0": "reweight", "4": "reweight"})) == [
        (0, 0),
        (3, 3),
    ]
    check(gm, model, batch, 0.1)


def check(gm: Transformed, model: nn.Module, batch: Batch, clip_norm: float) -> None:
    gradients = one_at_a_time(model, batch, F.cross_entropy)
    norms = norms_of(gradients)
    found = train_step(gm, batch, F.cross_entropy)
    assert_close({"norms": gm.perexfx.norms}, {"norms": norms}, 1e-9, "norms")
    factors = (clip_norm / norms).clamp(max=1) / batch.size
    assert_close(found, weighted(gradients, factors), 1e-9, "gradients")


class Masked(nn.Module):
    """Blocks that all read a mask and a position table, which carry no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 8)
        self.register_buffer("positions", torch.randn(7, 8))
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.head = nn.Linear(8, 5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        weights = mask.unsqueeze(2).to(self.positions.dtype)
        h = self.tokens(ids)
        for layer in self.layers:
            h = h + torch.tanh(layer(h + self.positions)) * weights
        return self.head((h * weights).sum(1) / weights.sum(1))


def test_values_that_later_segments_read_beside() -> None:
    torch.manual_seed(0)
    model = Masked().double()
    mask = torch.arange(7) < torch.tensor([[7], [3], [5], [1]])
    batch = Batch((torch.randint(0, 20, (4, 7)), mask), torch.randint(0, 5, (4,)))
    for strategy in ("reweight", {"layers.1": "reweight"}, {"layers.0": "reweight", "layers.1": "reweight"}):
        gm = perexfx.transform(model, batch.inputs, clip_norm=0.1, strategy=strategy)
        assert gm.perexfx.plan.reruns
        check(gm, model, batch, 0.1)


def test_other_reductions_and_clippings() -> None:
    model, batch = blocks(p=0.0), batch_of()
    options: list[dict[str, Any]] = [
        {"clipping": "automatic"},
        {"clipping": lambda norms: 1 / (1 + norms)},
        {"clip_norm": None},
        {"clipping": "per_layer"},
        {"loss_reduction": "sum"},
    ]
    for chosen in options:
        reduction = chosen.get("loss_reduction", "mean")

        def loss(output: Tensor, targets: Tensor, reduction: str = reduction) -> Tensor:
            return F.cross_entropy(output, targets, reduction=reduction)

        expected = train_step(perexfx.transform(model, batch.inputs, **chosen), batch, loss)
        gm = perexfx.transform(model, batch.inputs, strategy="reweight", **chosen)
        assert_close(train_step(gm, batch, loss), expected, 1e-11, str(chosen))


@pytest.mark.parametrize("where", ["input", "inside", "loss", "all"])
def test_examples_that_are_not_finite_count_as_zero(where: str, caplog: pytest.LogCaptureFixture) -> None:
    model, batch = blocks(p=0.0), batch_of()
    x = batch.inputs[0].clone()
    lost = range(6) if where == "all" else (1, 4)
    for at in lost:
        x[at] = {"input": float("nan"), "inside": 1e200, "loss": x[at], "all": float("inf")}[where]
    scale = torch.ones(6, 1, dtype=torch.float64)
    if where == "loss":
        scale[list(lost)] = float("inf")

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        each = (output**2 * (scale if len(output) == 6 else 1)).sum(1)
        return each.mean()

    gm = perexfx.transform(model, batch.inputs, clip_norm=0.05, strategy="reweight")
    with caplog.at_level(logging.WARNING, "perexfx"):
        found = train_step(gm, Batch((x,), batch.targets), loss)
    assert f"{len(lost)} of 6 examples" in caplog.text
    if where == "all":
        assert all(not gradient.any() for gradient in found.values())
        return
    rest = train_step(gm, Batch((x,), batch.targets).take(torch.tensor([0, 2, 3, 5])), loss)
    assert_close({n: 6 * g for n, g in found.items()}, {n: 4 * g for n, g in rest.items()}, 1e-9, where)


# As part of everything else


def test_two_backwards_of_one_forward() -> None:
    model, batch = blocks(), batch_of()
    gm = perexfx.transform(model, batch.inputs, clip_norm=0.05, strategy="reweight")
    once = seeded_step(gm, batch)
    gm.zero_grad()
    torch.manual_seed(7)
    loss = F.cross_entropy(gm(*batch.inputs), batch.targets)
    loss.backward(retain_graph=True)
    loss.backward()
    twice = {name: parameter.grad for name, parameter in gm.named_parameters() if parameter.grad is not None}
    assert_close(twice, {name: 2 * gradient for name, gradient in once.items()}, 1e-11, "twice")


def test_gradients_of_inputs_and_of_each_example() -> None:
    model, batch = blocks(p=0.0), batch_of()
    gm = perexfx.transform(model, batch.inputs, strategy="reweight")
    x = batch.inputs[0].clone().requires_grad_()
    (found,) = torch.autograd.grad(F.cross_entropy(gm(x), batch.targets), [x])
    (expected,) = torch.autograd.grad(F.cross_entropy(model(x), batch.targets), [x])
    assert_close({"x": found}, {"x": expected}, 1e-11, "x")
    each: dict[str, Tensor] = {}
    with runtime_of(gm).stepping(StepOptions(gradients_to=each.update)):
        found = train_step(gm, batch, F.cross_entropy)
    assert_close(found, train_step(perexfx.transform(model), batch, F.cross_entropy), 1e-11, "sums")
    assert_close(each, one_at_a_time(model, batch, F.cross_entropy), 1e-9, "each")


def test_freezing_after_the_transform() -> None:
    model, batch = blocks(p=0.0), batch_of()
    gm = perexfx.transform(model, batch.inputs, clip_norm=0.05, strategy="reweight")
    for frozen in (("stem",), ("convs.0", "convs.1"), ("convs.2", "head"), ("stem", "convs.0", "convs.1", "convs.2")):
        for name in frozen:
            model.get_submodule(name).requires_grad_(False)
        check(gm, model, batch, 0.05)
        model.requires_grad_()


def test_check_and_verify() -> None:
    model, batch = blocks(p=0.0), batch_of()
    gm = perexfx.transform(model, batch.inputs, clip_norm=0.05, strategy="reweight")
    result = perexfx.check(gm, batch.inputs, model=model, loss_fn=F.cross_entropy, targets=batch.targets)
    assert result.ok, str(result)
    assert "5 clipped sums come from a second backward, which runs while nobody watches" in str(perexfx.verify(gm))


def test_profiles_time_second_runs() -> None:
    model, batch = blocks(p=0.0), batch_of()
    gm = perexfx.transform(model, batch.inputs, strategy={"convs.0": "reweight", "convs.1": "reweight"})
    sites = {
        site.name: site for site in perexfx.profile(gm, F.cross_entropy, *batch.inputs, batch.targets, steps=2).sites
    }
    assert sites["convs.0"].seconds > 0
    assert sites["convs.0"].bytes_held == 6 * 8 * 8  # its bias
    assert sites["convs.2"].bytes_held > 6 * 8 * 8


def test_graphs_of_steps_sum_what_is_held() -> None:
    model, batch = blocks(p=0.0), batch_of()
    gm = perexfx.transform(model, batch.inputs, clip_norm=0.05, strategy="reweight")
    expected = train_step(gm, batch, F.cross_entropy)
    step = perexfx.step_graph(gm, F.cross_entropy, batch.inputs, batch.targets)
    buffers = dict(gm.named_buffers())
    _, norms, found = step(dict(gm.named_parameters()), buffers, batch.inputs, batch.targets)
    assert_close(found, expected, 1e-11, "step")
    assert_close({"norms": norms}, {"norms": gm.perexfx.norms}, 1e-11, "norms")


@pytest.mark.parametrize("how", ["deepcopy", "save"])
def test_copies(how: str, tmp_path: Path) -> None:
    model, batch = blocks(), batch_of()
    gm = perexfx.transform(model, batch.inputs, clip_norm=0.05, strategy="reweight")
    expected = seeded_step(gm, batch)
    if how == "deepcopy":
        twin = copy.deepcopy(gm)
    else:
        torch.save(gm, tmp_path / "gm.pt")
        twin = torch.load(tmp_path / "gm.pt", weights_only=False)
    del gm, model
    assert_close(seeded_step(twin, batch), expected, 1e-12, how)


def test_nodes_are_there_only_where_they_may_be_needed() -> None:
    model, batch = blocks(), batch_of()

    def roles(**options: Any) -> list[str]:
        gm = perexfx.transform(model, batch.inputs, **options)
        return [info_of(node).role for node in gm.graph.nodes]

    assert "cut" not in roles()
    assert "cut" not in roles(strategy="materialize")
    assert roles(strategy={"stem": "reweight"}).count("cut") == roles(memory_budget=1 << 30).count("cut") == 3 * 8 - 1


def test_views(tmp_path: Path) -> None:
    gm = perexfx.transform(blocks(), batch_of().inputs, strategy={"convs.1": "reweight", "convs.2": "reweight"})
    perexfx.export_onnx(gm.eval(), tmp_path / "forward.onnx", *batch_of().inputs, graph="forward")
    perexfx.visualize(gm, tmp_path / "graph.dot")
    drawn = (tmp_path / "graph.dot").read_text()
    assert drawn.count("second run begins") == drawn.count("second run ends") == 1
    assert "reweight" in str(perexfx.report(gm))
    assert "reweight" in perexfx.report(gm).explain("convs.1")


# Whatever a forward does


class Forward(nn.Module):
    """Three layers, a dropout, and a forward that is given."""

    def __init__(self, forward: Callable[[Forward, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.drop, self.relu, self.run = nn.Dropout(0.5), nn.ReLU(inplace=True), forward
        self.register_buffer("mask", (torch.arange(8) % 3 > 0).float())

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def interleaved(m: Forward, x: Tensor) -> Tensor:
    v = m.a(x)
    h = torch.zeros_like(v)
    h[:, ::2] = v[:, ::2]
    h[:, 1::2] = v[:, 1::2].tanh()
    return m.c(m.b(h))


def written_and_not_read(m: Forward, x: Tensor) -> Tensor:
    kept = x.new_ones(x.shape)
    kept.mul_(0.5)
    return m.c(F.layer_norm(m.b(m.a(x) * kept), (8,)))


def overwritten_by_a_module(m: Forward, x: Tensor) -> Tensor:
    return m.c(m.relu(m.b(m.relu(m.a(x)))))


def for_a_later_segment(m: Forward, x: Tensor) -> Tensor:
    h = F.relu(m.a(x))
    noise = torch.rand_like(h)
    h = torch.softmax(m.b(m.drop(h)), 1)
    return m.c(h * noise)


def sums_that_are_always_the_same(m: Forward, x: Tensor) -> Tensor:
    return m.c(torch.softmax(m.b(F.layer_norm(m.drop(m.a(x)), (8,))), 1))


def no_gradient_below(m: Forward, x: Tensor) -> Tensor:
    return m.c(m.b(m.a(x)).detach())


def without_a_reader(m: Forward, x: Tensor) -> Tensor:
    h = m.a(x)
    m.b(h)
    return m.c(x)


def codes(m: Forward, x: Tensor) -> Tensor:
    return m.c((m.b(m.a(x)) > 0).to(x.dtype))


def an_earlier_exit_without_gradient(m: Forward, x: Tensor) -> Tensor:
    kept = x > 0
    h = torch.tanh(m.a(x))
    g = torch.tanh(m.b(h) * kept)
    return m.c(g) * torch.sigmoid(g.detach().sum(1, keepdim=True) + h.detach().sum(1, keepdim=True))


def an_expression_made_early(m: Forward, x: Tensor) -> Tensor:
    weight = m.c.weight * m.mask
    h = torch.tanh(m.a(x))
    return F.linear(h, weight) + m.b(h).sum(1, keepdim=True)


class Logits(NamedTuple):
    logits: Tensor


FORWARDS = (
    *(interleaved, written_and_not_read, overwritten_by_a_module, for_a_later_segment, sums_that_are_always_the_same),
    *(no_gradient_below, without_a_reader, codes, an_earlier_exit_without_gradient, an_expression_made_early),
)


@pytest.mark.parametrize("strategy", ["reweight", "a", "b", "c", "budget"])
@pytest.mark.parametrize("forward", FORWARDS, ids=lambda forward: forward.__name__)
@pytest.mark.parametrize("mode", ["train", "eval", "eval first"])
def test_whatever_a_forward_does(forward: Callable[[Forward, Tensor], Any], strategy: str, mode: str) -> None:
    torch.manual_seed(0)
    model = Forward(forward).double().train(mode == "train")
    batch = Batch((torch.randn(6, 8).double(),), torch.randint(0, 5, (6,)))
    plain = perexfx.transform(model, batch.inputs, clip_norm=0.05)
    options: dict[str, Any] = {"strategy": strategy if strategy == "reweight" else {strategy: "reweight"}}
    if strategy == "budget":
        options = {"memory_budget": max(0, plain.perexfx.plan.leanest().bytes_added) + 1024}
    try:
        gm = perexfx.transform(model, batch.inputs, clip_norm=0.05, **options)
    except perexfx.StrategyError:
        return  # it says that there is none
    for module in (gm, plain):
        module.train(mode != "eval")
    assert_close(seeded_step(gm, batch), seeded_step(plain, batch), 1e-9, forward.__name__)


def test_writes_that_gradients_pass_beside_a_cut_are_seen() -> None:
    gm = perexfx.transform(Forward(interleaved), torch.randn(6, 8))
    refusals = {d.site: d.alternatives[-1].refusal for d in gm.perexfx.plan.decisions[::-1]}
    assert "which is read beyond its segment" in refusals["a"]
    assert not refusals["c"]


def test_outputs_as_people_return_and_use_them() -> None:
    torch.manual_seed(0)
    batch = Batch((torch.randn(6, 8).double(),), torch.randint(0, 5, (6,)))
    model = Forward(lambda m, x: Logits(m.c(m.b(m.a(x))))).double()
    gm = perexfx.transform(model, batch.inputs, clip_norm=0.05, strategy="reweight")
    plain = perexfx.transform(model, batch.inputs, clip_norm=0.05)

    def loss(output: Logits, targets: Tensor) -> Tensor:
        scaled = output.logits
        scaled[:, 0] += 1
        return F.cross_entropy(scaled.mul_(0.5), targets)

    assert_close(train_step(gm, batch, loss), train_step(plain, batch, loss), 1e-11, "changed in place")


def test_a_loss_outlives_the_module() -> None:
    torch.manual_seed(0)
    model, x, y = Forward(overwritten_by_a_module).double(), torch.randn(6, 8).double(), torch.randint(0, 5, (6,))
    loss = F.cross_entropy(perexfx.transform(model, x, strategy="reweight", clip_norm=0.05)(x), y)
    loss.backward()
    assert_close(
        {name: parameter.grad for name, parameter in model.named_parameters()},
        train_step(perexfx.transform(model, x, clip_norm=0.05), Batch((x,), y), F.cross_entropy),
        1e-11,
        "outlived",
    )


def test_values_of_less_precision_in_between() -> None:
    torch.manual_seed(0)
    model = Forward(lambda m, x: m.c(torch.tanh(m.a(x))).to(torch.float16))
    batch = Batch((torch.randn(64, 8),), torch.randint(0, 5, (64,)))
    expected = train_step(perexfx.transform(model, batch.inputs, clip_norm=1e-4), batch, F.cross_entropy)
    gm = perexfx.transform(model, batch.inputs, clip_norm=1e-4, strategy="reweight")
    assert_close(train_step(gm, batch, F.cross_entropy), expected, 1e-5, "half")


def test_compiled_steps_keep_the_budget() -> None:
    torch.manual_seed(0)
    model, x = deep(), torch.randn(16, 48, 96)
    free = perexfx.transform(model, x)
    gm = perexfx.transform(model, x, memory_budget=free.perexfx.plan.bytes_added // 4)
    step = perexfx.compile_step(gm, lambda output, y: F.cross_entropy(output.flatten(0, -2), y))
    step(x, torch.randint(0, 10, (16 * 48,)))
    assert list(step.ways.values()) == ["eager"]


def test_a_tied_layer_in_the_middle_parts_the_graph() -> None:
    torch.manual_seed(0)
    tied = nn.Linear(96, 96)
    layers = [layer for at in range(12) for layer in (tied if at in (5, 6) else nn.Linear(96, 96), nn.ReLU())]
    model, x = nn.Sequential(*layers, nn.Linear(96, 10)), torch.randn(16, 48, 96)
    everywhere = perexfx.transform(model, x, strategy="reweight")
    assert reruns(everywhere) == [(0, 4), (7, 12)]
    most = everywhere.perexfx.plan
    gm = perexfx.transform(model, x, memory_budget=most.bytes_added)
    assert gm.perexfx.plan.bytes_added <= most.bytes_added
    assert gm.perexfx.plan.seconds <= most.seconds


# Less memory


def deep(width: int = 96, depth: int = 12) -> nn.Module:
    """As many positions as features, so that neither gradients nor factors are small beside the activations."""
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def without_second_run(decision: Decision) -> Decision:
    return replace(decision, alternatives=tuple(a for a in decision.alternatives if a.strategy.name != REWEIGHT))


def test_a_budget_that_only_a_second_backward_keeps() -> None:
    torch.manual_seed(0)
    model, x = deep(), torch.randn(16, 48, 96)
    unbound = perexfx.transform(model, x)
    free = unbound.perexfx.plan
    budget = free.bytes_added // 4
    with pytest.raises(BudgetError):
        replace(free, segments=(), decisions=tuple(map(without_second_run, free.decisions))).within(budget)
    gm = perexfx.transform(model, x, memory_budget=budget)
    plan = gm.perexfx.plan
    assert plan.reruns
    assert plan.bytes_added <= budget
    assert plan.seconds > free.seconds
    ordinary, clipped = measured(step_of(model, x)), measured(step_of(gm, x))
    assert abs(clipped - ordinary - plan.bytes_added) <= 0.02 * ordinary
    batch = Batch((x.double(),), torch.randint(0, 10, (16, 48)))

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, -2), targets.flatten())

    strategies = {decision.site: decision.chosen.strategy.name for decision in plan.decisions[::-1]}
    again = perexfx.transform(model.double(), batch.inputs, strategy=strategies, clip_norm=0.1)
    assert again.perexfx.plan.reruns == plan.reruns
    expected = train_step(perexfx.transform(model, batch.inputs, clip_norm=0.1), batch, loss)
    assert_close(train_step(again, batch, loss), expected, 1e-11, "budget")


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: ResNet18(width=16), torch.randn(16, 3, 32, 32)),
        (lambda: ViT(image=32, patch=4, width=48, depth=3), torch.randn(32, 3, 32, 32)),
        (lambda: LanguageModel(vocabulary=500, width=64, depth=2, length=64), torch.randint(0, 500, (16, 64))),
    ],
)
def test_whole_models_take_no_more_than_an_ordinary_step(make: Callable[[], nn.Module], x: Tensor) -> None:
    torch.manual_seed(0)
    model = make()
    gm = perexfx.transform(model, x, strategy="reweight")
    ordinary, clipped = measured(step_of(model, x)), measured(step_of(gm, x))
    added = gm.perexfx.plan.bytes_added
    assert abs(added - (clipped - ordinary)) <= 0.1 * ordinary, (added, clipped - ordinary)
    assert clipped <= 1.1 * ordinary


def test_bundles_go_together_or_not_at_all() -> None:
    def costs(seconds: float, held: int) -> Alternative:
        return Alternative(Materialize(keep=True), seconds, Cost((), held))

    from perexfx.ir.errors import BudgetError

    rows = [[costs(1.0, 10), costs(3.0, 6)] for _ in range(4)]
    free = [costs(2.0, 0) for _ in range(4)]
    bundles = [{0: free[0], 1: free[1]}, {2: free[2]}, {3: free[3]}]
    assert choose(rows, 40, bundles=bundles) == [row[0] for row in rows]
    assert choose(rows, 30, bundles=bundles) == [rows[0][0], rows[1][0], rows[2][0], free[3]]
    assert choose(rows, 20, bundles=bundles) == [rows[0][0], rows[1][0], free[2], free[3]]
    assert choose(rows, 10, bundles=bundles) == [free[0], free[1], rows[2][0], free[3]]
    assert choose(rows, 6, bundles=bundles) == choose(rows, 0, bundles=bundles) == free
    with pytest.raises(BudgetError, match="The least that would do is 12 bytes"):
        choose(rows, 11, bundles=bundles[:1])


# An error rather than other numbers


class Changing(torch.autograd.Function):
    """Multiplies with a number that others may change."""

    factor = 1.0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * Changing.factor

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad_outputs[0]


class Changes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(Changing.apply(self.first(x)))


def test_what_does_not_compute_the_same_again_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    gm = perexfx.transform(Changes(), torch.randn(3, 4), strategy="reweight")
    loss = F.cross_entropy(gm(torch.randn(3, 4)), torch.tensor([0, 1, 2]))
    monkeypatch.setattr(Changing, "factor", 1.01)
    with pytest.raises(perexfx.ModeError, match=r"layers from `first` to `second` were run a second time.*3 of 3"):
        loss.backward()
    assert all(parameter.grad is None for parameter in gm.parameters())


def test_a_parameter_that_is_changed_in_between_is_an_error() -> None:
    torch.manual_seed(0)
    model, x = Forward(overwritten_by_a_module).double(), torch.randn(3, 8).double()
    gm = perexfx.transform(model, x, strategy="reweight")
    loss = F.cross_entropy(gm(x), torch.tensor([0, 1, 2]))
    with torch.no_grad():
        model.a.bias.mul_(1 + 1e-9)
    with pytest.raises(perexfx.ModeError, match=r"Parameter `a.bias` was changed between the forward and the backward"):
        loss.backward()


class Negating(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_outputs[0].data.neg_()
        return grad_outputs[0]


def test_a_gradient_that_is_overwritten_is_an_error() -> None:
    torch.manual_seed(0)
    model = Forward(lambda m, x: m.c(Negating.apply(m.a(x))))
    gm = perexfx.transform(model, torch.randn(3, 8), strategy={"a": "reweight"})
    loss = F.cross_entropy(gm(torch.randn(3, 8)), torch.tensor([0, 1, 2]))
    with pytest.raises(perexfx.ModeError, match=r"was overwritten by a backward below.*layers from `a` to `a`"):
        loss.backward()


def test_a_value_that_is_overwritten_in_between_is_an_error() -> None:
    model, batch = blocks(p=0.0), batch_of()
    x = batch.inputs[0].clone()
    gm = perexfx.transform(model, x, strategy="reweight")
    loss = F.cross_entropy(gm(x), batch.targets)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Overwritten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 5)
        self.second.weight.requires_grad_(False)  # or torch would not let its input be overwritten
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        g = self.second(h)
        return self.third(g + self.relu(h))


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(x)


@pytest.mark.parametrize(
    ("model", "strategy", "message"),
    [
        (blocks(), {"tied": "reweight"}, "joined with tied#2"),
        (blocks(), {"norms.0": "reweight"}, "its gradients are held as they are formed"),
        (Several(), {"second": "reweight"}, "no single value carries the gradients of what lies above it"),
    ],
)
def test_where_there_is_no_second_backward(model: nn.Module, strategy: Any, message: str) -> None:
    x = batch_of().inputs[0] if isinstance(model, Blocks) else torch.randn(3, 4)
    with pytest.raises(perexfx.StrategyError, match=message):
        perexfx.transform(model, x, strategy=strategy)


def test_a_cut_whose_value_is_overwritten_is_none() -> None:
    torch.manual_seed(0)
    model = Overwritten().double()
    batch = Batch((torch.randn(4, 4).double(),), torch.randint(0, 5, (4,)))
    gm = perexfx.transform(model, batch.inputs, clip_norm=0.1, memory_budget=1 << 20)
    refusals = {d.site: d.alternatives[-1].refusal for d in gm.perexfx.plan.decisions[::-1]}
    assert "is overwritten" in refusals["first"]
    check(gm, model, batch, 0.1)


@pytest.mark.parametrize("fill", [-1e9, float("-inf"), 0.0])
@pytest.mark.parametrize("change", ["eval", "p", "hook"])
def test_a_module_that_is_changed_in_between_is_an_error(change: str, fill: float) -> None:
    torch.manual_seed(0)
    model = Forward(lambda m, x: m.c(m.drop(torch.tanh(m.a(x)))).masked_fill(torch.arange(5) > 3, fill)).double()
    x = torch.randn(6, 8).double()
    gm = perexfx.transform(model, x, strategy="reweight")
    loss = F.cross_entropy(gm(x), torch.randint(0, 4, (6,)))
    if change == "eval":
        gm.eval()
    elif change == "p":
        gm.get_submodule("drop").p = 0.1
    else:
        gm.get_submodule("drop").register_forward_hook(lambda *_: None)
    with pytest.raises(perexfx.ModeError, match=r"Module `drop` was changed between the forward and the backward"):
        loss.backward()


def test_outliers_do_not_hide_other_values(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    mask = torch.arange(5) > 3
    model = Forward(lambda m, x: m.c(Changing.apply(m.a(x))).masked_fill(mask, float("-inf"))).double()
    x = torch.randn(6, 8).double()
    gm = perexfx.transform(model, x, strategy="reweight")
    loss = F.cross_entropy(gm(x), torch.randint(0, 4, (6,)))
    monkeypatch.setattr(Changing, "factor", 1.01)
    with pytest.raises(perexfx.ModeError, match="6 of 6 examples"):
        loss.backward()


def test_complex_results_end_no_segment() -> None:
    model, x = Forward(lambda m, x: torch.fft.fft(m.c(m.a(x)))).double(), torch.randn(6, 8).double()
    gm = perexfx.transform(model, x, memory_budget=1 << 20)
    assert "not one tensor of examples" in gm.perexfx.plan.decisions[-2].alternatives[-1].refusal
    gm(x).abs().sum().backward()
