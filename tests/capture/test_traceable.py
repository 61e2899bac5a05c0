"""Torch's own modules with control flow: the captured graph computes what the module does, in both modes."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import perexfx
from perexfx.capture.forward import capture
from perexfx.capture.graph_module import twin_of
from perexfx.capture.traceable import forward_of
from perexfx.ir.recurrent import lstm_layer
from tests.support.cases_attention import padding, randomized
from tests.support.oracle import Batch, assert_close, norms_of, one_at_a_time, train_step

N, L, S, WIDTH, HEADS = 4, 5, 7, 6, 3


def graph_of(model: nn.Module) -> fx.GraphModule:
    found = capture(model)
    assert not found.fixed_modes
    return fx.GraphModule(twin_of(model, found.constants), found.graph)


def assert_same(model: nn.Module, *inputs: Any) -> None:
    """Outputs and gradients in both modes, with the same random numbers, and outputs without gradients."""
    gm = graph_of(model)
    for training in (True, False):
        results, gradients = [], []
        for module in (model.train(training), gm.train(training)):
            torch.manual_seed(0)
            output = module(*inputs)
            leaves = [x for x in torch.utils._pytree.tree_leaves(output) if x is not None]
            loss = sum(leaf.nan_to_num().sin().sum() for leaf in leaves)
            results.append(output)
            gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
        torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12, equal_nan=True)
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-10, equal_nan=True)
    with torch.no_grad():
        torch.testing.assert_close(gm(*inputs), model(*inputs), rtol=1e-10, atol=1e-10, equal_nan=True)


class Attention(nn.Module):
    """`nn.MultiheadAttention` called in one way."""

    def __init__(self, alone: bool, call: dict[str, Any], **options: Any) -> None:
        super().__init__()
        self.inner, self.alone, self.call = randomized(nn.MultiheadAttention(WIDTH, HEADS, **options)), alone, call

    def forward(self, query: Any, key: Any, value: Any, attn_mask: Any, key_padding_mask: Any) -> Any:
        masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
        used = {name: masks[name] for name in self.call["masks"]}
        rest = {name: value for name, value in self.call.items() if name != "masks"}
        return self.inner(query, *((query, query) if self.alone else (key, value)), **used, **rest)


def attention_inputs(model: Attention, attn_mask: Tensor, key_padding_mask: Tensor) -> tuple[Tensor, ...]:
    inner, source = model.inner, key_padding_mask.shape[1]
    shapes = ((L, WIDTH), (source, inner.kdim), (source, inner.vdim))
    order = (0, 1) if inner.batch_first else (1, 0)
    values = [torch.randn(N, length, width).permute(*order, 2).double() for length, width in shapes]
    return *values, attn_mask, key_padding_mask


def masks_of(kind: str, source: int) -> tuple[Tensor, Tensor]:
    if kind == "bool":
        return torch.rand(L, source) < 0.2, padding(N, source)
    if kind == "bool per head":
        return torch.rand(N * HEADS, L, source) < 0.2, padding(N, source)
    rows = () if kind == "numbers" else (N * HEADS,)
    return torch.randn(*rows, L, source).double(), torch.randn(N, source).double()


USED: list[Sequence[str]] = [(), ("attn_mask",), ("key_padding_mask",), ("attn_mask", "key_padding_mask")]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"batch_first": True, "dropout": 0.3},
    {"add_bias_kv": True, "bias": False},
    {"add_zero_attn": True, "batch_first": True},
    {"add_bias_kv": True, "add_zero_attn": True, "dropout": 0.3},
]


@pytest.mark.parametrize("kind", ["bool", "bool per head", "numbers", "numbers per head"])
@pytest.mark.parametrize("alone", [True, False])
def test_attention(kind: str, alone: bool) -> None:
    torch.manual_seed(1)
    weights = [{"need_weights": False}, {}, {"average_attn_weights": False}]
    for options, masks, call in itertools.product(OPTIONS, USED, weights):
        model = Attention(alone, {"masks": masks, **call}, **options).double()
        assert_same(model, *attention_inputs(model, *masks_of(kind, L if alone else S)))


@pytest.mark.parametrize("options", OPTIONS)
def test_attention_with_keys_and_values_of_other_widths(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    for masks in USED:
        model = Attention(False, {"masks": masks}, kdim=4, vdim=2, **options).double()
        assert_same(model, *attention_inputs(model, *masks_of("bool per head", S)))


@pytest.mark.parametrize("options", OPTIONS)
def test_attention_takes_the_causal_hint_as_torch_does(options: dict[str, Any]) -> None:
    """Where torch ignores the mask for the hint, so does the graph, even if the hint is wrong."""
    torch.manual_seed(1)
    for masks, need in itertools.product(USED[1::2], (True, False)):
        model = Attention(True, {"masks": masks, "is_causal": True, "need_weights": need}, **options).double()
        assert_same(model, *attention_inputs(model, *masks_of("bool", L)))


def test_attention_where_everything_is_masked() -> None:
    """Zeros without weights and NaN with them, as in torch."""
    for need in (True, False):
        model = Attention(True, {"masks": ("attn_mask",), "need_weights": need}).double()
        mask = torch.zeros(L, L).bool()
        mask[2] = True
        assert_same(model, *attention_inputs(model, mask, padding(N, L)))


def layer_options() -> list[dict[str, Any]]:
    """Batch first without dropout: torch's draws then follow the memory order of its transposed results."""
    return [
        {},
        {"norm_first": True, "batch_first": True, "dropout": 0.0},
        {"activation": "gelu", "bias": False},
        {"activation": torch.tanh, "norm_first": True, "dropout": 0.3},
        {"activation": nn.Hardswish(), "batch_first": True, "dropout": 0.0},
    ]


def sequences(batch_first: bool, *lengths: int) -> list[Tensor]:
    return [torch.randn(N, n, WIDTH).double() if batch_first else torch.randn(n, N, WIDTH).double() for n in lengths]


@pytest.mark.parametrize("options", layer_options())
@pytest.mark.parametrize("heads", [2, 3])
def test_encoder(options: dict[str, Any], heads: int) -> None:
    torch.manual_seed(1)
    layer = randomized(nn.TransformerEncoderLayer(WIDTH, heads, 8, **options))
    encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
    (x,) = sequences(options.get("batch_first", False), L)
    causal = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    for module in (layer.double(), encoder.double()):
        for mask, padded in itertools.product((None, causal, causal != 0), (None, padding(N, L))):
            if mask is not None and padded is not None:
                padded = padded if mask.dtype == torch.bool else torch.zeros(N, L).double()  # noqa: PLW2901
            model = Called(module, lambda m, x, mask, padded: m(x, mask, src_key_padding_mask=padded), mask, padded)
            assert_same(model, x)


class Called(nn.Module):
    """A module called with tensors that are its own: constants of the graph."""

    def __init__(self, inner: nn.Module, call: Callable[..., Any], *constants: Tensor | None) -> None:
        super().__init__()
        self.inner, self.call = inner, call
        for at, constant in enumerate(constants):
            self.register_buffer(f"constant_{at}", constant)

    def forward(self, x: Tensor) -> Any:
        return self.call(self.inner, x, *(getattr(self, f"constant_{at}") for at in range(len(self._buffers))))


def test_custom_layers_get_masks_of_numbers() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor, src_mask: Tensor, is_causal: bool, src_key_padding_mask: Tensor) -> Tensor:
            return (x * self.scale) @ x.transpose(1, 2) + src_mask.exp() + src_key_padding_mask.exp()[:, None]

    encoder = nn.TransformerEncoder(Adds(), 1, enable_nested_tensor=False).double()
    (x,) = sequences(True, L)
    model = Called(encoder, lambda m, x, *masks: m(x, *masks), torch.rand(L, L) < 0.5, padding(N, L))
    assert_same(model, x)


@pytest.mark.parametrize("options", layer_options())
def test_decoder(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    layer = randomized(nn.TransformerDecoderLayer(WIDTH, HEADS, 8, **options))
    decoder = nn.TransformerDecoder(layer, 2, nn.LayerNorm(WIDTH))
    x, memory = sequences(options.get("batch_first", False), L, S)
    constants = (memory, torch.ones(L, L).triu(1).bool(), torch.rand(L, S) < 0.2, padding(N, L), padding(N, S))
    for module in (layer.double(), decoder.double()):
        assert_same(Called(module, lambda m, x, memory: m(x, memory), memory), x)
        assert_same(Called(module, lambda m, x, *rest: m(x, *rest), *constants), x)
        assert_same(Called(module, lambda m, x, *rest: m(x, *rest, tgt_is_causal=True), memory, constants[1]), x)


@pytest.mark.parametrize("options", layer_options())
def test_transformer(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = randomized(nn.Transformer(WIDTH, HEADS, 1, 2, 8, **options)).double()
    x, y = sequences(options.get("batch_first", False), S, L)
    masks = (nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64), torch.randn(L, S).double())

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            length = y.shape[1 if self.inner.batch_first else 0]
            mask = nn.Transformer.generate_square_subsequent_mask(length, dtype=y.dtype)
            return self.inner(x, y, tgt_mask=mask, memory_mask=masks[1])

    assert_same(model, x, y)
    assert_same(Whole(), x, y)


RECURRENT: list[dict[str, Any]] = [
    {},
    {"batch_first": True, "bidirectional": True, "num_layers": 2, "dropout": 0.4},
    {"bias": False, "num_layers": 3},
]


@pytest.mark.parametrize("options", RECURRENT)
@pytest.mark.parametrize("kind", ["rnn", "relu", "gru", "lstm", "projected"])
def test_recurrent_layers(kind: str, options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    make: dict[str, Callable[..., nn.RNNBase]] = {
        "rnn": nn.RNN,
        "relu": lambda *sizes, **rest: nn.RNN(*sizes, nonlinearity="relu", **rest),
        "gru": nn.GRU,
        "lstm": nn.LSTM,
        "projected": lambda *sizes, **rest: nn.LSTM(*sizes, proj_size=2, **rest),
    }
    layer = make[kind](WIDTH, 3, **options).double()
    (x,) = sequences(layer.batch_first, L)
    assert_same(layer, x)
    layers = layer.num_layers * (2 if layer.bidirectional else 1)
    state = torch.randn(layers, N, layer.proj_size or 3).double()
    cell = torch.randn(layers, N, 3).double()
    if layer.mode == "LSTM":
        assert_same(Called(layer, lambda m, x, h, c: m(x, (h, c)), state, cell), x)
    else:
        assert_same(Called(layer, lambda m, x, h: m(x, h), state), x)


def test_a_recurrent_layer_is_one_call() -> None:
    """Per layer and direction, with its parameters in torch's order, for the rule that covers it."""
    layer = nn.LSTM(3, 2, num_layers=2, bidirectional=True)
    graph = capture(nn.Sequential(layer)).graph
    calls = [node for node in graph.nodes if node.target is lstm_layer]
    names = [node.target for call in calls for node in call.args[3:]]
    assert names == [f"0.{name}" for name in layer._flat_weights_names]
    assert [call.kwargs["reverse"] for call in calls] == [False, True, False, True]
    assert all(call.args[1:3] == (None, None) for call in calls)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(kind: Any, bias: bool) -> None:
    torch.manual_seed(1)
    cell = kind(WIDTH, 3, bias=bias).double()
    x, h, c = torch.randn(N, WIDTH).double(), torch.randn(N, 3).double(), torch.randn(N, 3).double()
    assert_same(cell, x)
    if kind is nn.LSTMCell:
        assert_same(Called(cell, lambda m, x, h, c: m(x, (h, c)), h, c), x)
    else:
        assert_same(Called(cell, lambda m, x, h: m(x, h), h), x)
    assert_same(nn.RNNCell(WIDTH, 3, bias=bias, nonlinearity="relu").double(), x)


@pytest.mark.parametrize("make", [parametrizations.weight_norm, nn.utils.weight_norm])
def test_recurrent_layers_with_normalised_weights(make: Callable[..., nn.Module]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        layer = make(nn.GRU(WIDTH, 3).double(), "weight_hh_l0")
    (x,) = sequences(False, L)
    assert_same(layer if make is parametrizations.weight_norm else nn.Sequential(layer), x)
    assert all(isinstance(weight, Tensor) for weight in layer._flat_weights)


def test_lists_that_a_forward_adds_to_are_put_back() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.seen = nn.Linear(3, 3), ["nothing"]

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(self.layer(x))
            return self.seen[-1]

    model = Remembers()
    capture(model)
    assert model.seen == ["nothing"]


class Packs(nn.Module):
    def __init__(self, pack: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.pack = nn.LSTM(3, 2, batch_first=True), pack

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.pack(x))[0].data


@pytest.mark.parametrize(
    "pack",
    [
        lambda x: pack_padded_sequence(x, torch.tensor([3, 2]), batch_first=True),
        lambda x: pack_padded_sequence(x, x[:, 0, 0].long(), batch_first=True, enforce_sorted=False),
        lambda x: pack_sequence([x[0], x[1]]),
        lambda x: PackedSequence(torch.ones(3, 3), torch.tensor([2, 1])),
    ],
)
def test_packed_sequences_are_refused(pack: Callable[[Tensor], Any]) -> None:
    with pytest.raises(
        perexfx.CaptureError,
        match=r"`Packs` could not be traced.* at test_traceable.py:\d+: packed sequences spread the examples over rows "
        r"by their lengths.* Pass the padded tensor to the recurrent layer",
    ):
        perexfx.transform(Packs(pack))


UNFIT: list[tuple[nn.Module, Callable[..., Any], str]] = [
    (nn.MultiheadAttention(4, 2), lambda m, x: m(x[0], x[0], x[0])[0], "one of them for the batch"),
    (nn.MultiheadAttention(4, 2, batch_first=True), lambda m, x: m(x[0], x[0], x[0])[0], "one of them for the batch"),
    (
        nn.MultiheadAttention(4, 2, batch_first=True),
        lambda m, x: m(x, x, x, attn_mask=x.new_zeros((5, 1)))[0],
        r"attn_mask should be of shape \[5, 5\] or \[6, 5, 5\], and is of shape \[5, 1\]",
    ),
    (
        nn.MultiheadAttention(4, 2, batch_first=True),
        lambda m, x: m(x, x, x, key_padding_mask=x.new_zeros((1, 5)))[0],
        r"key_padding_mask should be of shape \[3, 5\], and is of shape \[1, 5\]",
    ),
    (
        nn.MultiheadAttention(4, 2, batch_first=True),
        lambda m, x: m(x, m.in_proj_weight[None, :5], m.in_proj_weight[None, :5])[0],
        "the batch sizes of query and key differ: 3 and 1",
    ),
]


@pytest.mark.parametrize("at", range(len(UNFIT)))
def test_shapes_that_torch_refuses_are_refused(at: int) -> None:
    module, call, message = UNFIT[at]
    model = Called(module, call)
    x = torch.randn(3, 5, 4)
    with pytest.raises(perexfx.RefusedError, match=f"`attend` in module `inner` .*{message}"):
        perexfx.transform(model, x)


def test_a_causal_hint_needs_a_mask() -> None:
    model = Called(nn.MultiheadAttention(4, 2), lambda m, x: m(x, x, x, is_causal=True)[0])
    with pytest.raises(perexfx.CaptureError, match="Need attn_mask if specifying the is_causal hint"):
        perexfx.transform(model)


def test_attention_over_the_examples_is_refused() -> None:
    """The classic: a batch-first tensor in a module that is time-first."""
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0)
    with pytest.raises(perexfx.MixingError, match=r"`attend` in module `self_attn` .*attends over the example axis"):
        perexfx.transform(layer, torch.randn(3, 5, 4))
    weights = Called(nn.MultiheadAttention(4, 2), lambda m, x: m(x, x, x)[0])
    with pytest.raises(perexfx.MixingError, match="example"):
        perexfx.transform(weights, torch.randn(3, 5, 4))


def test_hooks_of_replaced_modules_run() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True))
    model[1].register_forward_pre_hook(lambda module, inputs: (inputs[0].square(),))
    model[1].register_forward_hook(lambda module, inputs, output: output * 3)
    assert_same(model.double(), torch.randn(2, 3, 5, 5).double())


def test_forwards_of_others_are_kept() -> None:
    class Doubled(nn.InstanceNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return F.instance_norm(input, weight=self.weight, bias=self.bias) * 2

    class Renamed(nn.GRU):
        pass

    patched = nn.GRU(2, 2)
    patched.forward = lambda input: input  # type: ignore[method-assign]
    assert forward_of(Doubled(3)) is None
    assert forward_of(patched) is None
    assert forward_of(Renamed(2, 2)) is not None
    assert "forward" not in vars(Renamed(2, 2))
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Doubled(3, affine=True))
    assert_same(model.double(), torch.randn(2, 3, 5, 5).double())


def test_normalisations_are_models_too() -> None:
    assert_same(nn.InstanceNorm1d(4, affine=True).double(), torch.randn(3, 4, 5).double())
    for layer in (nn.BatchNorm1d(4), nn.SyncBatchNorm(4)):
        frozen = layer.double().eval()
        x = torch.randn(3, 4).double()
        torch.testing.assert_close(perexfx.transform(frozen)(x), frozen(x))


def spectral(make: Callable[..., nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    layers = [make(nn.Conv2d(3, 4, 3), n_power_iterations=2), nn.Flatten(), make(nn.Linear(36, 2))]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("make", [parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_spectral_norm_in_training(make: Callable[..., nn.Module]) -> None:
    """Every forward moves the estimates as the model's would; the gradients are those at the moved ones."""
    model, twin = spectral(make), spectral(make)
    torch.manual_seed(0)
    batch = Batch((torch.randn(N, 3, 5, 5),), torch.randn(N)).double()

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return (output.sin().sum(1) * targets).sum() / targets.shape[0]

    gm = perexfx.transform(model, batch.inputs, clip_norm=None)
    before = [buffer.clone() for buffer in model.buffers()]
    for _ in range(3):
        assert_close(train_step(gm, batch, loss), train_step(twin, batch, loss), 1e-9, "gradients")
        assert_close(dict(model.named_buffers()), dict(twin.named_buffers()), 1e-9, "estimates")
    assert not all(torch.equal(old, new) for old, new in zip(before, model.buffers(), strict=True))
    frozen = twin.eval()
    assert_close({"norms": gm.perexfx.norms}, {"norms": norms_of(one_at_a_time(frozen, batch, loss))}, 1e-9, "norms")


def test_spectral_norm_keeps_still_in_eval_mode() -> None:
    model = spectral(parametrizations.spectral_norm)
    x = torch.randn(N, 3, 5, 5).double()
    gm = perexfx.transform(model)
    before = copy.deepcopy(dict(model.named_buffers()))
    torch.testing.assert_close(gm.eval()(x), model.eval()(x))
    assert_close(dict(model.named_buffers()), before, 0.0, "estimates")
    assert_same(
        nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 4), "bias")).double(), torch.randn(2, 3).double()
    )


@pytest.mark.parametrize("layer", [nn.LSTM(3, 3), nn.MultiheadAttention(3, 1)])
def test_spectral_norms_that_torch_moves_more_than_once_are_refused(layer: nn.Module) -> None:
    name = "weight_hh_l0" if isinstance(layer, nn.LSTM) else "in_proj_weight"
    model = nn.ModuleDict({"inner": parametrizations.spectral_norm(layer, name)})

    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> Tensor:
            return self.parts["inner"](x) if isinstance(layer, nn.LSTM) else self.parts["inner"](x, x, x)

    with pytest.raises(perexfx.CaptureError, match=r"in module `parts.inner`.*spectral norm .*several times"):
        perexfx.transform(Uses())


FUNCTIONS: list[tuple[nn.Module, Any]] = [
    (nn.Bilinear(3, 4, 2), F.bilinear),
    (nn.Sequential(nn.EmbeddingBag(5, 3)), F.embedding_bag),
    (nn.Sequential(nn.PReLU()), F.prelu),
    (nn.Sequential(nn.ConvTranspose1d(3, 4, 3, stride=2, output_padding=1)), F.conv_transpose1d),
    (nn.Sequential(nn.ConvTranspose2d(3, 4, 3)), F.conv_transpose2d),
    (nn.Sequential(nn.ConvTranspose3d(3, 4, 3)), F.conv_transpose3d),
]


@pytest.mark.parametrize("at", range(len(FUNCTIONS)))
def test_modules_that_are_one_function(at: int) -> None:
    model, function = FUNCTIONS[at]
    assert [node.target for node in capture(model).graph.nodes].count(function) == 1
