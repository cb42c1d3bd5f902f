"""Does packing free the float weights, and what do it and calibration take meanwhile? Eight layers of Llama-3-8B, one process a
case."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

LAYERS = 8
SAMPLES, TOKENS = 16, 256
"""Windows that calibration looks at, and their length."""


def _status(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


def measure(policy: str) -> dict[str, Any]:
    """In this process: bytes of parameters and resident memory in bf16, after packing, and the peak meanwhile.

    Resident memory is counted above that of the process with PyTorch's compiler loaded and warm, before the model is made.
    """
    import torch

    from .shapes import llama_layers

    def parameter_bytes() -> int:
        return sum(getattr(p, "packed_nbytes", p.nbytes) for p in model.parameters())

    warm = torch.nn.Sequential(torch.nn.Linear(64, 64)).to(torch.bfloat16)
    with torch.no_grad():
        torch.compile(warm, backend="qcompile")(torch.ones(1, 64, dtype=torch.bfloat16))
        base = _status("VmRSS")
        model = llama_layers(LAYERS)
        ids = torch.ones(1, 1, dtype=torch.long)
        model(ids, use_cache=False)
        row: dict[str, Any] = {"policy": policy, "process": base, "bf16 bytes": parameter_bytes()}
        row["bf16 rss"] = _status("VmRSS") - base
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        backend, options = ("inductor", None) if policy == "bf16" else ("qcompile", {"policy": policy})
        torch.compile(model, backend=backend, options=options)(ids, use_cache=False)
        row |= {"peak rss": _status("VmHWM") - base, "bytes": parameter_bytes()}
        gc.collect()
        row["rss"] = _status("VmRSS") - base
    return row


def measure_calibration(method: str) -> dict[str, Any]:
    """In this process: resident memory of the float model and the peak while int4 is calibrated by ``method``, and what the
    layer with most inputs needs at least: the sum x xᵀ in float32, and the factor of its inverse in float64 and float32."""
    import torch

    import qcompile

    from .shapes import LLAMA_3_8B, llama_layers

    with torch.no_grad():
        base = _status("VmRSS")
        model = llama_layers(LAYERS)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, 256, (SAMPLES, 1, TOKENS), generator=generator)
        model(ids[0], use_cache=False)
        row: dict[str, Any] = {"policy": f"int4, {method}", "process": base, "bf16 rss": _status("VmRSS") - base}
        Path("/proc/self/clear_refs").write_text("5")
        data = [{"input_ids": x, "use_cache": False} for x in ids]
        calibrated = qcompile.calibrate(model, data, policy="int4", method=method, progress=False)
        row["peak rss"] = _status("VmHWM") - base
    planes = sum(p.nbytes for _, w in calibrated if w.packed is not None for p in w.packed.planes)
    inputs = LLAMA_3_8B["intermediate_size"]
    return row | {"bytes": planes, "matrices": inputs**2 * (4 + 8 + 4), "above the model": row["peak rss"] - row["bf16 rss"]}


def run() -> list[dict[str, Any]]:
    """One process for each policy, then one for a calibration. Ratios are to bf16: bytes of parameters, resident memory after
    compilation (by Inductor there, by qcompile here), and the peak meanwhile over the uncompiled model's resident memory."""
    rows: list[dict[str, Any]] = []
    for policy in ("bf16", "int4", "int8"):
        row = _process(f"measure({policy!r})")
        bf16 = rows[0] if rows else row
        row |= {"bytes ratio": row["bytes"] / bf16["bytes"], "rss ratio": row["rss"] / bf16["rss"],
                "peak ratio": row["peak rss"] / row["bf16 rss"]}  # fmt: skip
        rows.append(row)
    with tempfile.TemporaryDirectory() as empty:  # where no layer of an earlier calibration is kept
        return [*rows, _process("measure_calibration('gptq')", {"QCOMPILE_CACHE_DIR": empty})]


def _process(call: str, settings: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    program = f"import json; from benchmarks import memory; print('ROW', json.dumps(memory.{call}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ | settings)
    row: dict[str, Any] = json.loads(next(x for x in done.stdout.splitlines() if x.startswith("ROW"))[4:])
    return row
