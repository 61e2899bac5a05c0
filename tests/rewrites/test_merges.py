"""Where merges are found, what they are made of, and near misses that are none."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import perexfx
from tests.support.oracle import Batch, norms_of, one_at_a_time

WIDTH, C, N = 6, 4, 5


class Net(nn.Module):
    """Three heads, weights and a bias; a function says what is done with them."""

    def __init__(self, merged: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(WIDTH, WIDTH)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, C) for _ in range(3))
        self.last = nn.Linear(C, C)
        self.softmax = nn.Softmax(-1)
        self.identity = nn.Identity()
        self.weight = nn.Parameter(torch.tensor([0.2, 0.3, 0.5]))
        self.bias = nn.Parameter(torch.randn(C))
        self.register_buffer("fixed", torch.tensor(0.4))
        self.merged = merged

    def forward(self, x: Tensor) -> Any:
        return self.merged(self, x)

    def each(self, x: Tensor) -> list[Tensor]:
        return [head(x) for head in self.heads]


FORMS: dict[str, tuple[Callable[[Any, Tensor], Any], int]] = {}
"""Name -> forward and its number of pathways."""
OF_SHAPES: set[str] = set()
"""Those that are found by their shapes alone."""
MISSES: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {}
"""Name -> forward and what is said of it."""


def form(pathways: int, *, by_shapes: bool = False) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        FORMS[function.__name__] = (function, pathways)
        if by_shapes:
            OF_SHAPES.add(function.__name__)
        return function

    return register


def miss(said: str) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        MISSES[function.__name__] = (function, said)
        return function

    return register


@form(2)
def plus(net: Any, x: Tensor) -> Any:
    return net.heads[0](x) + net.heads[1](x)


@form(3)
def plus_from_the_right(net: Any, x: Tensor) -> Any:
    a, b, c = net.each(x)
    return a + (b + c)


@form(3)
def torch_add(net: Any, x: Tensor) -> Any:
    a, b, c = net.each(x)
    return torch.add(torch.add(a, b), other=c)


@form(2)
def torch_add_with_alpha(net: Any, x: Tensor) -> Any:
    a, b, _ = net.each(x)
    return torch.add(a, b, alpha=2)


@form(3)
def alpha_of_a_sum(net: Any, x: Tensor) -> Any:
    a, b, c = net.each(x)
    return torch.add(a, b + c, alpha=0.5)


@form(3)
def method_add(net: Any, x: Tensor) -> Any:
    a, b, c = net.each(x)
    return a.add(b).add(c, alpha=0.5)


@form(3)
def augmented(net: Any, x: Tensor) -> Any:
    z = net.heads[0](x)
    z += net.heads[1](x)
    z += net.heads[2](x)
    return z


@form(3)
def augmented_from_zero(net: Any, x: Tensor) -> Any:
    z = 0
    for head in net.heads:
        z += head(x)
    return z


@form(3)
def augmented_from_zeros(net: Any, x: Tensor) -> Any:
    z = torch.zeros(x.size(0), C)
    for head in net.heads:
        z += head(x)
    return z


@form(3)
def augmented_from_zeros_like(net: Any, x: Tensor) -> Any:
    z = x.new_zeros(x.shape[0], C)
    for head in net.heads:
        z = z + head(x)
    return z


@form(2)
def written_over_what_others_see(net: Any, x: Tensor) -> Any:
    a = net.identity(net.heads[0](x))
    a += net.heads[1](x)
    return a


@form(3)
def builtin_sum(net: Any, x: Tensor) -> Any:
    return sum(net.each(x))


@form(3)
def builtin_sum_over_count(net: Any, x: Tensor) -> Any:
    return sum(net.each(x)) / 3


@form(2)
def halved(net: Any, x: Tensor) -> Any:
    return (net.heads[0](x) + net.heads[1](x)) * 0.5


@form(2)
def halved_in_place(net: Any, x: Tensor) -> Any:
    z = net.heads[0](x) + net.heads[1](x)
    z /= 2
    return z


@form(2)
def weighted_by_numbers(net: Any, x: Tensor) -> Any:
    return 0.3 * net.heads[0](x) + net.heads[1](x) * 0.7


@form(3)
def weighted_by_a_parameter(net: Any, x: Tensor) -> Any:
    return sum(net.weight[at] * head(x) for at, head in enumerate(net.heads))


@form(3)
def weighted_by_a_softmax_of_parameters(net: Any, x: Tensor) -> Any:
    w = net.weight.softmax(0)
    return sum(w[at] * z for at, z in enumerate(net.each(x)))


@form(2)
def weighted_by_a_buffer(net: Any, x: Tensor) -> Any:
    return net.fixed * net.heads[0](x) + net.heads[1](x) * (1 - net.fixed)


@form(2)
def divided(net: Any, x: Tensor) -> Any:
    return net.heads[0](x) / 2 + torch.div(net.heads[1](x), 2)


@form(3)
def stack_mean(net: Any, x: Tensor) -> Any:
    return torch.stack(net.each(x)).mean(0)


@form(3)
def stack_sum_over_the_middle(net: Any, x: Tensor) -> Any:
    return torch.stack(net.each(x), dim=1).sum(dim=1)


@form(3)
def stack_mean_over_the_last(net: Any, x: Tensor) -> Any:
    return torch.mean(torch.stack(net.each(x), -1), dim=[-1])


@form(3)
def stack_sum_over_the_same_from_behind(net: Any, x: Tensor) -> Any:
    return torch.sum(torch.stack(tensors=net.each(x), dim=2), -1)


@form(2)
def weighted_stack_sum(net: Any, x: Tensor) -> Any:
    return torch.stack([0.25 * net.heads[0](x), 0.75 * net.heads[1](x)]).sum(0)


@form(2)
def with_a_bias_of_its_own(net: Any, x: Tensor) -> Any:
    return net.heads[0](x) + net.heads[1](x) + net.bias


@form(2)
def biases_inside(net: Any, x: Tensor) -> Any:
    return (net.heads[0](x) + net.bias) + (net.heads[1](x) + net.bias)


@form(2)
def in_another_shape(net: Any, x: Tensor) -> Any:
    return (net.heads[0](x) + net.heads[1](x)).view(-1, 2, 2)


@form(2)
def beside_features(net: Any, x: Tensor) -> Any:
    h = net.trunk(x)
    return {"logits": net.heads[0](h) + net.heads[1](h), "features": h}


@form(2)
def beside_its_heads(net: Any, x: Tensor) -> Any:
    a, b, _ = net.each(x)
    return a + b, [a, b]


@form(3)
def tied_heads(net: Any, x: Tensor) -> Any:
    h = net.trunk(x)
    return net.heads[0](x) + net.heads[0](h) + net.heads[0](h.tanh())


@form(3, by_shapes=True)
def early_exits(net: Any, x: Tensor) -> Any:
    out = []
    for head in net.heads:
        x = net.trunk(x).tanh()
        out.append(head(x))
    return out


@form(3, by_shapes=True)
def heads_in_a_tuple(net: Any, x: Tensor) -> Any:
    return tuple(net.each(x))


@form(3, by_shapes=True)
def heads_in_a_dict(net: Any, x: Tensor) -> Any:
    a, b, c = net.each(x)
    return {"a": a, "others": [b, c]}


@form(3, by_shapes=True)
def heads_in_an_ordered_dict(net: Any, x: Tensor) -> Any:
    a, b, c = net.each(x)
    return OrderedDict(a=a, b=b, c=c)


@form(2, by_shapes=True)
def merged_before_the_end(net: Any, x: Tensor) -> Any:
    return F.log_softmax(net.heads[0](x) + net.heads[1](x), -1)


@form(2)
def residuals_inside(net: Any, x: Tensor) -> Any:
    a, b, _ = net.each(x)
    return (a + net.last(a)) + (b + net.last(b))


@form(2, by_shapes=True)
def merge_with_a_residual_behind(net: Any, x: Tensor) -> Any:
    z = net.heads[0](x) + net.heads[1](x)
    return z + net.last(z)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("known", [True, False])
def test_a_form_is_found_and_guided(name: str, known: bool) -> None:
    function, pathways = FORMS[name]
    net, x, y = Net(function), torch.randn(N, WIDTH), torch.randint(C, (N,))
    if not known and name in OF_SHAPES:
        with pytest.raises(perexfx.RefusedError) as error:
            perexfx.guide_logits(net, num_classes=C)
        assert "Pass `example_inputs`, with which merges anywhere" in str(error.value)
        return
    for source in ("batch", "given"):
        g = perexfx.guide_logits(net, x if known else None, num_classes=C, per="target", table_from=source)
        assert g.guide.pathways == pathways
        plain = net(x)
        if name in OF_SHAPES and not isinstance(plain, Tensor):
            plain = torch.stack(torch.utils._pytree.tree_leaves(plain)).mean(0)
        torch.testing.assert_close(g(x, targets=y), plain, rtol=0, atol=0)
        g.guide.weakness.copy_(torch.rand(pathways, C) + 0.1)
        g.guide.pending_classes.zero_()
        first = torch.utils._pytree.tree_leaves(g(x, targets=y))[0]
        assert not torch.equal(first, torch.utils._pytree.tree_leaves(plain)[0])
        torch.testing.assert_close(g.eval()(x), plain, rtol=0, atol=0)


def loss_of(output: Any, targets: Tensor) -> Tensor:
    first = torch.utils._pytree.tree_leaves(output)[0]
    return F.cross_entropy(first.flatten(1), targets, reduction="sum")


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("per", ["class", "target"])
def test_a_guided_form_is_transformed_exactly(name: str, per: str) -> None:
    function, pathways = FORMS[name]
    net, x, y = Net(function).double(), torch.randn(N, WIDTH, dtype=torch.float64), torch.randint(C, (N,))
    g = perexfx.guide_logits(net, x, num_classes=C, per=per, table_from="given")
    g.guide.weakness.copy_(torch.rand(pathways, C) + 0.1)
    rows = one_at_a_time(g, Batch((x, y), y), loss_of)
    t = perexfx.transform(g, {"x": x, "targets": y}, clip_norm=0.5, loss_reduction="sum")
    loss_of(t(x, targets=y), y).backward()
    norms = norms_of(rows)
    torch.testing.assert_close(t.perexfx.norms, norms, rtol=1e-9, atol=1e-9)
    factors = (0.5 / norms).clamp(max=1)
    for parameter_name, parameter in t.named_parameters():
        expected = torch.einsum("n,n...->...", factors, rows[parameter_name])
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


WEIGHTED = {
    "torch_add_with_alpha": [1, 2],
    "alpha_of_a_sum": [1, 0.5, 0.5],
    "method_add": [1, 1, 0.5],
    "halved": [0.5, 0.5],
    "halved_in_place": [0.5, 0.5],
    "weighted_by_numbers": [0.3, 0.7],
    "weighted_by_a_parameter": [0.2, 0.3, 0.5],
    "weighted_by_a_buffer": [0.4, 0.6],
    "divided": [0.5, 0.5],
    "stack_mean": [1 / 3] * 3,
    "stack_mean_over_the_last": [1 / 3] * 3,
    "stack_sum_over_the_middle": [1] * 3,
    "weighted_stack_sum": [0.25, 0.75],
    "written_over_what_others_see": [1, 1],
    "augmented_from_zeros": [1] * 3,
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_pathways_are_scored_alone_and_keep_their_weights(name: str) -> None:
    net, x, y = Net(FORMS[name][0]), torch.randn(N, WIDTH), torch.randint(C, (N,))
    weights, P = torch.tensor(WEIGHTED[name]), len(WEIGHTED[name])
    g = perexfx.guide_logits(net, x, num_classes=C, per="target", momentum=0)
    g(x, targets=y)
    logits = net.each(x)[:P]
    loss = torch.stack([F.cross_entropy(z, y, reduction="none") for z in logits]).detach()
    expected = torch.stack([loss[:, y == c].mean(1) if (y == c).any() else torch.zeros(P) for c in range(C)], 1)
    torch.testing.assert_close(g.guide.pending, expected)
    out = g(x, targets=y)
    a = (expected + 1e-3) / (expected + 1e-3).sum(0)
    terms = weights.view(-1, 1, 1) * torch.stack(logits)
    torch.testing.assert_close(out, P * torch.einsum("pn,pnc->nc", a[:, y], terms))


def test_a_weight_of_a_pathways_own_is_part_of_its_logits() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, C)
            self.scale = nn.Parameter(torch.tensor(20.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * F.normalize(self.inner(x), dim=-1)

    net, x, y = perexfx.parallel_columns([Scaled(), Scaled()]), torch.randn(N, WIDTH), torch.randint(C, (N,))
    g = perexfx.guide_logits(net, x, num_classes=C, momentum=0)
    g(x, targets=y)
    c = int(y[0])
    expected = [F.cross_entropy(column(x)[y == c], y[y == c]).item() for column in net.columns]
    torch.testing.assert_close(g.guide.pending[:, c], torch.tensor(expected))


def test_a_pathways_own_bias_is_part_of_its_logits() -> None:
    net, x, y = Net(biases_inside), torch.randn(N, WIDTH), torch.randint(C, (N,))
    g = perexfx.guide_logits(net, x, num_classes=C)
    g(x, targets=y)
    c = int(y[0])
    expected = [F.cross_entropy((z + net.bias)[y == c], y[y == c]).item() for z in net.each(x)[:2]]
    torch.testing.assert_close(g.guide.pending[:, c], torch.tensor(expected))


@pytest.mark.parametrize("source", ["batch", "given"])
def test_values_are_taken_before_they_are_written_over(source: str) -> None:
    """A term's value is that which its addition reads, though the merge is done later."""

    def merged(net: Any, x: Tensor) -> Any:
        a, b = net.identity(net.heads[0](x)), net.identity(net.heads[1](x))
        z = a + b
        a.mul_(3)
        return z + net.heads[2](x)

    net, x, y = Net(merged), torch.randn(N, WIDTH), torch.randint(C, (N,))
    g = perexfx.guide_logits(net, x, num_classes=C, per="target", table_from=source)
    g.guide.weakness.copy_(torch.rand(3, C) + 0.1)
    a = g.guide.coefficients()[:, y]
    torch.testing.assert_close(g(x, targets=y), 3 * torch.einsum("pn,pnc->nc", a, torch.stack(net.each(x))))
    if source == "batch":
        c = int(y[0])
        expected = [F.cross_entropy(z[y == c], y[y == c]).item() for z in net.each(x)]
        torch.testing.assert_close(g.guide.pending[:, c], torch.tensor(expected))


@miss("nothing adds or averages two or more values of shape [5, 4]. A merge adds or averages logits of parallel")
def one_head(net: Any, x: Tensor) -> Any:
    return net.heads[0](x)


@miss("nothing adds or averages two or more values of shape [5, 4]")
def one_head_and_a_bias(net: Any, x: Tensor) -> Any:
    return net.heads[0](x) + net.bias


@miss("nothing adds or averages two or more values of shape [5, 4]")
def difference(net: Any, x: Tensor) -> Any:
    return net.heads[0](x) - net.heads[1](x)


@miss("nothing adds or averages two or more values of shape [5, 4]")
def product(net: Any, x: Tensor) -> Any:
    return net.heads[0](x) * net.heads[1](x)


@miss("nothing adds or averages two or more values of shape [5, 4]")
def concatenated(net: Any, x: Tensor) -> Any:
    return torch.cat(net.each(x), 1)


@miss("nothing adds or averages two or more values of shape [5, 4]")
def stacked_over_another_axis(net: Any, x: Tensor) -> Any:
    return torch.stack(net.each(x)).mean(1)


@miss("nothing adds or averages two or more values of shape [5, 4]")
def stack_with_its_axis_kept(net: Any, x: Tensor) -> Any:
    return torch.stack(net.each(x)).mean(0, keepdim=True)


@miss("nothing adds or averages two or more values of shape [5, 4]")
def stack_over_all(net: Any, x: Tensor) -> Any:
    return torch.stack(net.each(x)).sum() * x


@miss("nothing adds or averages two or more values of shape [5, 4]")
def features(net: Any, x: Tensor) -> Any:
    return net.trunk(x) + net.trunk(x.tanh())


@miss("nothing adds or averages two or more values of shape [5, 4]")
def heads_of_other_shapes(net: Any, x: Tensor) -> Any:
    return [net.heads[0](x), net.trunk(x)]


@miss("nothing adds or averages two or more values of shape [5, 4]")
def with_an_input(net: Any, x: Tensor) -> Any:
    return net.heads[0](x.repeat(1, 2)[:, :WIDTH]) + x


@miss("it merges `linear` with `linear_1`, which is computed from it.")
def residual(net: Any, x: Tensor) -> Any:
    a = net.heads[0](x)
    return a + net.last(a)


@miss("it merges `linear` with `linear_1`, which is computed from it.")
def cascade(net: Any, x: Tensor) -> Any:
    a = net.heads[0](x)
    return [a, net.last(a)]


@miss("it merges `linear` with itself.")
def doubled(net: Any, x: Tensor) -> Any:
    a = net.heads[0](x)
    return a + a


@miss("it merges `linear` with itself.")
def twice_with_weights(net: Any, x: Tensor) -> Any:
    a = net.heads[0](x)
    return 0.5 * a + net.heads[1](x) + 0.25 * a


@miss("it merges `linear` with `linear_3`, which is computed from it.")
def corrected(net: Any, x: Tensor) -> Any:
    a, b, _ = net.each(x)
    return a + b + net.last(a)


@miss("it merges `softmax`, which are probabilities. A merge")
def probabilities(net: Any, x: Tensor) -> Any:
    return sum(F.softmax(z, -1) for z in net.each(x)) / 3


@miss("it merges `softmax`, which are probabilities. A merge")
def probabilities_of_a_module(net: Any, x: Tensor) -> Any:
    return torch.stack([net.softmax(z) for z in net.each(x)]).mean(0)


@miss("it is written over `identity`, which is read again after it. A merge adds")
def written_over_and_read_again(net: Any, x: Tensor) -> Any:
    a = net.identity(net.heads[0](x))
    z = a
    z += net.heads[1](x)
    return {"z": z, "same": torch.tanh(a).sum(1)}


@pytest.mark.parametrize("name", MISSES)
def test_what_is_no_merge(name: str) -> None:
    function, said = MISSES[name]
    net, x = Net(function), torch.randn(N, C if name == "with_an_input" else WIDTH)
    net(x)
    with pytest.raises(perexfx.RefusedError) as error:
        perexfx.guide_logits(net, x, num_classes=C)
    assert said in str(error.value)
    assert "test_merges.py:" in str(error.value) or "No merge" in str(error.value)
    assert error.value.graph is not None
    assert error.value.module is not None
    places = [refusal.place for refusal in error.value.refusals]
    nodes = [node.name for node in error.value.graph.nodes]
    assert places
    assert all(place is not None and place.node in nodes for place in places)


def test_merges_of_columns_inside_of_a_submodule() -> None:
    def inside(columns: Sequence[nn.Module]) -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), perexfx.parallel_columns(columns), nn.LogSoftmax(-1))

    net = inside([nn.Linear(WIDTH, C), nn.Sequential(nn.Linear(WIDTH, 3), nn.Linear(3, C))])
    x, y = torch.randn(N, WIDTH), torch.randint(C, (N,))
    g = perexfx.guide_logits(net, x, num_classes=C)
    assert torch.equal(g(x, targets=y), net(x))
    (change,) = g.rewriting.changes
    assert change.place.module == "1"


def test_the_batch_is_known_by_its_inputs() -> None:
    """Batches of another size follow, and one example is as good as many to tell logits by."""
    net = Net(plus)
    for n in (1, C, 7):
        g = perexfx.guide_logits(net, torch.randn(n, WIDTH), num_classes=C)
        x = torch.randn(3, WIDTH)
        assert torch.equal(g(x, targets=torch.tensor([0, 1, 2])), net(x))


def test_residual_blocks_of_maps_are_no_merges() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shortcut = nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, C, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x).relu() + self.shortcut(x)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])
            self.heads = nn.ModuleList([nn.Linear(C, C), nn.Linear(C, C)])

        def forward(self, x: Tensor) -> Tensor:
            pairs = zip(self.blocks, self.heads, strict=True)
            return sum(head(block(x).mean((2, 3))) for block, head in pairs)  # pyright: ignore[reportReturnType]

    g = perexfx.guide_logits(Two(), torch.randn(N, C, 6, 6), num_classes=C)
    assert g.guide.pathways == 2
    assert g.rewriting.changes[0].before == "the sum of `linear`, `linear_1`"


def test_exported_graphs_are_searched_too() -> None:
    """Where a forward cannot be traced it is exported, in torch's own operations."""

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(builtin_sum)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x if x.dim() == 2 else x.flatten(1))

    net, x, y = Branching(), torch.randn(N, 2, 3), torch.randint(C, (N,))
    for per in ("class", "target"):
        g = perexfx.guide_logits(net, x, num_classes=C, per=per)
        assert torch.equal(g(x, targets=y), net(x))
        assert g.guide.pathways == 3
