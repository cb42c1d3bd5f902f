"""How fast are whole layers? Two layers of Llama-3-8B's shape in bf16: one token, and a prompt of 256, against Inductor."""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import torch
from torch import nn

from .shapes import llama_layers

LAYERS = 2
POLICIES = ("int8", "int4", "int8_dynamic", "int4_dynamic")
ROUNDS = {1: 21, 256: 7}
"""Rounds for each number of tokens; in each round every candidate runs once."""


def run() -> list[dict[str, Any]]:
    """Medians over interleaved rounds; ``ratio`` is bf16's median over the policy's, spreads are quartiles of rounds' ratios."""
    torch._dynamo.config.recompile_limit = 64  # one entry for each policy and number of tokens
    floats = llama_layers(LAYERS)
    models: dict[str, nn.Module] = {"bf16": torch.compile(floats, dynamic=False)}
    rows = []
    with torch.no_grad():
        for policy in POLICIES:
            model = copy.deepcopy(floats)
            models[policy] = torch.compile(model, backend="qcompile", options={"policy": policy}, dynamic=False)
        for tokens, rounds in ROUNDS.items():
            ids = torch.randint(0, 256, (1, tokens))
            times: dict[str, list[float]] = {name: [] for name in models}
            for name in models:  # compile, then warm
                models[name](ids, use_cache=False)
                models[name](ids, use_cache=False)
            for _ in range(rounds):
                for name, model in models.items():
                    start = time.perf_counter()
                    model(ids, use_cache=False)
                    times[name].append(time.perf_counter() - start)
            for name, own in times.items():
                ratios = [a / b for a, b in zip(times["bf16"], own, strict=True)]
                low, _, high = statistics.quantiles(ratios, n=4)
                rows.append({"tokens": tokens, "policy": name, "ms": 1e3 * statistics.median(own),
                             "ratio": statistics.median(ratios), "low": low, "high": high})  # fmt: skip
    return rows
