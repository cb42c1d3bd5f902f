"""Small models as GGUF files, written with the ``gguf`` package by the rules of llama.cpp's converter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType

from qcompile.checkpoints.gguf_blocks import to_blocks
from qcompile.formats import get, reference

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
         "vocab_size": 160, "max_position_embeddings": 64}  # fmt: skip
"""Rows of 256, the blocks of K types."""

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 128}),
    "gemma": ("Gemma", {"head_dim": 64}),
    "gemma2": ("Gemma2", {"head_dim": 128, "query_pre_attn_scalar": 128, "sliding_window": 16}),
    "gemma3": ("Gemma3Text", {"head_dim": 128, "query_pre_attn_scalar": 128, "sliding_window": 16, "num_hidden_layers": 6}),
    "phi2": ("Phi", {"partial_rotary_factor": 0.5}),
    "phi3": ("Phi3", {"sliding_window": None, "pad_token_id": 0}),
}
"""The class's name without its end, and what differs from :data:`SIZES`, by architecture in GGUF (Mistral is llama there)."""

CLASSES = {"Gemma3Text": "Gemma3"}


def model_of(kind: str, **changes: Any) -> Any:
    """Float32, eval mode, always the same weights."""
    torch.manual_seed(0)
    name, more = MODELS[kind]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **more, **changes})
    model = getattr(transformers, f"{CLASSES.get(name, name)}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn(parameter.shape) / 4 + (0 if "Gemma" in name else 1))
    return model


def pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head's two halves, taken in turns."""
    each = len(rows) // heads
    order = [h * each + half * (each // 2) + i for h in range(heads) for i in range(each // 2) for half in range(2)]
    return rows[order]


def write_gguf(
    path: Path, model: Any, kind: str, types: Callable[[str], str], edit: Callable[[gguf.GGUFWriter], None] | None = None
) -> Path:
    """Writes ``model`` with its matrices in ``types(name of the tensor)``, and gives it the weights that they stand for."""
    arch = "llama" if kind == "mistral" else kind
    config, writer = model.config, gguf.GGUFWriter(path, arch)
    layers = config.num_hidden_layers
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head)
    writer.add_rope_dimension_count(int(head * {"phi2": 0.5}.get(kind, 1)))
    if kind == "phi2":
        writer.add_layer_norm_eps(config.layer_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1e6 if kind == "gemma3" else 10000.0)
    if kind in ("gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(config, key) is not None:
                writer.add_float32(f"{arch}.{key}", getattr(config, key))
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    writer.add_array("tokenizer.ggml.scores", [0.5 * i for i in range(config.vocab_size)])
    if edit is not None:
        edit(writer)
    names = gguf.get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == arch), layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert theirs is not None, name
            write_tensor(writer, theirs, parameter, kind, types, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tensor(
    writer: gguf.GGUFWriter, name: str, parameter: torch.Tensor, kind: str, types: Callable[[str], str], config: Any
) -> None:
    if parameter.dim() == 1:
        value = parameter.numpy() + (1 if "gemma" in kind and name.endswith("norm.weight") else 0)
        data, type_name = value.astype(np.float32), "F32"
    else:
        type_name = types(name)
        if type_name in ("F32", "F16"):
            data = parameter.numpy().astype({"F32": np.float32, "F16": np.float16}[type_name])
            parameter.copy_(torch.from_numpy(data.astype(np.float32)))
        else:
            planes = reference.quantize(get(type_name), parameter)
            data = to_blocks(type_name, planes, *parameter.shape).numpy()
            parameter.copy_(torch.from_numpy(gguf.quants.dequantize(data, GGMLQuantizationType[type_name])))
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get((name.split(".") * 3)[2])
    if kind in ("llama", "mistral") and heads is not None:
        data = pairs(data, heads)
    writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=GGMLQuantizationType[type_name])


def mixture(name: str) -> str:
    """Several types in one file."""
    return {"token_embd": "Q6_K", "output": "Q8_0", "attn_v": "F16", "ffn_down": "Q5_K", "attn_q": "Q4_0"}.get(
        name.split(".")[-2], "Q4_K"
    )
