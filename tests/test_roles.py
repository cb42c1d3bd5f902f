"""Roles over small models of real architectures: what each layer is for, with no help from names."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch
from graphs import only, roles
from torch import nn

from qcompile.plan import ROLES, Site

QKVO = ROLES[:4]
DENSE = dict.fromkeys(["vocab_size"], 96) | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
DECODER = DENSE | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
}
T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
VIT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": 40,
}

ZOO: dict[str, tuple[str, dict[str, object], int, int, int]] = {
    "llama": ("LlamaForCausalLM", DECODER, 2, 1, 1),
    "qwen3": ("Qwen3ForCausalLM", DECODER | {"head_dim": 8}, 2, 1, 1),
    "gemma2": ("Gemma2ForCausalLM", DECODER | {"head_dim": 8}, 2, 1, 1),
    "phi3": ("Phi3ForCausalLM", DECODER, 2, 1, 1),
    "gpt2": ("GPT2LMHeadModel", GPT2, 2, 1, 1),
    "opt": ("OPTForCausalLM", OPT, 2, 1, 1),
    "gpt_neox": ("GPTNeoXForCausalLM", DENSE, 2, 1, 1),
    "bert": ("BertForMaskedLM", DENSE, 2, 1, 1),
    "vit": ("ViTForImageClassification", VIT, 2, 0, 0),
    "t5": ("T5ForConditionalGeneration", T5, 3, 2, 1),
    "t5_gated": ("T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu"}, 3, 2, 1),
}
"""Class, config, and how many attentions, token embeddings and language-model heads it has."""


def build(name: str, attention: str | None = None) -> nn.Module:
    import transformers

    class_name, config, *_ = ZOO[name]
    made = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = made(made.config_class(**config, attn_implementation=attention))
    return model.eval()


def inputs(name: str) -> dict[str, torch.Tensor]:
    ids = torch.arange(6).reshape(1, 6) + 5
    if name == "vit":
        return {"pixel_values": torch.zeros(1, 3, 16, 16)}
    return {"input_ids": ids, "decoder_input_ids": ids} if name.startswith("t5") else {"input_ids": ids}


@functools.cache
def zoo(name: str) -> dict[tuple[str, str], Site]:
    return only(build(name), **inputs(name))


@pytest.mark.parametrize("name", ZOO)
def test_every_attention_and_mlp_has_all_its_roles(name: str) -> None:
    """A role for each attention and each MLP, no more and no less, whether layers are fused or not."""
    sites = zoo(name)
    _, _, attentions, embeddings, heads = ZOO[name]
    mlps = 2 if name.startswith("t5") else attentions
    counted = Counter(role for site in sites.values() for role in site.roles)
    routers = 0
    expected = [attentions] * 4 + [mlps] * 3 + [embeddings, heads, routers]
    assert counted == {role: n for role, n in zip(ROLES, expected, strict=True) if n}
    assert sum(s.operator == "attention" for s in sites.values()) == attentions
    assert all(s.unsupported is None for s in sites.values() if s.is_linear)


@pytest.mark.parametrize("name", ZOO)
def test_every_matrix_is_reported(name: str) -> None:
    model, sites = build(name), zoo(name)
    reported = {s.parameter for s in sites.values()}
    matrices = {n: p for n, p in model.named_parameters() if p.dim() >= 2}
    assert set(matrices) <= reported
    for site in sites.values():
        if site.is_linear and site.parameter in matrices:
            shape = tuple(matrices[site.parameter].shape)
            assert site.shape == (shape[::-1] if site.transposed else shape)


def test_llama_roles_are_exact() -> None:
    layer = {f"self_attn.{x}_proj": {f"attention.{x}_proj"} for x in "qkvo"}
    layer |= {f"mlp.{x}_proj": {f"mlp.{x}_proj"} for x in ("gate", "up", "down")}
    expected = {f"model.layers.{i}.{n}": r for i in range(2) for n, r in layer.items()}
    assert roles(zoo("llama")) == expected | {"model.embed_tokens": {"embed_tokens"}, "lm_head": {"lm_head"}}
    attention = zoo("llama")["model.layers.1.self_attn", "attention"]
    assert attention.shape == (1, 4, 6, 8) and attention.weight is None


def test_gpt2_is_transposed_fused_and_tied() -> None:
    sites, found = zoo("gpt2"), roles(zoo("gpt2"))
    block = "transformer.h.0"
    assert found[f"{block}.attn.c_attn"] == set(QKVO[:3])
    assert found[f"{block}.attn.c_proj"] == {"attention.o_proj"}
    assert found[f"{block}.mlp.c_fc"] == {"mlp.gate_proj", "mlp.up_proj"}
    assert found[f"{block}.mlp.c_proj"] == {"mlp.down_proj"}
    assert "transformer.wpe" not in found
    fused = sites[f"{block}.attn.c_attn", "addmm"]
    assert fused.shape == (96, 32) and fused.transposed
    head, table = sites["lm_head", "linear"], sites["transformer.wte", "embedding"]
    assert head.weight == table.weight and head.storage == table.storage and not head.transposed


def test_phi3_fuses_qkv_and_gate_up() -> None:
    found = roles(zoo("phi3"))
    assert found["model.layers.1.self_attn.qkv_proj"] == set(QKVO[:3])
    assert found["model.layers.1.mlp.gate_up_proj"] == {"mlp.gate_proj", "mlp.up_proj"}


def test_bert_roles_without_usual_names() -> None:
    found = roles(zoo("bert"))
    layer = "bert.encoder.layer.1"
    assert found[f"{layer}.attention.output.dense"] == {"attention.o_proj"}
    assert found[f"{layer}.intermediate.dense"] == {"mlp.gate_proj", "mlp.up_proj"}
    assert found[f"{layer}.output.dense"] == {"mlp.down_proj"}
    assert "cls.predictions.transform.dense" not in found
    assert found["cls.predictions.decoder"] == {"lm_head"}


def test_gated_gelu_written_out_tells_gate_from_up() -> None:
    found = roles(zoo("t5_gated"))
    assert found["encoder.block.0.layer.1.DenseReluDense.wi_0"] == {"mlp.gate_proj"}
    assert found["encoder.block.0.layer.1.DenseReluDense.wi_1"] == {"mlp.up_proj"}
    assert found["decoder.block.0.layer.1.EncDecAttention.k"] == {"attention.k_proj"}


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_attention_written_out_has_the_same_roles(name: str) -> None:
    eager = only(build(name, attention="eager"), **inputs(name))
    assert roles(eager) == roles(zoo(name))
    assert {k for k in eager if k[1] == "attention"} == {k for k in zoo(name) if k[1] == "attention"}


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_dynamic_shapes_change_no_role(name: str) -> None:
    """Sizes are nodes then, and ways along them would join layers that share nothing."""
    assert roles(only(build(name), dynamic=True, **inputs(name))) == roles(zoo(name))


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_positions_and_types_given_as_inputs_are_no_tokens(name: str) -> None:
    given = inputs(name) | {
        "position_ids": torch.arange(6)[None],
        "token_type_ids": torch.zeros(1, 6, dtype=torch.long),
    }
    assert roles(only(build(name), **given)) == roles(zoo(name))
