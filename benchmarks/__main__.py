"""``python -m benchmarks QUESTION``: measures, prints a table, and writes benchmarks/results/QUESTION.json."""

from __future__ import annotations

import importlib
import importlib.util

import typer
from rich.console import Console
from rich.table import Table

from .machine import RESULTS, save
from .plots import draw

QUESTIONS = ("linear", "formats", "attention", "caches", "model", "decode", "source", "kernels", "overhead", "startup",
             "memory", "accuracy", "calibration", "reconstruction", "search", "load", "qat", "adapters", "experts",
             "together")  # fmt: skip

app = typer.Typer(add_completion=False)


@app.command()
def main(question: str = typer.Argument(help=f"one of {', '.join(QUESTIONS)}, or all")) -> None:
    """Runs one benchmark or all of them."""
    if question != "all" and question not in QUESTIONS:
        raise typer.BadParameter(f"{question!r}: use one of {', '.join(QUESTIONS)}, all")
    for name in QUESTIONS if question == "all" else (question,):
        module = importlib.import_module(f"benchmarks.{name}")
        rows = module.run()
        table = Table(title=name)
        columns = list(dict.fromkeys(name for row in rows for name in row))
        for column in columns:
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(*(_shown(row.get(column, "")) for column in columns))
        Console(width=160).print(table)
        Console().print(f"written to {save(name, rows)}")
        if hasattr(module, "publish"):
            module.publish(rows)
        if importlib.util.find_spec("matplotlib") is None:
            Console().print("matplotlib is not installed: no picture (pip install -e '.[bench]')")
        else:
            draw(name, rows, RESULTS)


def _shown(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


app()
