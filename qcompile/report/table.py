"""A plan as a table: one line for each site, totals at the end."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..plan import Plan, Record
from ..store import COUNTS, the_store

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

COLUMNS = ("layer", "operator", "shape", "format", "kernel", "rule", "bytes", "SQNR", "left because")
RIGHT = frozenset({"shape", "bytes", "SQNR"})
WHOLE = frozenset({"layer", "operator", "shape", "format", "SQNR"})
"""Columns that are folded last."""
WIDE = 100_000
"""Columns of a console that truncates nothing."""


class Report:
    """What was done to a model. ``print(report)`` or :meth:`print` for people, :meth:`to_json` for
    programs."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def print(self, console: Console | None = None) -> None:
        """Writes the table: fitted to a terminal's width with long cells folded, or as plain text of full
        width elsewhere."""
        from rich.console import Console

        console = console or Console()
        if not console.is_terminal:
            console.file.write(f"{self}\n")
            return
        console.print(self.table())
        console.print(self.summary(), highlight=False)

    def __str__(self) -> str:
        """Plain text, every cell whole, whatever the terminal's width."""
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=WIDE, color_system=None, force_terminal=False).print(self.table())
        lines = (line.rstrip() for line in text.getvalue().splitlines())
        return "\n".join((*lines, self.summary()))

    def table(self) -> Table:
        """The table for ``rich``."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in COLUMNS:
            table.add_column(
                name, justify="right" if name in RIGHT else "left", overflow="fold", no_wrap=name in WHOLE
            )
        for record in self.plan:
            left = record.decision.scheme is None
            table.add_row(*map(escape, cells(record)), style="dim" if left else None)
        return table

    def summary(self) -> str:
        """Totals in one sentence, and how many sites were left for which reason."""
        totals = self.plan.totals()
        saved = f" ({totals.bytes_after / totals.bytes_before:.1%})" if totals.bytes_before else ""
        head = (
            f"{totals.quantized} of {totals.sites} sites quantized; "
            f"{totals.share:.1%} of the linear layers' weights; "
            f"{size(totals.bytes_before)} → {size(totals.bytes_after)}{saved}"
        )
        return "\n".join([head, *_reasons(self.plan), made_here()])

    def to_json(self) -> str:
        """The plan's JSON, see :meth:`qcompile.plan.Plan.as_dict`, and the counters of the cache as ``cache``."""
        return json.dumps(self.plan.as_dict() | {"cache": dict(COUNTS)}, indent=1)


def made_here() -> str:
    """What this process has made so far, and what it found in the cache, for all models together."""
    done = (("quantized", "weights", "packed"), ("generated", "sources", "source"), ("compiled", "libraries", "library"),
            ("calibrated", "graphs", "calibration"))  # fmt: skip
    what = ", ".join(f"{verb} {COUNTS[verb]} {things} ({COUNTS[f'{kind} read']} read)" for verb, things, kind in done)
    return f"  this process {what}; cache: {the_store().root}"


def cells(record: Record) -> tuple[str, ...]:
    """The texts of one line, in the order of :data:`COLUMNS`."""
    decision = record.decision
    site = decision.site
    dims = "×".join("?" if d < 0 else str(d) for d in site.shape)
    before, after = size(record.bytes_before), size(record.bytes_after)
    change = "" if site.weight is None else before if decision.scheme is None else f"{before} → {after}"
    kept = str(site.dtype).removeprefix("torch.")
    return (
        site.name,
        site.operator,
        dims,
        decision.scheme.label if decision.scheme else kept,
        record.kernel or "",
        decision.rule,
        change,
        decibels(record.sqnr),
        decision.reason or "",
    )


def _reasons(plan: Iterable[Record]) -> list[str]:
    counts: dict[str, int] = {}
    for record in plan:
        if record.decision.scheme is None and record.decision.reason is not None:
            counts[record.decision.reason] = counts.get(record.decision.reason, 0) + 1
    return [
        f"  left in floating point: {n} × {reason}"
        for reason, n in sorted(counts.items(), key=lambda c: -c[1])
    ]


def decibels(ratio: float | None) -> str:
    """``"31.2 dB"``, ``"exact"``, or nothing where it was not measured."""
    if ratio is None:
        return ""
    return "exact" if math.isinf(ratio) else f"{ratio:.1f} dB"


def size(count: int) -> str:
    """Bytes with a decimal unit: ``"1.05 MB"``."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if round(value) < 1000:
            return (
                f"{value:.0f} {unit}"
                if unit == "B" or value >= 99.5
                else f"{value:.{1 if value >= 9.95 else 2}f} {unit}"
            )
        value /= 1000
    return f"{value:.2f} TB"
