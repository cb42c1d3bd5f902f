"""Does packing free the float weights, and what does it take meanwhile? Eight layers of Llama-3-8B, one process a policy."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

LAYERS = 8


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


def run() -> list[dict[str, Any]]:
    """One process for each policy. Ratios are to bf16: bytes of parameters, resident memory after compilation (by
    Inductor there, by qcompile here), and the peak meanwhile over the uncompiled model's resident memory."""
    rows: list[dict[str, Any]] = []
    for policy in ("bf16", "int4", "int8"):
        program = f"import json; from benchmarks.memory import measure; print('ROW', json.dumps(measure({policy!r})))"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        row = json.loads(next(x for x in done.stdout.splitlines() if x.startswith("ROW"))[4:])
        bf16 = rows[0] if rows else row
        row |= {"bytes ratio": row["bytes"] / bf16["bytes"], "rss ratio": row["rss"] / bf16["rss"],
                "peak ratio": row["peak rss"] / row["bf16 rss"]}  # fmt: skip
        rows.append(row)
    return rows
