"""A comparison as text: layers by the error they add, and what would help."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .plain import plain_table, printed
from .table import size

if TYPE_CHECKING:
    from ..comparison import Comparison


def text(comparison: Comparison) -> str:
    """One line for each packed weight, the largest error first; the total and the suggestion below."""
    from rich.markup import escape

    table = plain_table("layer", "format", "bytes", "error alone", "accumulated", words=2)
    for e in comparison.ranked():
        table.add_row(escape(e.layer), escape(e.scheme), size(e.nbytes), f"{e.alone:.2e}", f"{e.accumulated:.2e}")
    tail = f"all together: {comparison.total:.2e}"
    if comparison.suggestion is not None:
        tail += f"\nsuggestion: {comparison.suggestion}"
    return f"{printed(table)}\n{tail}"
