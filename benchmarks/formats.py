"""How fast is every weight format? A 4096×14336 layer, from one row to 1024, against compiled bf16 in the same run."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch

from qcompile.formats import REGISTRY
from qcompile.formats.reference import quantize

from . import cpu_linear

N, K = 4096, 14336


def run() -> list[dict[str, Any]]:
    """Every registered format: see :mod:`benchmarks.cpu_linear`; ``bits`` a weight, and ``quantize_s``, the seconds that
    quantizing the weight took, once, on all threads."""
    results = cpu_linear.measure(N, K, schemes=tuple(REGISTRY), seconds=0.5)
    bits = {name: float(spec.bits_per_weight(N, K)) for name, spec in REGISTRY.items()} | {"baseline": 16.0}
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    rows = []
    for result in results:
        row = dataclasses.asdict(result) | {"bits": bits[result.scheme]}
        if result.scheme in REGISTRY and result.rows == 1:
            start = time.perf_counter()
            quantize(REGISTRY[result.scheme], weight)
            row["quantize_s"] = time.perf_counter() - start
        rows.append(row)
    return rows
