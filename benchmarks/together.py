"""What does it save that layers with one input are one call? Decoder layers in bf16, with and without, over the same weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from qcompile import inductor

from .shapes import LLAMA_3_8B, QWEN3_06B, llama_layers

MODELS = {"Llama-3-8B": (LLAMA_3_8B, 2), "Qwen3-0.6B": (QWEN3_06B, 4)}
"""Sizes, and how many layers of them."""
POLICIES = ("int8", "int4", "int8_dynamic", "Q4_K")
ROUNDS = {1: 61, 8: 31, 256: 9}
"""Rounds for each number of tokens; in each round both run once."""


def run() -> list[dict[str, Any]]:
    """Medians over interleaved rounds, and the ratio: apart over together in the same round, with its quartiles."""
    torch._dynamo.config.recompile_limit = 64
    rows = []
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):  # they do not know what is apart
        for name, (sizes, layers) in MODELS.items():
            for policy in POLICIES:
                model = llama_layers(layers, sizes=sizes)
                both = [torch.compile(model, backend=b, options={"policy": policy}, dynamic=False) for b in ("qcompile", _apart)]
                for tokens, rounds in ROUNDS.items():
                    rows.append({"model": name, "policy": policy, "tokens": tokens, **_measured(both, tokens, rounds)})
    return rows


def _apart(gm: torch.fx.GraphModule, inputs: list[Any], **kwargs: Any) -> Callable[..., Any]:
    """The backend, with a call for each layer."""
    with mock.patch.object(inductor, "together", lambda node, known: [node]):
        compiled: Callable[..., Any] = torch._dynamo.lookup_backend("qcompile")(gm, inputs, **kwargs)
    return compiled


def _measured(both: list[Callable[..., Any]], tokens: int, rounds: int) -> dict[str, float]:
    ids = torch.randint(0, 256, (1, tokens))
    first, second = (model(ids, use_cache=False).last_hidden_state for model in both)  # compiles
    assert torch.equal(first, second)
    times: list[list[float]] = [[], []]
    for turn in range(rounds):
        for i in (turn % 2, 1 - turn % 2):
            start = time.perf_counter()
            both[i](ids, use_cache=False)
            times[i].append(1e3 * (time.perf_counter() - start))
    together, apart = map(statistics.median, times)
    low, ratio, high = statistics.quantiles([b / a for a, b in zip(*times, strict=True)], n=4)
    return {"together_ms": together, "apart_ms": apart, "ratio": ratio, "low": low, "high": high}
