"""A search as text: the choice layer by layer, what it costs, and the front."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from .fold import bare, folded_name
from .plain import plain_table, printed
from .table import size

if TYPE_CHECKING:
    from ..allocation import Choice, Search


def text(search: Search) -> str:
    """Plain text, every cell whole; equal layers of one format are one line."""
    from rich.markup import escape

    groups: dict[tuple[str, str], list[Choice]] = defaultdict(list)
    for choice in search.choices:
        groups[bare(choice.layer), choice.format].append(choice)
    table = plain_table("layer", "format", "bits", "bytes", "loss alone", words=2)
    for (_, scheme), group in groups.items():
        name = folded_name([c.layer for c in group])
        nbytes, loss = sum(c.nbytes for c in group), sum(c.loss for c in group)
        table.add_row(escape(name), escape(scheme), f"{group[0].bits:.3f}", size(nbytes), f"{loss:.2e}")
    front = plain_table("bits per weight", "bytes", "predicted", words=0)
    for point in search.front:
        front.add_row(f"{point.bits:.3f}", size(point.nbytes), f"{point.predicted:.2e}")
    return "\n".join([printed(table), *summary(search), printed(front)])


def summary(search: Search) -> list[str]:
    """The choice in two sentences."""
    point = search.point
    gap = f", at most {search.gap:.1e} above the optimum" if search.gap > 1e-8 else ""
    lines = [f"budget {search.budget}: {point.bits:.4f} bits per weight of {len(search.choices)} layers, {point.nbytes:,} bytes "
             f"of all parameters{gap}",
             f"{search.measure}: {point.predicted:.3e} predicted, the sum of the layers' own"]  # fmt: skip
    if search.measured is not None:
        lines[1] += f"; {search.measured:.3e} measured with all of them packed"
    return lines
