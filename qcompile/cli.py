"""``qcompile`` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from . import __version__, cli_debug, cli_memory, cli_search
from .cli_cache import app as cache
from .errors import QCompileError
from .formats import REGISTRY, FormatSpec, Plane, activations_of

app = typer.Typer(add_completion=False, no_args_is_help=True, help="A quantizing backend for torch.compile.")
app.add_typer(cache, name="cache")
cli_debug.register(app)
cli_search.register(app)
cli_memory.register(app)


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


@app.command()
def load(
    path: Annotated[Path, typer.Argument(help="a .gguf file, or a safetensors file or directory")],
    to: Annotated[Path | None, typer.Option(help="write it there: a directory, or a file .safetensors or .gguf")] = None,
    layout: Annotated[str | None, typer.Option(help="of --to: compressed-tensors or gptq")] = None,
    like: Annotated[Path | None, typer.Option(help="a GGUF whose metadata one written with --to takes over")] = None,
) -> None:
    """Loads a checkpoint and says what is in it; with --to, converts it."""
    from .checkpoints.load import load as load_model
    from .checkpoints.save import save
    from .tensor import QuantizedTensor

    try:
        model = load_model(path)
        table, totals = Table("format", "weights", "parameters", "bytes", title=type(model).__name__), [0, 0]
        found: dict[str, list[int]] = {}
        for parameter in model.parameters():
            value: torch.Tensor = parameter
            name, size = str(value.dtype).removeprefix("torch."), value.nbytes
            if isinstance(value, QuantizedTensor):
                name, size = value.scheme.label, value.packed_nbytes
            row, sizes = found.setdefault(name, [0, 0, 0]), (1, value.numel(), size)
            row[:] = [a + b for a, b in zip(row, sizes, strict=True)]
            totals = [totals[0] + sizes[1], totals[1] + sizes[2]]
        for name, row in found.items():
            table.add_row(name, *map(str, row))
        table.add_row("all", "", *map(str, totals))
        Console().print(table)
        if to is not None:
            Console().print(f"written to {save(model, to, layout=layout, like=like)}")
    except QCompileError as error:
        Console(stderr=True).print(str(error), markup=False)
        raise typer.Exit(1) from error


def main() -> None:
    """Entry point of the console script."""
    app()
