"""A comparison as text: layers by the error they add, and what would help."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from .table import WIDE, size

if TYPE_CHECKING:
    from ..comparison import Comparison


def text(comparison: Comparison) -> str:
    """One line for each packed weight, the largest error first; the total and the suggestion below."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("layer", "format", "bytes", "error alone", "accumulated"):
        table.add_column(name, justify="left" if name in ("layer", "format") else "right", no_wrap=True)
    for e in comparison.ranked():
        table.add_row(escape(e.layer), escape(e.scheme), size(e.nbytes), f"{e.alone:.2e}", f"{e.accumulated:.2e}")
    out = io.StringIO()
    Console(file=out, width=WIDE, color_system=None, force_terminal=False).print(table)
    tail = f"all together: {comparison.total:.2e}"
    if comparison.suggestion is not None:
        tail += f"\nsuggestion: {comparison.suggestion}"
    return "\n".join([*(line.rstrip() for line in out.getvalue().splitlines()), tail])
