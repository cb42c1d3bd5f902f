"""An evaluation as text: figures of the model, then the noise of its weights, equal layers as one line."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from .fold import bare, folded_name
from .plain import plain_table, printed
from .table import decibels, size

if TYPE_CHECKING:
    from rich.table import Table

    from ..evaluation import Evaluation, SiteNoise


def text(evaluation: Evaluation) -> str:
    """Plain text, every cell whole."""
    parts = [printed(_figures(evaluation))]
    if evaluation.no_perplexity is not None:
        parts.append(f"no perplexity: {evaluation.no_perplexity}")
    if evaluation.sites:
        parts.append(printed(_sites(evaluation.sites)))
    return "\n".join(parts)


def _figures(e: Evaluation) -> Table:
    table = plain_table("", "reference", "quantized")
    if e.perplexity is not None and e.reference_perplexity is not None:
        ratio = e.perplexity / e.reference_perplexity
        table.add_row("perplexity", f"{e.reference_perplexity:.4f}", f"{e.perplexity:.4f} ({ratio - 1:+.2%})")
    if e.divergence is not None and e.agreement is not None:
        table.add_row("KL(reference‖quantized), nats", "", f"{e.divergence:.3e}")
        table.add_row("same likeliest", "", f"{e.agreement:.2%}")
    table.add_row("relative error of the output", "", f"{e.relative_error:.2e}")
    table.add_row("parameters", size(e.reference_nbytes), size(e.nbytes) if e.nbytes else "")
    table.add_row("positions", "", f"{e.positions:,}")
    return table


def _sites(sites: tuple[SiteNoise, ...]) -> Table:
    from rich.markup import escape

    groups: dict[tuple[str, str], list[SiteNoise]] = defaultdict(list)
    for site in sites:
        groups[bare(site.layer), site.scheme].append(site)
    table = plain_table("layer", "format", "bytes", "SQNR", words=2)
    for (_, scheme), group in groups.items():
        known = [s.sqnr for s in group if s.sqnr is not None]
        ends = [decibels(r) for r in ((min(known), max(known)) if known else ())]
        ratio = ends[0] if len(set(ends)) == 1 else "…".join([ends[0].removesuffix(" dB"), ends[1]]) if ends else ""
        name = folded_name([s.layer for s in group])
        table.add_row(escape(name), escape(scheme), size(sum(s.nbytes for s in group)), ratio)
    return table
