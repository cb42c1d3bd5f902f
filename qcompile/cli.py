"""``qcompile`` on the command line."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.table import Table

from . import __version__
from .formats import REGISTRY, affine

app = typer.Typer(add_completion=False, no_args_is_help=True, help="A quantizing backend for torch.compile.")


@app.command()
def formats() -> None:
    """Lists the weight formats: exact bits per weight, planes, and the value of a weight."""
    table = Table("format", "bits per weight", "planes", "value", "integer dot product")
    for spec in REGISTRY.values():
        planes = ", ".join(f"{p.name}[{p.dtype}/{p.per or 'row'}]" for p in spec.planes)
        table.add_row(spec.name, str(spec.bits_per_weight()), planes.replace("[", r"\["), str(spec.value),
                      "yes" if affine(spec).integer else "no")  # fmt: skip
    Console().print(table)


@app.command()
def version() -> None:
    """Prints the version."""
    typer.echo(__version__)


def main() -> None:
    """Entry point of the console script."""
    app()
