"""``qcompile cache …``: what the cache holds, whether it is whole, and how it gets to other machines."""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .errors import CacheError, QCompileError
from .report.table import size
from .store import bundle as bundles
from .store import the_store
from .store.entry import MANIFEST, Entry

app = typer.Typer(no_args_is_help=True, help="What was made once on this machine, and need not be made again.")

Bundle = Annotated[Path, typer.Argument(help="A file, by custom *.tar.")]
Trust = Annotated[bool, typer.Option(help="Take sources and compiled libraries as they are: they are code that will run.")]


@app.command("list")
def list_() -> None:
    """Lists the entries, the least recently used first: those that go first when room is needed."""
    rows = []
    for folder, entry in the_store().entries():
        what = describe(entry) if isinstance(entry, Entry) else f"damaged: {entry}"
        used = (folder / MANIFEST).stat().st_mtime if (folder / MANIFEST).exists() else 0.0
        rows.append((used, folder.parent.name, folder.name[:12], what, entry.nbytes if isinstance(entry, Entry) else 0))
    table = Table("kind", "key", "what", "bytes", "last used")
    for used, kind, key, what, nbytes in sorted(rows):
        table.add_row(kind, key, what, size(nbytes), time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(used)))
    Console().print(table)


@app.command()
def info() -> None:
    """Prints the folder, its bound, and how much of each kind there is."""
    store = the_store()
    number: dict[str, int] = defaultdict(int)
    nbytes: dict[str, int] = defaultdict(int)
    for folder, entry in store.entries():
        number[folder.parent.name] += 1
        nbytes[folder.parent.name] += entry.nbytes if isinstance(entry, Entry) else 0
    table = Table("kind", "entries", "bytes")
    for kind in number:
        table.add_row(kind, str(number[kind]), size(nbytes[kind]))
    console = Console()
    console.print(table)
    aside = store.folder("quarantine")
    typer.echo(f"folder       {store.root}")
    typer.echo(f"size         {size(sum(nbytes.values()))} of {size(store.bound)} (QCOMPILE_CACHE_SIZE)")
    typer.echo(f"put aside    {len(list(aside.iterdir())) if aside.exists() else 0} damaged entries in {aside}")


@app.command()
def verify() -> None:
    """Reads every entry, puts damaged ones aside, and says which; exits with 1 if there were any."""
    store = the_store()
    number = sum(1 for _ in store.entries())
    damaged = store.verify()
    for error in damaged:
        typer.echo(f"put aside: {error}")
    typer.echo(f"{number - len(damaged)} of {number} entries are whole")
    if damaged:
        raise typer.Exit(1)


@app.command()
def clear() -> None:
    """Removes all entries; processes that are using them go on."""
    store = the_store()
    with _shown():
        typer.echo(f"{store.clear()} entries removed from {store.root}")


@app.command("export")
def export_(file: Bundle) -> None:
    """Writes all whole entries to one file for other machines."""
    with _shown():
        typer.echo(f"{bundles.export(the_store(), file)} entries written to {file}")


@app.command("import")
def import_(file: Bundle, trust: Trust = False) -> None:
    """Takes the entries of a bundle. Without --trust, code is not taken but made again here, where it is the same."""
    from .trust import Verified

    with _shown():
        if trust:
            taken, left = bundles.load(the_store(), file)
            typer.echo(f"{taken} entries taken from {file}")
        else:
            verified = Verified()
            taken, left = bundles.load(the_store(), file, verified)
            typer.echo(f"{taken} entries taken from {file}, {verified.compiled} libraries compiled from verified sources")
            if left > verified.compiled:
                typer.echo(f"{left - verified.compiled} left: code that this installation does not make, or data that cannot be "
                           "read here; --trust takes them")  # fmt: skip


class _shown:
    """Errors of ours as a line and an exit code."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, QCompileError):
            typer.echo(f"{'error' if isinstance(error, CacheError) else type(error).__name__}: {error}", err=True)
            raise typer.Exit(1) from error


def describe(entry: Entry) -> str:
    """What an entry is, for people."""
    parts: dict[str, Any] = dict(entry.parts)
    if entry.kind == "packed":
        how = parts["rounding"] if isinstance(parts["rounding"], str) else parts["rounding"][0]
        shape = "×".join(map(str, parts["shape"]))
        return f"{parts['dtype'].removeprefix('torch.')} {shape} as {parts['format'].partition('@')[0]}, {how}"
    if entry.kind == "source":
        return f"{parts['language']}: " + ", ".join(s.replace("@", " ").split()[0] for s in parts["schemes"])
    if entry.kind == "library":
        return f"{Path(parts['compiler']).name} {' '.join(f for f in parts['flags'] if f.startswith(('-m', '-D')))}".strip()
    if entry.kind == "plan":
        return f"graph {parts['graph'][:12]}: the same over packed weights"
    if entry.kind == "tile":
        tile = parts["variant"]["tile"]
        return f"{parts['scheme'].partition('@')[0]} spills on sm_{parts['arch']}: {tile['rows']} rows, {tile['tiles']} tiles"
    if entry.kind == "product":
        sizes = f"{parts['rows']} rows and more of {parts['dtype']} by {parts['n']}×{parts['k']}"
        return f"times of {sizes} as {parts['scheme'].partition('@')[0]}"
    if entry.kind == "sensitivity":
        return f"loss by {parts['layer']} as {parts['scheme'].partition('@')[0]}"
    return f"GPTQ of {len(parts['formats'])} weights"
