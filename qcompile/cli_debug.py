"""Commands of ``qcompile`` for looking inside: ``bisect``, ``doctor``."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Annotated, Any

import typer

from .comparison import arguments


def register(app: typer.Typer) -> None:
    """Adds the commands of this module to ``app``."""
    app.command()(bisect)
    app.command()(doctor)


def bisect(
    script: Annotated[str, typer.Argument(help="file.py:function; the function returns (model, inputs)")],
    a: Annotated[str, typer.Option(help="a policy's name")] = "float",
    b: Annotated[str, typer.Option(help="a policy's name")] = "default",
    tolerance: Annotated[float, typer.Option(help="relative difference that still counts as equal")] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Finds the first node at which two policies part. Exits with 1 if there is one."""
    from .bisection import bisect as run

    model, inputs = made_by(script)
    args, kwargs = arguments(inputs)
    found = run(model, *args, a=a, b=None if b == "default" else b, tolerance=tolerance, **kwargs)
    if as_json:
        typer.echo(json.dumps(found and found.as_dict(), indent=1))
    else:
        typer.echo(str(found) if found is not None else f"no node differs by more than {tolerance}")
    raise typer.Exit(0 if found is None else 1)


def doctor() -> None:
    """Looks at versions, devices, compilers and the cache: what will run fast and what will not. Exits with 1 if something is
    broken."""
    from rich.console import Console
    from rich.table import Table

    from .doctor import BROKEN, GOOD, SLOW, examine

    colors = {GOOD: "green", SLOW: "yellow", BROKEN: "red"}
    findings = examine()
    table = Table("", "found", "state", "what follows")
    for f in findings:
        table.add_row(f.what, f.found, f"[{colors[f.state]}]{f.state}[/]", f.advice)
    Console().print(table)
    raise typer.Exit(int(any(f.state == BROKEN for f in findings)))


def made_by(script: str) -> tuple[Any, Any]:
    """(model, inputs) from ``file.py:function``."""
    path, _, function = script.rpartition(":")
    if not path or not Path(path).is_file():
        raise typer.BadParameter(f"{script!r} is not file.py:function with a file that exists")
    names = runpy.run_path(path)
    if function not in names:
        raise typer.BadParameter(f"{path} has no function {function!r}")
    made = names[function]()
    if not (isinstance(made, tuple) and len(made) == 2):
        raise typer.BadParameter(f"{function} must return (model, inputs), found {type(made).__name__}")
    return made
