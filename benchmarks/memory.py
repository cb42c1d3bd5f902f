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
    """In this process: resident memory of the float model, the peak while int4 is calibrated by ``method``, and how much of it
    is above the model, beside what :func:`qcompile.calibration_memory` promises from the shapes.

    Resident memory is counted above that of the process after the calibration of a model as deep with tiny sizes: with the
    compiler loaded and warm. ``graphs`` is what the calibration of a second such model adds: compiled code of so many layers, and
    next to no tensors. ``ratio``: what was taken above the model over ``promised`` and ``graphs`` together.
    """
    import torch

    import qcompile

    from .shapes import TINY, llama_layers

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (SAMPLES, 1, TOKENS), generator=generator)
    data = [{"input_ids": x, "use_cache": False} for x in ids]

    def calibrated(model: torch.nn.Module) -> qcompile.Calibration:
        return qcompile.calibrate(model, data, policy="int4", method=method, progress=False)

    with torch.no_grad():
        calibrated(llama_layers(LAYERS, sizes=TINY))
        before = _status("VmRSS")
        calibrated(llama_layers(LAYERS, sizes=TINY))
        base = _status("VmRSS")
        model = llama_layers(LAYERS)
        model(**data[0])
        row: dict[str, Any] = {"policy": f"int4, {method}", "process": base, "graphs": base - before,
                               "bf16 rss": _status("VmRSS") - base}  # fmt: skip
        Path("/proc/self/clear_refs").write_text("5")
        found = calibrated(model)
        row["peak rss"] = _status("VmHWM") - base
        promised = qcompile.calibration_memory(model, data[0], SAMPLES, policy="int4")
    planes = sum(p.nbytes for _, w in found if w.packed is not None for p in w.packed.planes)
    row |= {"bytes": planes, "promised": promised.total, "above the model": row["peak rss"] - row["bf16 rss"]}
    row["ratio"] = row["above the model"] / (row["promised"] + row["graphs"])
    return row | {f"promised: {name}": value for name, value in promised.as_dict().items() if name != "total"}


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
