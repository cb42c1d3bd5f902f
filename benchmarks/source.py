"""FP16 against FP8, INT8, INT4 (GPTQ), INT4 (AWQ), Q4_K_M, NF4: memory and tokens a second on layers of Llama-3-8B and 70B."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from .shapes import LLAMA_3_8B, LLAMA_3_70B, llama_layers

MODELS = (("Llama-3-8B", LLAMA_3_8B, 32, 2), ("Llama-3-70B", LLAMA_3_70B, 80, 1))
"""Name, sizes of a layer, layers of the model, layers measured."""

POLICIES = {"FP8": "fp8", "INT8": "int8", "INT4 (GPTQ)": "int4_zp_g128", "INT4 (AWQ)": "int4_zp_g128", "Q4_K_M": "Q4_K_M",
            "NF4": "nf4"}  # fmt: skip
"""Files of GPTQ and AWQ hold one kind of weight, 4-bit codes with integer zero points: they run on one kernel."""

ROUNDS = 21


def run() -> list[dict[str, Any]]:
    """One token without a cache through the measured layers, everything in turns: medians, and ratios in the same round to
    FP16 and to BF16 under Inductor. ``GB`` is of all layers of the model (embeddings and head apart), from the bytes of those
    measured."""
    rows = []
    for name, sizes, layers, measured in MODELS:
        torch.compiler.reset()
        with torch._dynamo.config.patch(recompile_limit=64):  # one class, compiled once for each kind of weights
            rows += _model(name, sizes, layers, measured)
    return rows


def _model(name: str, sizes: dict[str, int], layers: int, measured: int) -> list[dict[str, Any]]:
    ids = torch.ones(1, 1, dtype=torch.long)
    made: dict[str, Any] = {}
    for label, dtype in (("FP16", torch.float16), ("BF16", torch.bfloat16)):
        model = llama_layers(measured, dtype, sizes)
        made[label] = (torch.compile(model, dynamic=False), _nbytes(model))
    for label, policy in POLICIES.items():
        model = llama_layers(measured, torch.bfloat16, sizes)
        compiled = torch.compile(model, backend="qcompile", options={"policy": policy}, dynamic=False)
        with torch.no_grad():
            compiled(ids, use_cache=False)
        made[label] = (compiled, _nbytes(model))
        assert made[label][1] < 0.6 * made["FP16"][1], f"{label} was not packed"
    times: dict[str, list[float]] = {label: [] for label in made}
    with torch.no_grad():
        for turn in range(ROUNDS + 3):
            for label, (compiled, _) in made.items():
                start = time.perf_counter()
                compiled(ids, use_cache=False)
                if turn >= 3:
                    times[label].append(time.perf_counter() - start)
    rows = []
    for label, (_, nbytes) in made.items():
        seconds = statistics.median(times[label])
        row = {"model": name, "weights": label, "GB": nbytes * layers / measured / 1e9, "bytes": nbytes / made["FP16"][1],
               "ms a layer": 1e3 * seconds / measured, "tokens/s": measured / layers / seconds}  # fmt: skip
        for base in ("FP16", "BF16"):
            ratios = [b / own for b, own in zip(times[base], times[label], strict=True)]
            row[f"over {base}"] = statistics.median(ratios)
        rows.append(row)
    return rows


def _nbytes(model: torch.nn.Module) -> int:
    return sum(getattr(p, "packed_nbytes", p.nbytes) for name, p in model.named_parameters() if "embed" not in name)
