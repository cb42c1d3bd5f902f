"""Pictures of results: ``results/<question>.png`` beside the JSON, where a picture says more than the table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def linear(rows: Rows, axes: Any) -> None:
    """Speed-up of every scheme over the number of rows, for the largest weight."""
    n, k = max(((r["n"], r["k"]) for r in rows), key=lambda s: s[0] * s[1])
    shown = [r for r in rows if (r["n"], r["k"]) == (n, k)]
    for scheme in dict.fromkeys(r["scheme"] for r in shown):
        own = [r for r in shown if r["scheme"] == scheme]
        axes.plot([r["rows"] for r in own], [r["speedup"] for r in own], marker="o", label=scheme)
    axes.set(xscale="log", yscale="log", xlabel="rows of x", ylabel="× compiled bf16", title=f"One linear layer, {n}×{k}")
    axes.set_xticks(ticks := sorted({r["rows"] for r in shown}), ticks)
    axes.set_yticks(ticks := [0.5, 1, 2, 3, 4, 6, 8], ticks)
    axes.minorticks_off(), axes.grid(alpha=0.3), axes.legend()


def formats(rows: Rows, axes: Any) -> None:
    """Speed-up of one row in every format; dots are what its bits alone would give."""
    one = (r for r in rows if r["scheme"] != "baseline" and r["rows"] == 1)
    own = sorted(one, key=lambda r: (r["bits"], r["scheme"]), reverse=True)
    names = [f"{r['scheme']} ({r['bits']:.2f})" for r in own]
    axes.barh(names, [r["speedup"] for r in own])
    axes.plot([16 / r["bits"] for r in own], names, "o", color="black", markersize=3, label="16 bits / bits")
    axes.tick_params(axis="y", labelsize=6)
    axes.set(xlabel="× compiled bf16", title="Every weight format (bits a weight), one row"), axes.legend()


def model(rows: Rows, axes: Any) -> None:
    """Speed-up of whole layers for one token, ours and others'."""
    own = sorted((r for r in rows if r["tokens"] == 1), key=lambda r: r["ratio"])
    colors = ["tab:blue" if "bytes" in r else "tab:gray" for r in own]
    errors = [[max(r["ratio"] - r["low"], 0) for r in own], [max(r["high"] - r["ratio"], 0) for r in own]]
    axes.barh([r["policy"] for r in own], [r["ratio"] for r in own], xerr=errors, color=colors)
    axes.set(xlabel="× compiled bf16 (blue: qcompile)", title="Llama-3-8B layers, one token")


def attention(rows: Rows, axes: Any) -> None:
    """Speed-up of attention to a packed cache over the length of the context."""
    for cache in dict.fromkeys(r["cache"] for r in rows):
        own = [r for r in rows if r["cache"] == cache]
        axes.plot([r["tokens"] for r in own], [r["over folded"] for r in own], marker="o", label=cache)
    axes.set(xscale="log", yscale="log", xlabel="tokens in the cache", ylabel="× torch's fastest in bf16",
             title="One token attends")  # fmt: skip
    axes.grid(alpha=0.3), axes.legend()


PLOTS: dict[str, Callable[[Rows, Any], None]] = {"linear": linear, "formats": formats, "model": model, "attention": attention}


def draw(name: str, rows: Rows, results: Path) -> Path | None:
    """The picture of question ``name``, or None where there is none. Raises ImportError without matplotlib."""
    if name not in PLOTS:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    PLOTS[name](rows, figure.subplots())
    path = results / f"{name}.png"
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return path
