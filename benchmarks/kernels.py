"""What would the GPU kernels take? No GPU is needed: they are compiled for one, their machine code is read, and a roofline says
what bounds each. An estimate, not a measurement: latency, launches and caches are not in it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

SCHEMES = ("int8", "int4_g128", "fp8_e4m3", "nf4", "mxfp4", "nvfp4", "Q4_K", "Q8_0", "Q6_K", "Q2_K", "int8+int8", "fp8_e4m3+fp8")
ROWS = (1, 16, 32, 64, 128)


@dataclass(frozen=True)
class Gpu:
    """Bytes a second of memory, 16-bit and 8-bit operations a second of the matrix units, multiprocessors, their clock in Hz, and
    of each: registers, bytes of shared memory, warp instructions begun in a cycle."""

    arch: int
    bandwidth: float
    matrix: float
    matrix8: float
    units: int
    clock: float
    registers: int = 65536
    shared: int = 227 << 10
    issue: int = 4


H200 = Gpu(90, 4.3e12, 790e12, 1580e12, 132, 1.755e9)
"""Copy bandwidth and bf16 rate as measured on one; twice that in 8 bits; 132 multiprocessors at the boost clock."""


def run() -> list[dict[str, Any]]:
    """Each scheme and number of rows, 4096×4096, on an H200: instructions a weight in the loop over K, registers, warps that fit
    a multiprocessor, bytes of the widest loads; microseconds that memory, instructions and matrix units take at least; which of
    them is the bound; and the ratio of the bound to that of a bf16 product."""
    return list(_rows(H200))


def _rows(gpu: Gpu) -> Iterator[dict[str, Any]]:
    import triton_compile as compiling

    from qcompile.codegen import tiles
    from qcompile.codegen.triton import Variant
    from qcompile.formats import REGISTRY, Scheme

    n, k = compiling.SIZE
    for name in SCHEMES:
        fmt, _, activations = name.partition("+")
        scheme = Scheme(REGISTRY[fmt], activations or None)
        for rows in ROWS:
            if rows == 1 and scheme.activations is not None:
                continue
            kernels = compiling.Compiled(scheme, gpu.arch)
            variant = None
            if rows == 1:
                tile = tiles.gemv_tile(kernels.printer.group, kernels.printer.granule, k)
                variant = Variant(tile, kernels.printer.wide, "float32")
            kernels.run(rows, torch.bfloat16, bias=False, variant=variant)
            for fact in compiling.facts(kernels, rows, torch.bfloat16):
                if fact["kernel"] in ("gemv", "dot", "dot8"):
                    yield _row(gpu, fact, scheme.format.nbytes(n, k), n, k)


def _row(gpu: Gpu, fact: dict[str, Any], nbytes: int, n: int, k: int) -> dict[str, Any]:
    rows, threads = fact["rows"], fact["threads"]
    each = fact["loop"] / fact["weights"] if fact["loop"] and fact["weights"] else None
    limits = {
        "memory": (nbytes + 2 * rows * (n + k)) / gpu.bandwidth,
        "instructions": n * k * (each or 0.0) / 32 / (gpu.units * gpu.issue * gpu.clock),
        "matrix units": 0.0 if rows == 1 else 2 * rows * n * k / (gpu.matrix8 if fact["kernel"] == "dot8" else gpu.matrix),
    }
    bound = max(limits, key=lambda name: limits[name])
    bf16 = max((2 * n * k + 2 * rows * (n + k)) / gpu.bandwidth, 2 * rows * n * k / gpu.matrix)
    blocks = min(gpu.registers // (fact["registers"] * threads), gpu.shared // max(fact["shared"], 1), 2048 // threads)
    return {
        "scheme": fact["scheme"], "rows": rows, "kernel": fact["kernel"], "instr/weight": each, "registers": fact["registers"],
        "spills": fact["spills"], "warps": blocks * threads // 32, "load B": fact["copied"], "matrix": " ".join(fact["matrix"]),
        **{f"{name} µs": 1e6 * limit for name, limit in limits.items()}, "bound": bound, "over bf16": bf16 / limits[bound],
    }  # fmt: skip
