"""Commands of ``qcompile`` for whole models: ``evaluate``, ``search``."""

from __future__ import annotations

import copy
import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from .cli_debug import made_by
from .errors import QCompileError

Script = Annotated[str, typer.Argument(help="file.py:function; the function returns (model, list of inputs)")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]


def register(app: typer.Typer) -> None:
    """Adds the commands of this module to ``app``."""
    app.command()(evaluate)
    app.command()(search)


def evaluate(
    script: Script,
    policy: Annotated[str, typer.Option(help="a policy's name, or a .json file that search or Policy.to_json wrote")] = "int8",
    as_json: Json = False,
) -> None:
    """Packs a copy of a float model, and says what that costs: perplexity, divergence, agreement, noise of the weights."""
    import torch

    from .api import quantize_
    from .comparison import arguments
    from .errors import CompareError
    from .evaluation import evaluate as run
    from .policy_file import policy_from

    with _shown():
        model, data = made_by(script)
        items = list(data)
        if not items:
            raise CompareError(f"{script} returned no inputs; evaluate needs at least one")
        packed = copy.deepcopy(model)
        args, kwargs = arguments(items[0])
        kwargs.pop("labels", None)
        with torch.no_grad():
            quantize_(packed, *args, policy=policy_from(policy), **kwargs)
        found = run(model, packed, items)
        typer.echo(found.to_json() if as_json else str(found))


def search(
    script: Script,
    budget: Annotated[str, typer.Option(help="'2.1 GB', '4.25 bits' or '1.2 ms'")],
    format: Annotated[list[str] | None, typer.Option(help="one to choose from, or float; give several")] = None,
    sensitivity: Annotated[str, typer.Option(help="measured, or curvature: estimated by gradients, faster")] = "measured",
    save: Annotated[Path | None, typer.Option(help="write everything as JSON there, for --policy and QCompileLM")] = None,
    plot: Annotated[Path | None, typer.Option(help="draw the front there: .png or .svg")] = None,
    as_json: Json = False,
) -> None:
    """Finds the formats, layer by layer, that cost least accuracy within a budget."""
    from .allocation import search as run

    with _shown():
        model, data = made_by(script)
        with _libraries_to_stderr():
            found = run(model, data, budget, formats=format or None, sensitivity=sensitivity)
        if save is not None:
            found.save(save)
        if plot is not None:
            found.plot(plot)
        typer.echo(found.to_json() if as_json else str(found))


@contextmanager
def _libraries_to_stderr() -> Iterator[None]:
    """HiGHS has lines that it prints to the process's standard output whatever its options say; JSON must stay apart."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


@contextmanager
def _shown() -> Iterator[None]:
    """Errors of ours as a line and an exit code."""
    try:
        yield
    except QCompileError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(1) from error
