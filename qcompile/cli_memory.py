"""The command ``qcompile plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import QCompileError


def register(app: typer.Typer) -> None:
    """Adds the command of this module to ``app``."""
    app.command()(plan)


def plan(
    model: Annotated[Path, typer.Option(help="a Hugging Face config.json, or its folder")],
    policy: Annotated[str, typer.Option(help="a policy's name, or a .json file that search or Policy.to_json wrote")] = "int8",
    devices: Annotated[int, typer.Option(help="devices that the model is divided among, as by tensor parallelism")] = 1,
    context: Annotated[int, typer.Option(help="tokens that the KV cache holds of each sequence")] = 8192,
    batch: Annotated[int, typer.Option(help="sequences")] = 1,
    kv: Annotated[str | None, typer.Option(help="format of keys and values: fp8, int8, …; else the model's dtype")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Says what a model takes on each device, from its configuration alone; nothing is loaded."""
    from .memory import memory_plan
    from .policy_file import policy_from

    try:
        found = memory_plan(model, policy=policy_from(policy), devices=devices, context=context, batch=batch, kv=kv)
    except QCompileError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(found.to_json() if as_json else str(found))
