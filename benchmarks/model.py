"""How fast are whole layers? Two layers of Llama-3-8B's shape in bf16: one token, and a prompt of 256, against Inductor."""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from typing import Any

import torch

from qcompile.formats import Scheme, get

from . import peers
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
    ours = {}
    for name, policy in POLICIES.items():
        ours[name] = copy.deepcopy(floats)
        models[name] = _ours(ours[name], policy)
    others = (peers.of_torch(floats), peers.of_torchao(floats), peers.of_llama_cpp(floats, torch.get_num_threads()))
    models |= dict(itertools.chain(*others))
    rows = []
    with torch.no_grad():
        for tokens, rounds in ROUNDS.items():
            times = _interleaved(models, torch.randint(0, 256, (1, tokens)), rounds)
            for name, own in times.items():
                ratios = [a / b for a, b in zip(times["bf16"], own, strict=True)]
                low, _, high = statistics.quantiles(ratios, n=4)
                row = {"tokens": tokens, "policy": name, "ms": 1e3 * statistics.median(own), "ratio": statistics.median(ratios),
                       "low": low, "high": high}  # fmt: skip
                rows.append(row | ({"bytes": _bytes(ours[name]) / _bytes(floats)} if name in ours else {}))
    return rows


def _ours(model: torch.nn.Module, policy: Any) -> peers.Model:
    run = torch.compile(model, backend="qcompile", options={"policy": policy}, dynamic=False)
    return lambda ids: run(ids, use_cache=False)


def _bytes(model: torch.nn.Module) -> int:
    return sum(getattr(p, "packed_nbytes", p.nbytes) for p in model.parameters())


def _interleaved(models: dict[str, peers.Model], ids: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    for model in models.values():  # compile, then warm
        model(ids), model(ids)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            start = time.perf_counter()
            model(ids)
            times[name].append(time.perf_counter() - start)
    return times
