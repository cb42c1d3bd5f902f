"""``qcompile`` on the command line."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.table import Table

from . import __version__, cli_debug
from .cli_cache import app as cache
from .formats import REGISTRY, FormatSpec, Plane, activations_of

app = typer.Typer(add_completion=False, no_args_is_help=True, help="A quantizing backend for torch.compile.")
app.add_typer(cache, name="cache")
cli_debug.register(app)


@app.command()
def formats() -> None:
    """Lists the weight formats: exact bits per weight, planes, and the value of a weight."""
    table = Table("format", "bits per weight", "planes", "value", "activations")
    for spec in REGISTRY.values():
        planes = ", ".join(f"{p.name}[{p.dtype}/{_reach(p)}]" for p in spec.planes)
        table.add_row(spec.name, _bits(spec), planes.replace("[", r"\["), str(spec.value), " ".join(activations_of(spec)))
    Console().print(table)


def _bits(spec: FormatSpec) -> str:
    """Exact bits per weight: a decimal number, and what a row, a column or the tensor adds."""
    exact = spec.bits_per_weight()
    constant, rest = exact.as_independent(*exact.free_symbols, as_Add=True)
    return f"{float(constant):.7g}" + (f" + {rest}" if rest != 0 else "")


def _reach(plane: Plane) -> str:
    """What one entry serves: weights along a row, × rows if it is more than one."""
    return f"{plane.per or 'row'}" + ("" if plane.rows == 1 else f"×{plane.rows or 'all'}")


@app.command()
def version() -> None:
    """Prints the version."""
    typer.echo(__version__)


def main() -> None:
    """Entry point of the console script."""
    app()
