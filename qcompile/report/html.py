"""The report as one page: data as JSON, libraries and code of ours inside, nothing fetched."""

from __future__ import annotations

import json
import linecache
import math
from dataclasses import asdict
from importlib import resources
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__
from ..formats import Scheme
from ..kernels import machine_code_of, source_of
from ..plan import Record
from .blocks import Block, Laid, cut
from .fold import bare, rows
from .graph import Step
from .table import cells

if TYPE_CHECKING:
    from ..allocation import Search
    from ..comparison import Comparison
    from .table import Report

LIBRARIES = ("cytoscape.min.js", "cytoscape-dagre.min.js", "chart.umd.min.js")
SCRIPTS = ("graph.js", "page.js")
CODE_BYTES = 2_500_000
"""Assembly in one page."""

CONTEXT = 4
"""Lines of the model's code shown before and after a node's."""


def page(report: Report, comparison: Comparison | None, search: Search | None = None) -> str:
    """The whole HTML text."""
    folder = resources.files(__package__)
    template = (folder / "page" / "page.html").read_text(encoding="utf-8")
    scripts = [(folder / "vendor" / name).read_text(encoding="utf-8") for name in LIBRARIES]
    scripts += [(folder / "page" / name).read_text(encoding="utf-8") for name in SCRIPTS]
    parts = {
        "{{style}}": (folder / "page" / "page.css").read_text(encoding="utf-8"),
        "{{data}}": json.dumps(data(report, comparison, search), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        "{{scripts}}": "\n".join(f"<script>{text}</script>" for text in scripts),
    }
    for mark, text in parts.items():
        template = template.replace(mark, text)
    return template


def data(report: Report, comparison: Comparison | None, search: Search | None = None) -> dict[str, Any]:
    """What the page shows, as JSON types."""
    records = {r.decision.site.key: r for r in report.plan}
    say = {key: (r.decision.scheme, r.kernel, bare(r.decision.reason or "")) for key, r in records.items()}
    graphs = [cut(picture, say) for picture in report.graphs]
    steps = [s for g in graphs for s in (*g.loose, *(step for b in _representatives(g).values() for step in b.steps))]
    device = _device_type(records.values())
    schemes = {r.decision.scheme for r in records.values() if r.decision.scheme is not None}
    return {
        "versions": f"qcompile {__version__}, torch {torch.__version__}",
        "summary": report.summary().splitlines(),
        "totals": dict(vars(report.plan.totals())),
        "rows": [list(cells(row)) for row in rows(report.plan)],
        "sites": [_site(r) for r in report.plan],
        "graphs": [_graph(g) for g in graphs],
        "sources": {s.source: _lines(s.source) for s in steps if s.source},
        "kernels": {s.label: source_of(s, device) for s in sorted(schemes, key=_label)},
        "code": _code(sorted(schemes, key=_label), device),
        "comparison": comparison and comparison.as_dict(),
        "advice": str(comparison.suggestion) if comparison and comparison.suggestion else None,
        "search": search and _search(search),
    }


def _code(schemes: list[Scheme], device: str) -> dict[str, dict[str, str]]:
    """Assembly by scheme and kernel; where all of it would make the page too large, the last ones say where it lies."""
    found: dict[str, dict[str, str]] = {}
    room = CODE_BYTES
    for scheme in schemes:
        for name, text in machine_code_of(scheme, device).items():
            room -= len(text)
            left = f"{len(text):,} bytes are left out of this page; Triton keeps them in its cache folder (TRITON_CACHE_DIR)"
            found.setdefault(scheme.label, {})[name] = text if room >= 0 else left
    return found


def _search(search: Search) -> dict[str, Any]:
    """A search without all that was measured of every candidate."""
    from .search_table import summary

    content = search.as_dict()
    shown = {name: content[name] for name in ("measure", "chosen", "choices", "front", "uniform")}
    return shown | {"budget": str(search.budget), "summary": summary(search)}


def _label(scheme: Scheme) -> str:
    return scheme.label


def _device_type(records: Any) -> str:
    return "cuda" if any((r.kernel or "").startswith("triton") for r in records) else "cpu"


def _site(record: Record) -> dict[str, Any]:
    decision, site = record.decision, record.decision.site
    return {
        "name": site.name,
        "operator": site.operator,
        "roles": sorted(site.roles),
        "shape": list(site.shape),
        "dtype": str(site.dtype).removeprefix("torch."),
        "format": decision.scheme and decision.scheme.label,
        "kernel": record.kernel,
        "rule": decision.rule,
        "reason": decision.reason,
        "before": record.bytes_before,
        "after": record.bytes_after,
        "flops": site.flops,
        "sqnr": None if record.sqnr is None or math.isinf(record.sqnr) else round(record.sqnr, 2),
        "parameter": site.parameter,
    }


def _representatives(graph: Laid) -> dict[int, Block]:
    """The first block of every run."""
    found: dict[int, Block] = {}
    for block in graph.blocks:
        found.setdefault(block.run, block)
    return found


def _graph(graph: Laid) -> dict[str, Any]:
    """Equal blocks are written once: ``blocks`` says which run each is of, ``runs`` what its first block holds."""
    return {
        "name": graph.name,
        "loose": [_step(s) for s in graph.loose],
        "blocks": [{"name": b.name, "run": b.run} for b in graph.blocks],
        "runs": [{"name": b.name, "steps": [_step(s) for s in b.steps]} for b in _representatives(graph).values()],
        "edges": graph.edges,
    }


def _step(step: Step) -> dict[str, Any]:
    return asdict(step)


def _lines(source: str) -> list[str]:
    """The lines around ``"file:line"``, each with its number; empty where the file cannot be read."""
    path, _, number = source.rpartition(":")
    middle = int(number)
    lines = range(max(1, middle - CONTEXT), middle + CONTEXT + 1)
    texts = [(i, linecache.getline(path, i).rstrip("\n")) for i in lines]
    return [f"{'→' if i == middle else ' '}{i:5} {text}" for i, text in texts if text or i <= middle]
