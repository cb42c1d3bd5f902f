"""A search as a picture: loss over bits per weight."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .result import Search


def draw(search: Search, path: Path) -> Path:
    """The front as a line, every format used for all layers as a dot, the choice as predicted and as measured."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Search.plot draws with matplotlib, which is not installed: pip install matplotlib") from error

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    shown = [p for p in search.front if p.predicted > 0]
    axes.plot([p.bits for p in shown], [p.predicted for p in shown], marker=".", label="best choice of formats, predicted")
    uniform = [(label, p) for label, p in search.table.uniform().items() if p.predicted > 0]
    dots = [p.bits for _, p in uniform], [p.predicted for _, p in uniform]
    axes.plot(*dots, "o", color="tab:gray", label="one format, predicted")
    for label, point in uniform:
        axes.annotate(label, (point.bits, point.predicted), xytext=(5, 4), textcoords="offset points", fontsize=7)
    bits = search.point.bits
    if search.point.predicted > 0:
        axes.plot([bits], [search.point.predicted], "*", markersize=13, color="tab:red", label=f"{search.budget}, predicted")
    if search.measured:
        axes.plot([bits], [search.measured], "x", markersize=9, color="tab:red", label="the same, measured")
    axes.set(yscale="log", xlabel="bits per weight, scales included", ylabel=search.measure)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    return path
