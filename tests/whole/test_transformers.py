"""Models of `transformers`, from random tiny configurations, and of PEFT: against one example at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import perexfx
from tests.support.oracle import assert_close, norms_of, weighted

transformers = pytest.importorskip("transformers", reason="the dev extra has it")
peft = pytest.importorskip("peft", reason="the dev extra has it")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # the libraries' own

TOLERANCE = 1e-6  # some of these models compute norms in float32 whatever their dtype
N, LENGTH = 4, 7
TEXT = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LONG = {**TEXT, "max_position_embeddings": 30}
Inputs = dict[str, Any]


def tokens(n: int = N, length: int = LENGTH, *, masked: bool = True) -> Inputs:
    """Ids with padding of another length in every example."""
    ids = torch.randint(3, 50, (n, length))
    if not masked:
        return {"input_ids": ids}
    lengths = torch.arange(n) % 3
    mask = (torch.arange(length)[None] < length - lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


def causal(n: int = N, length: int = LENGTH) -> Inputs:
    return {**tokens(n, length), "use_cache": False}


def causal_without_mask(n: int = N, length: int = LENGTH) -> Inputs:
    return {**tokens(n, length, masked=False), "use_cache": False}


def translation(n: int = N, length: int = LENGTH) -> Inputs:
    return {**causal(n, length), "decoder_input_ids": torch.randint(3, 50, (n, length - 2))}


def images(n: int = N, length: int = LENGTH) -> Inputs:
    return {"pixel_values": torch.randn(n, 3, 32, 32)}


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=30, eos_token_id=1)
    return transformers.GPT2LMHeadModel(config)


def gpt2_classifier() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=30, pad_token_id=0, eos_token_id=1
    )
    return transformers.GPT2ForSequenceClassification(config)


def distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(
        vocab_size=50, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=30
    )
    return transformers.DistilBertForSequenceClassification(config)


def opt() -> nn.Module:
    config = transformers.OPTConfig(
        vocab_size=50,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=30,
        word_embed_proj_dim=32,
    )
    return transformers.OPTForCausalLM(config)


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return transformers.T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    sizes = {name: size for name, size in TEXT.items() if name != "vocab_size"}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=32, patch_size=8))


def convnext() -> nn.Module:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], image_size=32)
    return transformers.ConvNextForImageClassification(config)


def lora() -> nn.Module:
    """Low-rank adapters on the attention of a frozen GPT-2."""
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["c_attn", "c_proj"], lora_dropout=0.1, fan_in_fan_out=True
    )
    model = peft.get_peft_model(gpt2(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, and then the other factor has no gradient
            nn.init.normal_(parameter, std=0.1)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Inputs]]] = {
    "gpt2": (gpt2, causal),
    "gpt2_without_mask": (gpt2, causal_without_mask),
    "gpt2_classifier": (gpt2_classifier, causal),
    "bert": (lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**LONG)), tokens),
    "bert_tied": (lambda: transformers.BertForMaskedLM(transformers.BertConfig(**LONG)), tokens),
    "roberta": (lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**LONG)), tokens),
    "albert": (
        lambda: transformers.AlbertForSequenceClassification(transformers.AlbertConfig(**LONG, embedding_size=16)),
        tokens,
    ),
    "distilbert": (distilbert, tokens),
    "llama": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LONG, num_key_value_heads=2)), causal),
    "qwen2": (lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**LONG, num_key_value_heads=2)), causal),
    "opt": (opt, causal),
    "t5": (t5, translation),
    "vit": (vit, images),
    "convnext": (convnext, images),
    "lora": (lora, causal),
}


def build(name: str) -> nn.Module:
    """In training mode, with dropout that never drops: one example at a time would drop others."""
    torch.manual_seed(0)
    model = MODELS[name][0]().double().train()
    for module in model.modules():
        for attribute, value in vars(module).items():
            if "drop" in attribute and isinstance(value, float):
                setattr(module, attribute, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def batch(name: str, n: int = N, length: int = LENGTH) -> Inputs:
    torch.manual_seed(1)
    given = MODELS[name][1](n, length)
    return {key: value.double() if key == "pixel_values" else value for key, value in given.items()}


def loss(output: Any) -> Tensor:
    logits = output.logits
    rows = logits.reshape(logits.shape[0], -1)
    return (rows.square().sum(1) / 10 + rows.sin().sum(1)).mean()


def one_at_a_time(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    n = next(value for value in inputs.values() if isinstance(value, Tensor)).shape[0]
    rows = []
    for i in range(n):
        single = {key: value[i : i + 1] if isinstance(value, Tensor) else value for key, value in inputs.items()}
        found = torch.autograd.grad(loss(model(**single)), list(named.values()), allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(named.values(), found, strict=True)])
    return {name: torch.stack([row[at] for row in rows]) for at, name in enumerate(named)}


def check(gm: nn.Module, model: nn.Module, inputs: Inputs, clip_norm: float) -> None:
    gradients = one_at_a_time(model, inputs)
    norms = norms_of(gradients)
    model.zero_grad(set_to_none=True)
    loss(gm(**inputs)).backward()
    found = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}
    factors = (clip_norm / norms).clamp(max=1) / len(norms)
    assert_close({"norms": gm.perexfx.norms}, {"norms": norms}, TOLERANCE, "norms")
    assert_close({name: found[name] for name in gradients}, weighted(gradients, factors), TOLERANCE, "gradients")


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str) -> None:
    model, inputs = build(name), batch(name)
    clip_norm = float(norms_of(one_at_a_time(model, inputs)).median())
    gm = perexfx.transform(model, inputs, clip_norm=clip_norm)
    expected, found = model(**inputs), gm(**inputs)
    assert type(found) is type(expected)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-9, atol=1e-9)
    check(gm, model, inputs, clip_norm)
    check(gm, model, batch(name, n=7), clip_norm)
    check(gm, model, batch(name, n=1), clip_norm)


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "t5", "lora"])
def test_other_lengths(name: str) -> None:
    model = build(name)
    gm = perexfx.transform(model, batch(name))
    check(gm, model, batch(name, length=11), 1.0)


def test_dropout_follows_the_mode() -> None:
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=30, eos_token_id=1)
    ).double()
    inputs = batch("gpt2")
    gm = perexfx.transform(model.train(), inputs)
    assert not torch.equal(gm(**inputs).logits, gm(**inputs).logits)
    gm.eval()
    torch.testing.assert_close(gm(**inputs).logits, model.eval()(**inputs).logits)
    assert torch.equal(gm(**inputs).logits, gm(**inputs).logits)


def test_frozen_backbones_have_no_sites() -> None:
    gm = perexfx.transform(build("lora"), batch("lora"))
    assert {name.split(".")[-3] for site in gm.perexfx.sites for name in site.parameters} == {"lora_A", "lora_B"}
