"""Tables as plain text."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

WIDE = 100_000
"""Columns of a terminal in which no cell is cut."""


def plain_table(*columns: str, words: int = 1) -> Table:
    """A table whose first ``words`` columns hold words and all others numbers."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < words else "right", no_wrap=True)
    return table


def printed(table: Table) -> str:
    """Plain text, every cell whole."""
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=WIDE, color_system=None, force_terminal=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
