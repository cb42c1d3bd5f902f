"""A zoo of architectures with random tiny weights: what a user may bring to the one line.

Import as ``from zoo import ANIMALS``; every entry makes a model in eval mode and the arguments of one call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn

WIDTH, VOCABULARY, TOKENS = 64, 128, 8
BASE = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY, "pad_token_id": 0}
ENCODER = {**BASE, "intermediate_size": 96, "max_position_embeddings": 64}
LLAMA = {**ENCODER, "num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
VISION = {**BASE, "intermediate_size": 96, "image_size": 32, "patch_size": 16}


@dataclass(frozen=True)
class Animal:
    """One architecture: its ``kind``, how to make it, and what to call it with. ``in_ci``: among those that every run of
    the tests looks at."""

    kind: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]] = field(repr=False)
    in_ci: bool = True


def ids(tokens: int = TOKENS) -> dict[str, Any]:
    return {"input_ids": torch.arange(1, tokens + 1).reshape(1, tokens) % VOCABULARY}


def prompt() -> dict[str, Any]:
    return {**ids(), "use_cache": False}


def pair() -> dict[str, Any]:
    return {**ids(), "decoder_input_ids": ids(5)["input_ids"], "use_cache": False}


def picture(size: int = 32) -> dict[str, Any]:
    return {"pixel_values": torch.linspace(-1, 1, 3 * size * size).reshape(1, 3, size, size)}


def image(size: int = 64) -> dict[str, Any]:
    """torchvision's models call their one argument x."""
    return {"x": picture(size)["pixel_values"]}


def sound() -> dict[str, Any]:
    return {"input_values": torch.linspace(-1, 1, 2000).sin().reshape(1, 2000)}


def spoken() -> dict[str, Any]:
    return {"input_features": torch.linspace(-1, 1, 80 * 60).reshape(1, 80, 60), "decoder_input_ids": ids(5)["input_ids"],
            "use_cache": False}  # fmt: skip


def hugging_face(model: str, config: str, **fields: Any) -> Callable[[], nn.Module]:
    """A model of transformers by the names of its class and of its configuration's."""

    def make() -> nn.Module:
        made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**fields))
        return made

    return make


def causal(name: str, **fields: Any) -> Callable[[], nn.Module]:
    return hugging_face(f"{name}ForCausalLM", f"{name}Config", **fields)


def vision(name: str, **fields: Any) -> Callable[[], nn.Module]:
    """A model of torchvision. Its architectures are Python; an operator that its import names is declared where its library
    does not fit this build of torch."""

    def make() -> nn.Module:
        folder = str(Path(sys.prefix) / "torchvision")
        if folder not in sys.path:
            sys.path.append(folder)
            _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        from torchvision import models

        made: nn.Module = getattr(models, name)(**fields)
        return made

    return make


_library = torch.library.Library("torchvision", "FRAGMENT")


class DiffusionBlock(nn.Module):
    """A block of a diffusion transformer: norms whose shift, scale and gate follow from the time step, attention over
    patches, attention over a text, an MLP."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.to_q, self.to_kv, self.to_out = nn.Linear(width, width), nn.Linear(48, 2 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(time)[:, None].chunk(6, -1)
        q, k, v = self.qkv(self.norm1(x) * (1 + scale1) + shift1).chunk(3, -1)
        x = x + gate1 * self.proj(self._attend(q, k, v))
        x = x + self.to_out(self._attend(self.to_q(x), *self.to_kv(text).chunk(2, -1)))
        y = self.fc2(F.gelu(self.fc1(self.norm2(x) * (1 + scale2) + shift2), approximate="tanh"))
        return x + gate2 * y

    def _attend(self, *qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in qkv)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class DiffusionTransformer(nn.Module):
    """Patches of a picture, a time step and a text's features through blocks, and back to a picture."""

    def __init__(self, width: int = WIDTH, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(4, width, 2, 2)
        self.position = nn.Parameter(torch.zeros(1, 16, width))
        self.time = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(DiffusionBlock(width) for _ in range(depth))
        self.last = nn.Linear(width, 16)

    def forward(self, latents: torch.Tensor, step: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        angles = step[:, None] * torch.exp(-torch.arange(16) * 0.5)
        time = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        x = self.patches(latents).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x, time, text)
        return self.last(x).transpose(1, 2).unflatten(2, (4, 4))


def noise() -> dict[str, Any]:
    return {"latents": torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8), "step": torch.tensor([3.0]),
            "text": torch.linspace(-1, 1, 240).reshape(1, 5, 48)}  # fmt: skip


GPT2 = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64}
SEQ2SEQ = {"d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
           "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
           "pad_token_id": 0}  # fmt: skip
T5 = {"d_model": WIDTH, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY,
      "decoder_start_token_id": 0}  # fmt: skip
SPEECH = {**BASE, "intermediate_size": 96, "conv_dim": (32, 32), "conv_kernel": (10, 3), "conv_stride": (5, 2),
          "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}  # fmt: skip

ANIMALS: dict[str, Animal] = {
    "llama": Animal("decoder", causal("Llama", **LLAMA), prompt),
    "mistral": Animal("decoder", causal("Mistral", **LLAMA), prompt, in_ci=False),
    "qwen2": Animal("decoder", causal("Qwen2", **LLAMA), prompt, in_ci=False),
    "qwen3": Animal("decoder", causal("Qwen3", **LLAMA), prompt),
    "gemma2": Animal("decoder", causal("Gemma2", **LLAMA), prompt, in_ci=False),
    "gemma3": Animal("decoder", hugging_face("Gemma3ForCausalLM", "Gemma3TextConfig", **LLAMA), prompt),
    "phi3": Animal("decoder", causal("Phi3", **LLAMA), prompt),
    "gpt2": Animal("decoder", hugging_face("GPT2LMHeadModel", "GPT2Config", **GPT2), prompt),
    "gpt_neox": Animal("decoder", causal("GPTNeoX", **ENCODER), prompt, in_ci=False),
    "gptj": Animal("decoder", causal("GPTJ", **GPT2, rotary_dim=8), prompt, in_ci=False),
    "opt": Animal("decoder", causal("OPT", **BASE, ffn_dim=96, max_position_embeddings=64, word_embed_proj_dim=WIDTH), prompt),
    "bloom": Animal("decoder", causal("Bloom", hidden_size=WIDTH, n_layer=2, n_head=4, vocab_size=VOCABULARY), prompt),
    "falcon": Animal("decoder", causal("Falcon", **BASE), prompt),
    "mpt": Animal("decoder", causal("Mpt", d_model=WIDTH, n_layers=2, n_heads=4, vocab_size=VOCABULARY), prompt, in_ci=False),
    "stablelm": Animal("decoder", causal("StableLm", **LLAMA), prompt, in_ci=False),
    "olmo2": Animal("decoder", causal("Olmo2", **LLAMA), prompt, in_ci=False),
    "cohere": Animal("decoder", causal("Cohere", **LLAMA), prompt, in_ci=False),
    "starcoder2": Animal("decoder", causal("Starcoder2", **LLAMA), prompt, in_ci=False),
    "mamba": Animal("state space", causal("Mamba", hidden_size=WIDTH, num_hidden_layers=2, vocab_size=VOCABULARY, state_size=8),
                    prompt),
    "mixtral": Animal("mixture of experts", causal("Mixtral", **LLAMA, num_local_experts=4), prompt),
    "qwen3_moe": Animal("mixture of experts", causal("Qwen3Moe", **LLAMA, **EXPERTS), prompt, in_ci=False),
    "gpt_oss": Animal("mixture of experts", causal("GptOss", **LLAMA, num_local_experts=4, num_experts_per_tok=2), prompt),
    "bert": Animal("encoder", hugging_face("BertModel", "BertConfig", **ENCODER), ids),
    "roberta": Animal("encoder", hugging_face("RobertaModel", "RobertaConfig", **ENCODER), ids, in_ci=False),
    "distilbert": Animal("encoder", hugging_face("DistilBertModel", "DistilBertConfig", dim=WIDTH, n_layers=2, n_heads=4,
                                                 hidden_dim=96, vocab_size=VOCABULARY), ids, in_ci=False),
    "albert": Animal("encoder", hugging_face("AlbertModel", "AlbertConfig", **ENCODER, embedding_size=32), ids),
    "deberta": Animal("encoder", hugging_face("DebertaV2Model", "DebertaV2Config", **ENCODER, relative_attention=True,
                                              pos_att_type=["p2c", "c2p"], position_buckets=8), ids),
    "modernbert": Animal("encoder", hugging_face("ModernBertModel", "ModernBertConfig", **ENCODER), ids),
    "t5": Animal("encoder–decoder", hugging_face("T5ForConditionalGeneration", "T5Config", **T5), pair),
    "bart": Animal("encoder–decoder", hugging_face("BartForConditionalGeneration", "BartConfig", **SEQ2SEQ), pair),
    "marian": Animal("encoder–decoder", hugging_face("MarianMTModel", "MarianConfig", **SEQ2SEQ), pair, in_ci=False),
    "whisper": Animal("audio", hugging_face("WhisperForConditionalGeneration", "WhisperConfig", **SEQ2SEQ, num_mel_bins=80,
                                            max_source_positions=30, max_target_positions=32), spoken),
    "wav2vec2": Animal("audio", hugging_face("Wav2Vec2Model", "Wav2Vec2Config", **SPEECH), sound),
    "hubert": Animal("audio", hugging_face("HubertModel", "HubertConfig", **SPEECH), sound, in_ci=False),
    "vit": Animal("vision", hugging_face("ViTModel", "ViTConfig", **VISION), picture, in_ci=False),
    "dinov2": Animal("vision", hugging_face("Dinov2Model", "Dinov2Config", **VISION), picture, in_ci=False),
    "swin": Animal("vision", hugging_face("SwinModel", "SwinConfig", image_size=32, patch_size=4, embed_dim=16, depths=[1, 1],
                                          num_heads=[2, 2], window_size=4), picture),
    "clip": Animal("vision", hugging_face("CLIPVisionModel", "CLIPVisionConfig", **VISION), picture),
    "vit_b (torchvision)": Animal("vision", vision("VisionTransformer", image_size=32, patch_size=16, num_layers=2, num_heads=4,
                                                   hidden_dim=WIDTH, mlp_dim=96, num_classes=10), lambda: image(32)),
    "resnet18 (torchvision)": Animal("vision", vision("resnet18"), image),
    "convnext (torchvision)": Animal("vision", vision("convnext_tiny"), image, in_ci=False),
    "swin_t (torchvision)": Animal("vision", vision("swin_t"), image, in_ci=False),
    "mobilenet_v3 (torchvision)": Animal("vision", vision("mobilenet_v3_small"), image, in_ci=False),
    "diffusion transformer": Animal("diffusion", DiffusionTransformer, noise),
}  # fmt: skip
