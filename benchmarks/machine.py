"""What a result was measured on: written into every result file, never by hand."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def facts() -> dict[str, Any]:
    """Device, versions, commit and command."""
    model = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.processor())  # fmt: skip
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else model
    return {"device": device, "capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
            "python": platform.python_version(), "torch": torch.__version__, "commit": head.stdout.strip(),
            "command": " ".join(["python -m benchmarks", *sys.argv[1:]])}  # fmt: skip


def save(name: str, rows: list[dict[str, Any]]) -> Path:
    """Writes ``results/<name>.json`` with the facts beside the rows."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": facts(), "rows": rows}, indent=1) + "\n")
    return path
