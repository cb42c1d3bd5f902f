"""Real models' shapes with random weights."""

from __future__ import annotations

import torch
from torch import nn

LLAMA_3_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
              "head_dim": 128, "max_position_embeddings": 8192}  # fmt: skip
"""Per-layer sizes of Llama-3-8B (its published config.json)."""

LLAMA_3_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8,
               "head_dim": 128, "max_position_embeddings": 8192}  # fmt: skip
"""Per-layer sizes of Llama-3-70B (its published config.json)."""

QWEN3_06B = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8,
             "head_dim": 128, "max_position_embeddings": 8192}  # fmt: skip
"""Per-layer sizes of Qwen3-0.6B (its published config.json)."""

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 8192}  # fmt: skip
"""A decoder's layer of next to no bytes: what compiling and running takes by itself."""


def llama_layers(layers: int, dtype: torch.dtype = torch.bfloat16, sizes: dict[str, int] = LLAMA_3_8B) -> nn.Module:
    """``layers`` decoder layers of ``sizes`` with random weights, made in ``dtype`` directly, without embeddings of note (a
    vocabulary of 256)."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(num_hidden_layers=layers, vocab_size=256, attn_implementation="sdpa", **sizes)
    with torch.device("meta"):
        model = LlamaModel(config).to(dtype)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype) * 0.02)
        for module in model.modules():  # buffers that to_empty left unset
            if hasattr(module, "inv_freq"):
                half = config.head_dim // 2
                module.inv_freq = 1.0 / 10000 ** (torch.arange(half) / half)
                module.original_inv_freq = module.inv_freq
    return model.eval()
