"""Packed keys and values inside Hugging Face models: cache layers, the attention function that reads them, and the switch.

A model whose attention implementation is :data:`NAME` calls :func:`attention`; its cache's layers hand themselves over
in place of key and value tensors, so that no decoded copy of a cache ever exists.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .errors import OptionError
from .kv_cache import KVCache

NAME = "qcompile"
"""The attention implementation, as ``model.set_attn_implementation`` takes it."""


class PackedLayer(CacheLayerMixin):
    """A cache layer whose keys and values are stored packed in ``packed``."""

    packed: KVCache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.device = key_states.device
        self.packed.allocate(key_states, value_states)
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Appends the new tokens; what attention gets in place of keys and values is this layer."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.packed.append(key_states, value_states)
        return self, self

    @property
    def batch_size(self) -> int:
        return self.packed.keys[0].shape[0] if self.packed.keys else -1

    def get_seq_length(self) -> Any:
        return self.packed.dropped + self.packed.length

    def get_mask_sizes(self, query_length: int) -> tuple[Any, int]:
        drop = self.packed.to_drop(query_length)
        return self.packed.length - drop + query_length, self.packed.dropped + drop

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.packed.clear()
        self.is_initialized = bool(self.packed.keys)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the number of tokens to remove as a negative integer")
        if self.is_initialized:
            self.packed.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self.is_initialized:
            self.packed.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.packed.select(torch.arange(self.batch_size, device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            self.packed.select(indices)

    def offload(self) -> None:
        raise OptionError("kv_cache: packed layers stay on their device; use cache_implementation 'dynamic' or 'static', not an "
                          "offloaded one")  # fmt: skip


class PackedDynamicLayer(PackedLayer, DynamicLayer):
    """Grows as it fills, up to a window and a half of a layer with a sliding ``window`` (0: none). ``formats`` as
    :func:`qcompile.kv_cache.formats_of` takes them."""

    def __init__(self, formats: object = "fp8", window: int = 0) -> None:
        CacheLayerMixin.__init__(self)
        self.packed = KVCache(formats, window=window)
        self.is_sliding = window > 0

    def activate_past_recording(self) -> None:
        """Whatever comes from now on may be cropped."""
        self.packed.revocable = True


class PackedStaticLayer(PackedLayer, StaticLayer):
    """Has room for ``max_cache_len`` tokens; its position is a tensor, so that one graph serves every length."""

    def __init__(self, max_cache_len: int, formats: object = "fp8") -> None:
        CacheLayerMixin.__init__(self)
        self.max_cache_len = max_cache_len
        self.packed = KVCache(formats, max_cache_len)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        PackedLayer.lazy_initialization(self, key_states, value_states)
        if not torch.compiler.is_compiling():
            for tensor in (*self.packed.keys, *self.packed.values, self.packed.center, self.packed.length):
                torch._dynamo.mark_static_address(tensor)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_max_length(self) -> int:
        return self.max_cache_len


def packed_(cache: Cache, formats: object) -> Cache:
    """``cache`` with packed layers in place of its attention layers, what they hold quantized; layers of other kinds stay. Those
    with a sliding window drop what is behind it, static ones too, as they go on."""
    inner = getattr(cache, "self_attention_cache", cache)
    if inner.layer_class_to_replicate is DynamicLayer:
        inner.layer_class_to_replicate = functools.partial(PackedDynamicLayer, formats)
    for i, layer in enumerate(inner.layers):
        kind = type(layer)
        if kind in (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer):
            inner.layers[i] = _packed_layer(layer, formats)
    return cache


def _packed_layer(layer: Any, formats: object) -> PackedLayer:
    if type(layer) is StaticLayer:
        packed: PackedLayer = PackedStaticLayer(layer.max_cache_len, formats)
    else:
        static = isinstance(layer, StaticSlidingWindowLayer)  # its memory is the window
        packed = PackedDynamicLayer(formats, layer.max_cache_len if static else getattr(layer, "sliding_window", 0))
    if getattr(layer, "record_past", False):
        packed.packed.revocable = True
    if layer.is_initialized and (length := int(layer.get_seq_length())):
        held = min(length, layer.keys.shape[-2])
        packed.update(layer.keys[:, :, :held], layer.values[:, :, :held])
        packed.packed.dropped = length - held
    return packed


def attention(
    module: nn.Module, query: torch.Tensor, key: Any, value: Any, attention_mask: torch.Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, softcap: float | None = None, sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention of ``query [B, Hq, L, D]`` over a :class:`PackedLayer` → ``[B, L, Hq, Dv]``; over plain tensors, torch's."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not isinstance(key, PackedLayer):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                                      is_causal=is_causal, softcap=softcap, **kwargs)  # fmt: skip
    if kwargs.get("position_bias") is not None or kwargs.get("s_aux") is not None:
        raise OptionError("kv_cache: packed attention takes no position bias and no attention sinks; compile without kv_cache")
    window = None if key.packed.window else sliding_window or 0
    out = key.packed.attend(query, attention_mask, causal, scaling, softcap or 0.0, window)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _prepare_cache(self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
    """``generate`` of a switched model: prepares a cache as ever, then packs it."""
    type(self)._prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs)
    for value in model_kwargs.values():
        if isinstance(value, Cache) and not any(isinstance(layer, PackedLayer) for layer in value.layers):
            packed_(value, self._qcompile_kv_cache)


def switch_(model: nn.Module, formats: object) -> nn.Module:
    """Makes a Hugging Face ``model`` keep keys and values packed in every cache that its ``generate`` makes, and read packed
    caches that are passed to it. Raises :class:`OptionError` for a model without selectable attention."""
    if not hasattr(model, "set_attn_implementation"):
        raise OptionError(f"kv_cache: {type(model).__name__} is no Hugging Face model; use qcompile.KVCache in its attention")
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    model._qcompile_kv_cache = formats  # type: ignore[assignment]
    model._prepare_cache_for_generation = types.MethodType(_prepare_cache, model)  # type: ignore[assignment]
    return model
