"""A store in one file, for other machines: a plain tar of entries, which is believed in nothing when it is read.

Members are ``<kind>/<key>/<file>``, ``entry.json`` first. Reading refuses every other name, links, sparse and oversized
members, files that are not what ``entry.json`` says, and an ``entry.json`` that does not give the entry its name. A bundle with
one such member changes nothing.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import CacheError, DamagedEntryError
from .entry import FILES, LONGEST_MANIFEST, MANIFEST, Entry, check
from .store import Store

NAME = re.compile(rf"({'|'.join(FILES)})/([0-9a-f]{{64}})/([a-z.]+)")
MOST_MEMBERS = 1_000_000


def export(store: Store, file: Path) -> int:
    """Writes every whole entry of ``store`` to ``file``, which appears when it is complete; returns their number.

    Raises :class:`~qcompile.errors.CacheError` when the file cannot be written.
    """
    number = 0
    scratch: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=file.absolute().parent, delete=False) as out:
            scratch = Path(out.name)
            with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for folder, entry in store.entries():
                    number += isinstance(entry, Entry) and add(tar, folder, entry)
        os.replace(scratch, file)
    except OSError as error:
        if scratch is not None:
            scratch.unlink(missing_ok=True)
        raise CacheError(f"cannot write the bundle {file}: {error}") from error
    return number


def add(tar: tarfile.TarFile, folder: Path, entry: Entry) -> bool:
    """Adds the entry in ``folder`` to ``tar``; returns whether it was whole: it may have been dropped meanwhile."""
    try:
        check(folder, entry)
        files = {MANIFEST: entry.text().encode()} | {name: (folder / name).read_bytes() for name in entry.files}
    except (DamagedEntryError, FileNotFoundError):
        return False
    for name, content in files.items():
        member = tarfile.TarInfo(f"{entry.kind}/{entry.key}/{name}")
        member.size, member.mode = len(content), 0o644
        tar.addfile(member, io.BytesIO(content))
    return True


def load(store: Store, file: Path, accept: Callable[[Entry, Path], bool] = lambda entry, folder: True) -> tuple[int, int]:
    """Reads a bundle into ``store``; returns (entries taken, entries left).

    ``accept(entry, folder)`` is asked of every entry once its files are as ``entry.json`` says: whether to take it. Raises
    :class:`~qcompile.errors.CacheError`, naming the member, for a bundle that is not wholly as :func:`export` writes them, and
    takes nothing of it then.
    """
    place = store.folder("unfinished")
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(f"cannot write to {place}: {error}") from error
    with tempfile.TemporaryDirectory(prefix="import-", dir=place) as scratch:
        try:
            entries = list(_unpacked(file, Path(scratch), store.bound))
        except (OSError, tarfile.TarError, CacheError) as error:
            raise CacheError(f"bundle {file}: {error}; nothing of it was taken") from error
        taken = [(folder, entry) for folder, entry in entries if accept(entry, folder)]
        for folder, entry in taken:
            with store.making(entry.kind, entry.parts) as slot:
                if slot.found is None:
                    put(store, entry, folder)
    return len(taken), len(entries) - len(taken)


def put(store: Store, entry: Entry, folder: Path) -> None:
    """Keeps an entry whose files lie in ``folder``. Raises :class:`~qcompile.errors.CacheError` where it cannot be kept."""
    copied = store.keep(entry.kind, entry.parts, lambda to: [shutil.copyfile(folder / n, to / n) for n in entry.files])
    if copied is None:
        raise CacheError(f"{entry.kind}/{entry.key} cannot be kept in {store.root}: see the warning before")


def _unpacked(file: Path, scratch: Path, bound: int) -> Iterator[tuple[Path, Entry]]:
    """Each entry of a bundle, with the folder that its files were written to. Raises ``CacheError`` and what tar raises."""
    total, entry, missing = 0, None, set[str]()
    with tarfile.open(file, "r:") as tar:
        for number, member in enumerate(tar):
            match = NAME.fullmatch(member.name)
            if match is None or member.type != tarfile.REGTYPE or member.sparse is not None or number > MOST_MEMBERS:
                raise CacheError(f"member {number} {member.name!r:.120} is no file of an entry")
            kind, key, name = match.groups()
            total += member.size
            if total > bound or (name == MANIFEST and member.size > LONGEST_MANIFEST):
                raise CacheError(f"member {member.name} takes {member.size} bytes, more than there is room for ({bound} in all)")
            folder = scratch / kind / key
            stream = tar.extractfile(member)
            assert stream is not None
            if name == MANIFEST:
                if missing:
                    raise CacheError(f"{member.name} comes before {', '.join(sorted(missing))} of the entry before it")
                entry = Entry.parse(stream.read(), kind, key)
                folder.mkdir(parents=True)
                missing = set(entry.files)
                continue
            if entry is None or (kind, key) != (entry.kind, entry.key) or name not in missing:
                raise CacheError(f"{member.name} belongs to no {MANIFEST} before it")
            if member.size != entry.files[name][0]:
                raise CacheError(f"{member.name} has {member.size} bytes, {MANIFEST} says {entry.files[name][0]}")
            with open(folder / name, "xb") as out:
                shutil.copyfileobj(stream, out)
            missing.discard(name)
            if not missing:
                check(folder, entry)
                yield folder, entry
    if missing:
        raise CacheError(f"it ends before {', '.join(sorted(missing))} of the last entry")
