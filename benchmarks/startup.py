"""How long until the first token, in a first process and in a second? Layers of Qwen3-0.6B's shape, caches empty at first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

LAYERS = 8
POLICIES = ("bf16", "int8", "int4", "nf4", "Q4_K")


def measure(policy: str) -> dict[str, float]:
    """In this process: seconds of the first and of the second call of a compiled model, torch being imported and warm."""
    import time

    import torch

    from .shapes import QWEN3_06B, llama_layers

    warm = torch.nn.Linear(8, 8)
    torch.compile(warm)(torch.ones(1, 8))
    model = llama_layers(LAYERS, sizes=QWEN3_06B)
    ids = torch.ones(1, 1, dtype=torch.long)
    backend, options = ("inductor", None) if policy == "bf16" else ("qcompile", {"policy": policy})
    compiled = torch.compile(model, backend=backend, options=options)
    row = {}
    with torch.no_grad():
        for name in ("first call s", "second call s"):
            start = time.perf_counter()
            compiled(ids, use_cache=False)
            row[name] = time.perf_counter() - start
    return row


def run() -> list[dict[str, Any]]:
    """Two processes for each policy over one folder of caches. ``over bf16`` compares with Inductor's in the same state."""
    rows: list[dict[str, Any]] = []
    for policy in POLICIES:
        with tempfile.TemporaryDirectory() as folder:
            env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "QCOMPILE_CACHE_DIR": f"{folder}/qcompile"}
            for process in ("first", "second"):
                program = f"import json; from benchmarks.startup import measure; print('ROW', json.dumps(measure({policy!r})))"
                done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=env)
                row = json.loads(next(x for x in done.stdout.splitlines() if x.startswith("ROW"))[4:])
                base = next((r for r in rows if r["policy"] == "bf16" and r["process"] == process), row)
                over = row["first call s"] / base["first call s"]
                rows.append({"policy": policy, "process": process, **row, "over bf16": over})
    return rows
