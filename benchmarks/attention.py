"""How fast does one token attend to a packed cache, and how exactly? Llama-3-8B's heads over growing contexts, against bf16 in
the same run.

``sdpa`` is ``F.scaled_dot_product_attention(…, enable_gqa=True)`` over bf16 keys and values, as Hugging Face models call it;
``folded`` is the same product with the queries of a group as rows of one head, the fastest that torch has for it here.
Errors are relative (Frobenius), of the output of 32 queries that see all tokens, against float64 attention over the float keys
and values: normal ones; keys around 50 in three channels; one number of a thousand by ten deviations more, in queries too
(FlashAttention-3, arXiv:2407.08608); three channels of twenty times the size, and one number of a thousand of thirty times.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from qcompile.kv_cache import KVCache

HEADS, GROUP, SIZE = 8, 4, 128
"""Heads of keys, queries to each, and their size, in Llama-3-8B."""
CONTEXTS = (1024, 4096, 8192, 32768)
FORMATS: dict[str, Any] = {
    **{name: name for name in ("fp8", "fp8_e4m3", "int8", "int4")}, "keys int8, values int4": ("int8", "int4"),
}
COLD_BYTES = 128 << 20
"""Copies of a cache that are used in rotation add up to at least this much, so that none is found in a processor's cache."""


def _calls(tokens: int) -> dict[str, list[Callable[[torch.Tensor], torch.Tensor]]]:
    k, v = (torch.randn(1, HEADS, tokens, SIZE, dtype=torch.bfloat16) for _ in range(2))
    copies = max(2, -(-COLD_BYTES // (2 * k.nbytes)))
    pairs = [(k.clone(), v.clone()) for _ in range(copies)]
    calls: dict[str, list[Callable[[torch.Tensor], torch.Tensor]]] = {
        "sdpa": [lambda q, p=p: F.scaled_dot_product_attention(q, *p, enable_gqa=True) for p in pairs],
        "folded": [lambda q, p=p: F.scaled_dot_product_attention(q.view(1, HEADS, GROUP, SIZE), *p) for p in pairs],
    }  # fmt: skip
    for name, formats in FORMATS.items():
        packed = []
        for _ in range(2 * copies):
            cache = KVCache(formats, capacity=tokens)
            cache.append(k, v)
            packed.append(cache)
        calls[name] = [lambda q, c=c: c.attend(q) for c in packed]
    return calls


def bytes_over_bf16(name: str, tokens: int) -> float:
    """Bytes of a cache, over those in bf16."""
    if name not in FORMATS:
        return 1.0
    cache = KVCache(FORMATS[name], capacity=tokens)
    cache.allocate(torch.empty(1, HEADS, tokens, SIZE), torch.empty(1, HEADS, tokens, SIZE))
    return cache.nbytes / (4 * HEADS * tokens * SIZE)


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def _biased(*shape: int) -> torch.Tensor:
    x = torch.randn(*shape)
    x[..., [7, 33, 50]] += torch.tensor([50.0, -50.0, 50.0])
    return x


def _heavy(*shape: int) -> torch.Tensor:
    return torch.randn(*shape) + torch.where(torch.rand(shape) < 1e-3, 10 * torch.randn(*shape), 0.0)


def _outliers(*shape: int) -> torch.Tensor:
    x = torch.randn(*shape)
    x[..., [3, 17, 40]] *= 20
    return torch.where(torch.rand(shape) < 1e-3, 30 * x, x)


def _error(
    formats: Any, tokens: int, keys: Callable[..., torch.Tensor], values: Callable[..., torch.Tensor],
    queries: Callable[..., torch.Tensor] = torch.randn,
) -> float:  # fmt: skip
    torch.manual_seed(0)
    k, v, q = keys(1, HEADS, tokens, SIZE), values(1, HEADS, tokens, SIZE), queries(1, HEADS * GROUP, 32, SIZE)
    cache = KVCache(formats)
    cache.append(k, v)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
    return float((cache.attend(q, causal=False) - exact).norm() / exact.norm())


def _errors(formats: Any, tokens: int) -> dict[str, float]:
    return {"error": _error(formats, tokens, _normal, _normal), "with a bias": _error(formats, tokens, _biased, _normal),
            "heavy tails": _error(formats, tokens, _heavy, _heavy, _heavy),
            "with outliers": _error(formats, tokens, _outliers, _outliers)}  # fmt: skip


@torch.inference_mode()
def run() -> list[dict[str, Any]]:
    """Medians over interleaved rounds; ``speedup`` and ``over folded`` are medians of the rounds' ratios."""
    rows = []
    for tokens in CONTEXTS:
        calls, q = _calls(tokens), torch.randn(1, HEADS * GROUP, 1, SIZE, dtype=torch.bfloat16)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(31):
            for name, own in calls.items():
                start = time.perf_counter()
                own[turn % len(own)](q)
                if turn:  # the first builds
                    times[name].append(time.perf_counter() - start)
        for name, own in times.items():
            over = {base: statistics.median(a / b for a, b in zip(times[base], own, strict=True)) for base in ("sdpa", "folded")}
            rows.append({"tokens": tokens, "cache": name, "bytes": bytes_over_bf16(name, tokens),
                         "ms": 1e3 * statistics.median(own), "speedup": over["sdpa"], "over folded": over["folded"],
                         **(_errors(FORMATS[name], tokens) if name in FORMATS else {})})  # fmt: skip
    return rows
