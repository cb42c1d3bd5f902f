"""What llama.cpp and Hugging Face call the parts of a model, and where the two compute on different numbers.

Names of tensors are the ``gguf`` package's own map. A GGUF file holds a model's configuration under keys of its architecture;
llama.cpp's ``convert_hf_to_gguf.py`` says which, and which weights it changes: rows of q and k of Llama are reordered from
halves of a head (rotary embedding of x[i], x[i + d/2]) to pairs (x[2i], x[2i + 1]), and Gemma's norms are stored plus 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

from ..errors import CorruptCheckpointError, UnsupportedCheckpointError
from .gguf_header import FLOATS, Header, Tensor

Get = Callable[..., Any]
"""``get(key, default)``: a value of the metadata; the architecture's name stands before the key."""

COMMON = {
    "max_position_embeddings": "context_length", "hidden_size": "embedding_length", "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length", "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
}  # fmt: skip
"""Names in a Hugging Face configuration, and in GGUF."""

SCALING = "rope.scaling.type"
"""The one key of a configuration that is no number."""

GEMMA_27B = {"gemma2": 46, "gemma3": 62}
"""Layers of the models whose attention is scaled by hidden size / heads, and not by a head's size."""


@dataclass(frozen=True)
class Architecture:
    """``model_type`` and class in transformers; ``more(get, tensors)`` gives further entries of the configuration; ``pairs``: q
    and k are reordered; ``plus_one``: norms are stored plus 1; ``epsilon``: GGUF's key for the norms' epsilon and the name in
    the configuration; ``windows``: every how many layers one attends beyond its window (0: no windows, or all alike)."""

    model_type: str
    model_class: str
    more: Callable[[Get, Mapping[str, Any]], dict[str, Any]]
    pairs: bool = False
    plus_one: bool = False
    epsilon: tuple[str, str] = ("attention.layer_norm_rms_epsilon", "rms_norm_eps")
    windows: int = 0


def _llama(get: Get, tensors: Mapping[str, Any]) -> dict[str, Any]:
    head = get("rope.dimension_count", get("attention.key_length", get("embedding_length") // get("attention.head_count")))
    return {"head_dim": head, "attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}


def _qwen3(get: Get, tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {"head_dim": get("attention.key_length", 128), "attention_bias": "blk.0.attn_q.bias" in tensors}


def _gemma(get: Get, tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {"head_dim": get("attention.key_length", 256)}


def _gemma_scaled(name: str) -> Callable[[Get, Mapping[str, Any]], dict[str, Any]]:
    def more(get: Get, tensors: Mapping[str, Any]) -> dict[str, Any]:
        head, big = get("attention.key_length", 256), get("block_count") == GEMMA_27B[name]
        return {
            "head_dim": head, "sliding_window": get("attention.sliding_window", 4096),
            "query_pre_attn_scalar": get("embedding_length") // get("attention.head_count") if big else head,
            "attn_logit_softcapping": get("attn_logit_softcapping"),
            "final_logit_softcapping": get("final_logit_softcapping"),
        }  # fmt: skip

    return more


def _gemma3(get: Get, tensors: Mapping[str, Any]) -> dict[str, Any]:
    return _gemma_scaled("gemma3")(get, tensors) | {"rope_local_base_freq": float(get("rope.freq_base_swa", 10000.0))}


def _phi2(get: Get, tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {"partial_rotary_factor": get("rope.dimension_count", 32) * get("attention.head_count") / get("embedding_length")}


def _phi3(get: Get, tensors: Mapping[str, Any]) -> dict[str, Any]:
    head = get("embedding_length") // get("attention.head_count")
    made = {"partial_rotary_factor": get("rope.dimension_count", head) / head, "sliding_window": get("attention.sliding_window"),
            "original_max_position_embeddings": get("rope.scaling.original_context_length", get("context_length"))}  # fmt: skip
    factors = {n: tensors[name] for n in ("long", "short") if (name := f"rope_factors_{n}.weight") in tensors}
    if len(factors) == 2:
        made["rope_scaling"] = {"type": "longrope", "rope_type": "longrope"} | {
            f"{n}_factor": _vector(t) for n, t in factors.items()
        }
    return made


def _vector(tensor: Tensor) -> list[float]:
    if tensor.type not in FLOATS or len(tensor.shape) != 1:
        raise CorruptCheckpointError(f"{tensor.name}: expected a vector of floats, found {tensor.type} {list(tensor.shape)}")
    values: list[float] = tensor.stored.read().double().tolist()
    return values


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", "LlamaForCausalLM", _llama, pairs=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", lambda get, tensors: {}),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _qwen3),
    "gemma": Architecture("gemma", "GemmaForCausalLM", _gemma, plus_one=True),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", _gemma_scaled("gemma2"), plus_one=True, windows=2),
    "gemma3": Architecture("gemma3_text", "Gemma3ForCausalLM", _gemma3, plus_one=True, windows=6),
    "phi2": Architecture("phi", "PhiForCausalLM", _phi2, epsilon=("attention.layer_norm_epsilon", "layer_norm_eps")),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", _phi3),
}
"""By ``general.architecture``. Mistral's models are "llama" there."""

MODEL_TYPES = {a.model_type: name for name, a in ARCHITECTURES.items()} | {"mistral": "llama"}
"""``model_type`` of a configuration → architecture in GGUF."""


def architecture_of(header: Header) -> tuple[str, Architecture]:
    """Raises :class:`UnsupportedCheckpointError` for one that is not in :data:`ARCHITECTURES`."""
    name = header.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UnsupportedCheckpointError(f"{header.path}: architecture {name!r} is not read; {', '.join(ARCHITECTURES)} are")
    return name, ARCHITECTURES[name]


def config_of(header: Header) -> dict[str, Any]:
    """The Hugging Face configuration of a file, as JSON types. Raises :class:`CorruptCheckpointError` naming the key that is not
    there or of another type than it must be."""
    name, architecture = architecture_of(header)

    def get(key: str, default: Any = None) -> Any:
        found = header.get(f"{name}.{key}", default)
        if key != SCALING and found is not None and (type(found) not in (int, float) or not 0 <= found < 2**31):
            raise CorruptCheckpointError(f"{name}.{key}: expected a number that is not negative, found {str(found)[:80]}")
        return found

    for key in COMMON.values():
        found = get(key) if key != "attention.head_count_kv" else get(key, get("attention.head_count"))
        if type(found) is not int or found < 1:
            raise CorruptCheckpointError(f"{name}.{key}: expected a positive whole number, found {found}")
    config = {ours: get(key, get("attention.head_count")) for ours, key in COMMON.items()}
    embeddings = header.tensors.get("token_embd.weight")
    if embeddings is None:
        raise CorruptCheckpointError(f"token_embd.weight: not in {header.path}")
    if len(embeddings.shape) != 2 or embeddings.shape[1] != config["hidden_size"]:
        raise CorruptCheckpointError(f"token_embd.weight: {list(embeddings.shape)}, but {name}.{COMMON['hidden_size']} is "
                                     f"{config['hidden_size']}")  # fmt: skip
    config |= architecture.more(get, header.tensors)
    key, ours = architecture.epsilon
    config |= {ours: get(key, 1e-6), "rope_theta": float(get("rope.freq_base", 10000.0))}
    config |= _scaling(get, config) | _special_tokens(header)
    tied = "output.weight" not in header.tensors
    return config | {"model_type": architecture.model_type, "architectures": [architecture.model_class],
                     "vocab_size": embeddings.shape[0], "tie_word_embeddings": tied, "dtype": "float32"}  # fmt: skip


def _scaling(get: Get, config: Mapping[str, Any]) -> dict[str, Any]:
    """Stretched rotary embeddings."""
    kind, factor = get(SCALING, "none"), get("rope.scaling.factor")
    if "rope_scaling" in config or kind in ("none", "longrope") or factor is None:
        return {}
    if kind not in ("linear", "yarn"):
        raise UnsupportedCheckpointError(f"rope.scaling.type {str(kind)[:80]!r} is not read; linear, yarn and longrope are")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": float(factor)}
    if kind == "yarn" and get("rope.scaling.original_context_length") is not None:
        scaling["original_max_position_embeddings"] = get("rope.scaling.original_context_length")
    return {"rope_scaling": scaling}


def _special_tokens(header: Header) -> dict[str, Any]:
    keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    found = {ours: header.get(f"tokenizer.ggml.{key}_token_id") for ours, key in keys.items()}
    return {ours: value if type(value) is int else None for ours, value in found.items()}


def gguf_names(architecture: str, layers: int, names: list[str]) -> dict[str, str]:
    """Parameter → tensor, for those ``names`` that the ``gguf`` package has a name for."""
    kind = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    mapped = get_tensor_name_map(kind, layers)
    found = {n: mapped.get_name(n, try_suffixes=(".weight", ".bias")) for n in names}
    return {n: g for n, g in found.items() if g is not None}


def to_halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k from pairs (GGUF) to halves of each head (Hugging Face)."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of :func:`to_halves`."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
