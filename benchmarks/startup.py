"""How long from the call to the first token, in a first process and in later ones? All layers of Qwen3-0.6B's shape."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any

LAYERS = 28
POLICIES = ("bf16", "int8", "int4", "nf4", "Q4_K")
ROUNDS = 11


def measure(policy: str) -> dict[str, float]:
    """In this process: seconds of the first and of the second call of a compiled model, torch being imported and warm, and
    what qcompile made for it."""
    import time

    import torch

    from .shapes import QWEN3_06B, llama_layers

    warm = torch.nn.Linear(8, 8)
    torch.compile(warm)(torch.ones(1, 8))
    model = llama_layers(LAYERS, sizes=QWEN3_06B)
    ids = torch.ones(1, 1, dtype=torch.long)
    backend, options = ("inductor", None) if policy == "bf16" else ("qcompile", {"policy": policy})
    compiled = torch.compile(model, backend=backend, options=options)
    row: dict[str, float] = {}
    with torch.no_grad():
        for name in ("first call s", "second call s"):
            start = time.perf_counter()
            compiled(ids, use_cache=False)
            row[name] = time.perf_counter() - start
    from qcompile.store import COUNTS

    return row | {name: COUNTS[name] for name in ("quantized", "generated", "compiled")}


def run() -> list[dict[str, Any]]:
    """A first process for each policy over empty caches of its own, then rounds of second ones, policies in turn: medians.

    ``over bf16``: ratio to plain Inductor's in the same state, in the same round. ``over first``: ratio to the first process.
    """
    with tempfile.TemporaryDirectory() as folder:
        firsts = {policy: _process(policy, folder) for policy in POLICIES}
        rounds = [{policy: _process(policy, folder) for policy in POLICIES} for _ in range(ROUNDS)]
    rows = []
    for policy in POLICIES:
        first = firsts[policy]
        rows.append({"policy": policy, "process": "first", **first,
                     "over bf16": first["first call s"] / firsts["bf16"]["first call s"]})  # fmt: skip
        again = [r[policy] for r in rounds]
        medians = {name: statistics.median(r[name] for r in again) for name in first}
        ratios = sorted(r[policy]["first call s"] / r["bf16"]["first call s"] for r in rounds)
        rows.append({"policy": policy, "process": "second", **medians, "over bf16": statistics.median(ratios),
                     "low": ratios[0], "high": ratios[-1],
                     "over first": medians["first call s"] / first["first call s"]})  # fmt: skip
    return rows


def _process(policy: str, folder: str) -> dict[str, float]:
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/{policy}/inductor", "QCOMPILE_CACHE_DIR": f"{folder}/{policy}"}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # as if qcompile were installed: its modules are compiled once
    program = f"import json; from benchmarks.startup import measure; print('ROW', json.dumps(measure({policy!r})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=env)
    row: dict[str, float] = json.loads(next(x for x in done.stdout.splitlines() if x.startswith("ROW"))[4:])
    return row
