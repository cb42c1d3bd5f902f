"""A memory plan as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .plain import plain_table, printed
from .table import size

if TYPE_CHECKING:
    from ..memory import MemoryPlan


def text(plan: MemoryPlan) -> str:
    """Plain text, every cell whole: what lies on one device, the largest first."""
    from rich.markup import escape

    table = plain_table("weights", "format", "split by", "count", "bytes", "of one device", words=3)
    for g in plan.groups:
        table.add_row(escape(g.layer), escape(g.format), g.split, str(g.weights), size(g.nbytes), size(g.device_nbytes))
    table.add_section()
    table.add_row("all weights", "", "", str(sum(g.weights for g in plan.groups)), size(plan.weights_nbytes),
                  size(plan.weights_device_nbytes))  # fmt: skip
    table.add_row(f"KV cache of {plan.batch} × {plan.context}", plan.kv, "heads", "", size(plan.kv_nbytes),
                  size(plan.kv_device_nbytes))  # fmt: skip
    table.add_row("together", "", "", "", size(plan.weights_nbytes + plan.kv_nbytes), size(plan.device_nbytes))
    title = f"policy {plan.policy}, {plan.devices} device{'s' if plan.devices > 1 else ''}"
    return "\n".join([title, printed(table), *(f"on every device: {note}" for note in plan.notes)])
