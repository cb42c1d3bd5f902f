"""How fast are whole layers? Two layers of Llama-3-8B's shape in bf16: one token, and a prompt of 256, against Inductor."""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from qcompile.evaluation import parameter_bytes
from qcompile.formats import Scheme, get

from . import peers, readme
from .shapes import llama_layers

LAYERS = 2
POLICIES: dict[str, Any] = {
    "int8": "int8", "int4": "int4", "fp8": "fp8", "nf4": "nf4", "Q8_0": "Q8_0", "Q4_0": "Q4_0", "Q4_K": "Q4_K",
    "int8_dynamic": "int8_dynamic", "int4_dynamic": "int4_dynamic",
    **{f"{name}, int8 activations": {"*": Scheme(get(name), "int8")} for name in ("Q8_0", "Q4_0", "Q4_K")},
}  # fmt: skip
ROUNDS = {1: 31, 256: 9}
"""Rounds for each number of tokens; in each round every candidate runs once."""


def run() -> list[dict[str, Any]]:
    """Medians over interleaved rounds; ``ratio`` is bf16's median over the candidate's, spreads are quartiles of rounds'
    ratios; ``bytes`` those of the layers' parameters over bf16's."""
    for name in peers.missing():
        print(f"{name} is not installed: left out")
    torch._dynamo.config.recompile_limit = 64  # one entry for each policy and number of tokens
    floats = llama_layers(LAYERS)
    models: dict[str, peers.Model] = {"bf16": peers.compiled(floats)}
    packed = {}
    for name, policy in POLICIES.items():
        packed[name] = copy.deepcopy(floats)
        models[name] = ours(packed[name], policy)
    others = (peers.of_torch(floats), peers.of_torchao(floats), peers.of_llama_cpp(floats, torch.get_num_threads()))
    models |= dict(itertools.chain(*others))
    rows = []
    with torch.no_grad():
        for tokens, rounds in ROUNDS.items():
            times = interleaved(models, torch.randint(0, 256, (1, tokens)), rounds)
            for name, own in times.items():
                row = {"tokens": tokens, "policy": name, "ms": 1e3 * statistics.median(own)} | spread(times["bf16"], own)
                if name in packed:
                    row["bytes"] = parameter_bytes(packed[name]) / parameter_bytes(floats)
                rows.append(row)
    return rows


def spread(base: list[float], own: list[float]) -> dict[str, float]:
    """Median and quartiles of what ``base`` took over what ``own`` took in the same round."""
    low, middle, high = statistics.quantiles((a / b for a, b in zip(base, own, strict=True)), n=4)
    return {"ratio": middle, "low": low, "high": high}


def ours(model: torch.nn.Module, policy: Any) -> peers.Model:
    """``model`` under ``policy``, without a cache of keys and values."""
    run = torch.compile(model, backend="qcompile", options={"policy": policy}, dynamic=False)
    return lambda ids: run(ids, use_cache=False)


def interleaved(models: dict[str, peers.Model], ids: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of every model in each of ``rounds`` rounds."""
    for model in models.values():  # compile, then warm
        model(ids), model(ids)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            start = time.perf_counter()
            model(ids)
            times[name].append(time.perf_counter() - start)
    return times


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """README's table of ``rows``: how many times as fast as bf16."""
    found = {(row["tokens"], row["policy"]): row for row in rows}
    lines = ["| | bytes | one token | a prompt of 256 |", "|---|---|---|---|"]
    for tokens, name in found:
        if tokens == 1 and name != "bf16":
            one, many = found[1, name], found[256, name]
            label, size = (f"qcompile {name}", f"{one['bytes']:.2f}") if "bytes" in one else (name, "")
            lines.append(f"| {label} | {size} | {one['ratio']:.2f}× | {many['ratio']:.2f}× |")
    return "\n".join(lines) + "\n"


def publish(rows: Iterable[Mapping[str, Any]]) -> None:
    """Puts the table of ``rows`` into README."""
    readme.put("model", table(rows))
