"""A plan as a table: one line for each site, equal ones folded into one, totals at the end."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from ..codegen.cpp_many import FOUND, Kind, Times
from ..plan import Plan, Record
from ..store import COUNTS, the_store
from .fold import Row, bare, folded_name, rows
from .graph import Picture
from .plain import printed
from .roofline import Timing

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..allocation import Search
    from ..comparison import Comparison

COLUMNS = ("layer", "×", "operator", "shape", "format", "kernel", "rule", "bytes", "SQNR", "left because")
TIMES = ("roofline", "measured")
RIGHT = frozenset({"×", "shape", "bytes", "SQNR", *TIMES})
WHOLE = frozenset({"layer", "operator", "shape", "format", "SQNR", "×"})
"""Columns that are folded last."""


class Report:
    """What was done to a model. ``print(report)`` or :meth:`print` for people, :meth:`to_json` for programs,
    :meth:`html` for a page to click through.

    ``fold``: equal layers are one line, with their number. ``graphs`` are pictures of what was traced; ``times``, by a site's
    key, what a call of its layer takes.
    """

    def __init__(
        self, plan: Plan, graphs: tuple[Picture, ...] = (), times: Mapping[tuple[str, str], Timing] | None = None,
        fold: bool = True,
    ) -> None:  # fmt: skip
        self.plan, self.graphs, self.times, self.fold = plan, graphs, dict(times or {}), fold

    def filter(
        self, name: str = "*", *, operator: str | None = None, role: str | None = None, format: str | None = None,
        left: bool | None = None,
    ) -> Report:  # fmt: skip
        """The sites whose name, format's label, operator or one of whose roles match the globs that are given; ``left``:
        those left in floating point (True), or those quantized (False)."""

        def keeps(record: Record) -> bool:
            decision, site = record.decision, record.decision.site
            label = decision.scheme.label if decision.scheme else str(site.dtype).removeprefix("torch.")
            return (
                fnmatchcase(site.name, name)
                and fnmatchcase(site.operator, operator or "*")
                and (role is None or any(fnmatchcase(r, role) for r in site.roles))
                and fnmatchcase(label, format or "*")
                and left in (None, decision.scheme is None)
            )

        return self._of(Plan(tuple(filter(keeps, self.plan))), self.fold)

    def unfolded(self) -> Report:
        """The same with a line for every site."""
        return self._of(self.plan, fold=False)

    def _of(self, plan: Plan, fold: bool) -> Report:
        return Report(plan, self.graphs, self.times, fold)

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
        return f"{printed(self.table())}\n{self.summary()}"

    def table(self) -> Table:
        """The table for ``rich``."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in (*COLUMNS[:-1], *(TIMES if self.times else ()), COLUMNS[-1]):
            table.add_column(
                name, justify="right" if name in RIGHT else "left", overflow="fold", no_wrap=name in WHOLE
            )
        for row in rows(self.plan, self.fold):
            first, times = cells(row), self._time_cells(row) if self.times else ()
            left = row.first.decision.scheme is None
            table.add_row(*map(escape, (*first[:-1], *times, first[-1])), style="dim" if left else None)
        return table

    def _time_cells(self, row: Row) -> tuple[str, str]:
        known = [t for r in row.records if (t := self.times.get(r.decision.site.key)) is not None]
        if not known:
            return "", ""
        return microseconds(sum(t.bound for t in known)), microseconds(sum(t.measured for t in known))

    def summary(self) -> str:
        """Totals in one sentence, and how many sites were left for which reason."""
        totals = self.plan.totals()
        saved = f" ({totals.bytes_after / totals.bytes_before:.1%})" if totals.bytes_before else ""
        flops = f"{totals.flops_share:.1%} of their {count(totals.flops, 'FLOP')}; " if totals.flops else ""
        head = (
            f"{totals.quantized} of {totals.sites} sites quantized; "
            f"{totals.share:.1%} of the linear layers' weights; {flops}"
            f"{size(totals.bytes_before)} → {size(totals.bytes_after)}{saved}"
        )
        return "\n".join([head, *_reasons(self.plan), *_decoded_first(self.plan), made_here()])

    def to_json(self) -> str:
        """The plan's JSON (see :meth:`qcompile.plan.Plan.as_dict`), with ``"seconds": {"bound", "measured"}`` in the records
        of layers that were timed, the counters of the cache as ``"cache"``, and as ``"products"`` the times of those that were
        measured in two ways."""
        products = [{"format": label, **kind.as_dict(), **vars(times)} for (label, kind), times in _products(self.plan)]
        content = self.plan.as_dict() | {"cache": dict(COUNTS), "products": products}
        for record, data in zip(self.plan, content["records"], strict=True):
            if (timing := self.times.get(record.decision.site.key)) is not None:
                data["seconds"] = dict(vars(timing))
        return json.dumps(content, indent=1)

    def html(self, path: str | Path, comparison: Comparison | None = None, search: Search | None = None) -> Path:
        """Writes a page that needs nothing but a browser: graph, decisions, bytes, kernels, and errors by layer, those of a
        ``comparison`` if one is given, else SQNR; of a ``search`` its front and its choices. Returns the file's path."""
        from .html import page

        made = Path(path)
        made.write_text(page(self, comparison, search), encoding="utf-8")
        return made


def made_here() -> str:
    """What this process has made so far, and what it found in the cache, for all models together."""
    done = (("quantized", "weights", "packed"), ("generated", "sources", "source"), ("compiled", "libraries", "library"),
            ("calibrated", "groups of layers", "calibration"), ("tuned", "tiles", "tile"),
            ("timed", "products", "product"))  # fmt: skip
    what = ", ".join(f"{verb} {COUNTS[verb]} {things} ({COUNTS[f'{kind} read']} read)" for verb, things, kind in done)
    return f"  this process {what}; cache: {the_store().root}"


def cells(row: Row) -> tuple[str, ...]:
    """The texts of one line, in the order of :data:`COLUMNS`."""
    decision, site = row.first.decision, row.first.decision.site
    dims = "×".join("?" if d < 0 else str(d) for d in site.shape)
    before, after = size(row.bytes_before), size(row.bytes_after)
    change = "" if site.weight is None else before if decision.scheme is None else f"{before} → {after}"
    return (
        row.name,
        str(len(row.records)) if len(row.records) > 1 else "",
        site.operator,
        dims,
        decision.scheme.label if decision.scheme else str(site.dtype).removeprefix("torch."),
        row.first.kernel or "",
        row.rule,
        change,
        _range(row.sqnr),
        row.reason or "",
    )


def _range(ratios: tuple[float, float] | None) -> str:
    if ratios is None:
        return ""
    low, high = map(decibels, ratios)
    return low if low == high else f"{low.removesuffix(' dB')}…{high}"


def _reasons(plan: Plan) -> list[str]:
    """How many sites were left for which reason; reasons that differ in numbers alone are one."""
    found: dict[str, list[str]] = {}
    for record in plan:
        if record.decision.scheme is None and record.decision.reason is not None:
            found.setdefault(bare(record.decision.reason), []).append(record.decision.reason)
    return [
        f"  left in floating point: {len(reasons)} × {folded_name(reasons)}"
        for reasons in sorted(found.values(), key=lambda r: -len(r))
    ]


def _products(plan: Plan) -> list[tuple[tuple[str, Kind], Times]]:
    """Products by weights in formats of ``plan`` that were timed in two ways."""
    schemes = {r.decision.scheme for r in plan if r.decision.scheme is not None}
    labels = {replace(s, format=s.format.plain).label for s in schemes}
    return [(product, times) for product, times in FOUND.items() if product[0] in labels]


def _decoded_first(plan: Plan) -> list[str]:
    """Of which products the weight is decoded, and PyTorch's product taken, and why."""
    return [f"  {label}, {kind}: decoded, then PyTorch's product: {microseconds(times.other)}, ours {microseconds(times.ours)}"
            for (label, kind), times in _products(plan) if times.decodes]  # fmt: skip


def decibels(ratio: float | None) -> str:
    """``"31.2 dB"``, ``"exact"``, or nothing where it was not measured."""
    if ratio is None:
        return ""
    return "exact" if math.isinf(ratio) else f"{ratio:.1f} dB"


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.3g} µs" if seconds < 1e-3 else f"{seconds * 1e3:,.3g} ms"


def size(number: int) -> str:
    """Bytes with a decimal unit: ``"1.05 MB"``."""
    return count(number, "B")


def count(number: int, unit: str) -> str:
    """A number with a decimal prefix before its unit: ``"1.05 MB"``, three digits."""
    value = float(number)
    for prefix in ("", "k", "M", "G"):
        if round(value) < 1000:
            digits = 0 if not prefix or value >= 99.5 else 1 if value >= 9.95 else 2
            return f"{value:.{digits}f} {prefix}{unit}"
        value /= 1000
    return f"{value:.2f} T{unit}"


