"""How fast is one token through many layers? Eight of Llama-3-8B's shape in GGUF's formats, beside llama.cpp's own.

A model of two layers, as in the benchmark ``model``, spends more of a token outside of layers than one of 32 does. Activations
are quantized to int8 under names that end in ``_dynamic``, as llama.cpp does in all of its products.
What the memory gives is read in every round too: virtual machines get more or less of it from one minute to the next.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from qcompile.evaluation import parameter_bytes
from qcompile.formats import huge_pages

from . import peers, readme
from .model import interleaved, ours, spread
from .shapes import llama_layers

LAYERS = 8
FORMATS = ("Q8_0", "Q4_0", "Q4_K")
ROUNDS = 31
READ = 2**30
"""Bytes that a round reads plainly."""


def run() -> list[dict[str, Any]]:
    """Medians over interleaved rounds; ``over llama.cpp`` is the median of the rounds' ratios in the same format. ``GB/s`` are
    those of packed parameters, or of plain reading."""
    for name in peers.missing():
        print(f"{name} is not installed: left out")
    torch._dynamo.config.recompile_limit = 64  # one entry for each policy
    ids = torch.zeros(1, 1, dtype=torch.int64)
    floats = llama_layers(LAYERS)
    models: dict[str, peers.Model] = {"bf16": peers.compiled(floats)}
    memory = huge_pages.empty((READ // 8,), torch.int64, torch.device("cpu")).zero_()
    models["plain read"] = lambda ids: memory.sum()
    sizes = {"plain read": READ}
    with torch.no_grad():
        for name in (*(f"{f}_dynamic" for f in FORMATS), *FORMATS):
            packed = copy.deepcopy(floats)
            models[name] = ours(packed, name)
            models[name](ids)  # from here on without its float weights
            sizes[name] = parameter_bytes(packed)
        models |= dict(peers.of_llama_cpp(floats, torch.get_num_threads()))
        times = interleaved(models, ids, ROUNDS)
    rows = []
    for name, own in times.items():
        row: dict[str, Any] = {"policy": name, "ms": 1e3 * statistics.median(own)} | spread(times["bf16"], own)
        if name in sizes:
            row |= {"bytes": sizes[name] / parameter_bytes(floats), "GB/s": sizes[name] / statistics.median(own) / 1e9}
        if theirs := times.get(f"llama.cpp {name.removesuffix('_dynamic')}"):
            row["over llama.cpp"] = statistics.median(a / b for a, b in zip(theirs, own, strict=True))
        rows.append(row)
    return rows


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """README's table of ``rows``."""
    lines = ["| | ms | over bf16 | GB/s | over llama.cpp, same format |", "|---|---|---|---|---|"]
    for row in rows:
        read = row["policy"] == "plain read"
        rate = f"{row['GB/s']:.0f}" if "GB/s" in row else ""
        ratio = "" if read else f"{row['ratio']:.2f}×"
        theirs = f"{row['over llama.cpp']:.2f}×" if "over llama.cpp" in row else ""
        name = f"qcompile {row['policy']}" if "bytes" in row and not read else row["policy"]
        lines.append(f"| {name} | {row['ms']:.1f} | {ratio} | {rate} | {theirs} |")
    return "\n".join(lines) + "\n"


def publish(rows: Iterable[Mapping[str, Any]]) -> None:
    """Puts the table of ``rows`` into README."""
    readme.put("decode", table(rows))
