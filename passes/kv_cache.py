"""Switches the model that a graph belongs to to packed KV caches, the cache of the call under way included."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn


def packs_caches(root: nn.Module | None, formats: Any) -> bool:
    """Makes the Hugging Face model ``root``, or the outermost inside it, keep keys and values in ``formats``; returns whether
    anything changed, so that the graph must be traced again.

    Raises :class:`~qcompile.errors.OptionError` for a model that is none of Hugging Face's.
    """
    if formats is None or root is None:
        return False
    from qcompile.hf_cache import PackedLayer, packed_, switch_

    model = next((m for m in root.modules() if hasattr(m, "set_attn_implementation")), root)
    if getattr(model, "_qcompile_kv_cache", None) == formats:
        return False
    switch_(model, formats)
    for cache in _caches_under_way():
        if not any(isinstance(layer, PackedLayer) for layer in cache.layers):
            packed_(cache, formats)
    return True


def _caches_under_way() -> Iterator[Any]:
    """Caches among the arguments of the frame that Dynamo is tracing."""
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from transformers.cache_utils import Cache

    values = list(InstructionTranslator.current_tx().output.root_tx.f_locals.values())
    for value in values:
        if isinstance(value, Mapping):
            values += value.values()
        elif isinstance(value, (tuple, list)):
            values += [v for v in value if isinstance(v, Cache)]
        elif isinstance(value, Cache):
            yield value
