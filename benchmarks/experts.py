"""How fast is a mixture of experts? One layer of transformers' Mixtral, ours against compiled bf16 in the same run.

All candidates are timed in turn, round after round. Inputs are random, so tokens go to all experts evenly, and differ in every
round, so that no expert is found in a cache because the last round read it.
"""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import torch
from torch import nn

SHAPES = {
    "Mixtral 8x7B, half the width": {"hidden_size": 2048, "intermediate_size": 7168, "num_local_experts": 8,
                                     "num_experts_per_tok": 2},
    "Qwen3-30B-A3B, half the experts": {"hidden_size": 2048, "intermediate_size": 768, "num_local_experts": 64,
                                        "num_experts_per_tok": 8},
}  # fmt: skip
POLICIES = ("int8", "int8_dynamic", "int4")
TOKENS = (1, 64)
SECONDS = 20.0
"""For all rounds of one number of tokens."""


def run() -> list[dict[str, Any]]:
    """One row for each shape, number of tokens and policy."""
    return [row for name in SHAPES for row in _measured(name)]


def _layer(name: str) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(**SHAPES[name])
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    layer: nn.Module = MixtralSparseMoeBlock(config).eval().bfloat16()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return layer


@torch.no_grad()
def _measured(name: str) -> list[dict[str, Any]]:
    torch._dynamo.reset()
    layer, width = _layer(name), SHAPES[name]["hidden_size"]
    calls: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for policy in POLICIES:
        own = copy.deepcopy(layer)
        calls[policy] = torch.compile(own, backend="qcompile", options={"policy": policy}, dynamic=False)
        for tokens in TOKENS:
            calls[policy](torch.randn(1, tokens, width, dtype=torch.bfloat16))
        sizes[policy] = sum(getattr(p, "packed_nbytes", p.nbytes) for p in own.parameters())
    calls["bf16"] = torch.compile(layer, dynamic=False)
    full = sum(p.nbytes for p in layer.parameters())
    rows = []
    for tokens in TOKENS:
        times = _rounds(calls, tokens, width)
        for policy in POLICIES:
            ratios = sorted(b / o for b, o in zip(times["bf16"], times[policy], strict=True))
            quarter = len(ratios) // 4
            rows.append({"layer": name, "tokens": tokens, "policy": policy, "bytes": sizes[policy] / full,
                         "bf16 ms": 1e3 * statistics.median(times["bf16"]), "ms": 1e3 * statistics.median(times[policy]),
                         "ratio": statistics.median(ratios), "low": ratios[quarter], "high": ratios[-1 - quarter],
                         "rounds": len(ratios)})  # fmt: skip
    return rows


def _rounds(calls: dict[str, Any], tokens: int, width: int) -> dict[str, list[float]]:
    """Seconds of every call in every round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(torch.randn(1, tokens, width, dtype=torch.bfloat16))
    until = time.perf_counter() + SECONDS
    while time.perf_counter() < until or len(times["bf16"]) < 5:
        x = torch.randn(1, tokens, width, dtype=torch.bfloat16)
        for name, call in calls.items():
            began = time.perf_counter()
            call(x)
            times[name].append(time.perf_counter() - began)
    return times
