"""How fast is one linear layer? Ratios to compiled bf16 in the same run; one Llama-3-8B shape a table."""

from __future__ import annotations

import dataclasses
from typing import Any

from . import cpu_linear


def run() -> list[dict[str, Any]]:
    """On the CPU: every shape, scheme and row count of :mod:`benchmarks.cpu_linear`."""
    return [dataclasses.asdict(r) for n, k in cpu_linear.SHAPES for r in cpu_linear.measure(n, k, seconds=1.0)]
