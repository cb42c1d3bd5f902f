"""One kept thing on disk: a folder named by its key, with its files and ``entry.json``, which tells what they must be."""

from __future__ import annotations

import json
import os
import re
import stat
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from ..errors import DamagedEntryError
from .keys import SCHEMA, key_of, key_of_plain, plain

FILES = {
    "packed": ("planes.safetensors",),
    "source": ("source.txt",),
    "library": ("library.so", "source.cpp"),
    "calibration": ("rounded.json",),
    "plan": ("plan.json",),
    "tile": ("tile.json",),
    "product": ("times.json",),
    "sensitivity": ("loss.json",),
}
"""The files of each kind of entry; sources before the libraries that are compiled from them."""

BUFFER = 1 << 20
"""Bytes of a file that are read at a time."""

MANIFEST = "entry.json"
LONGEST_MANIFEST = 1 << 20
KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """What ``entry.json`` says: the ``parts`` that name the entry, and (bytes, BLAKE3) of each of its ``files``."""

    kind: str
    key: str
    parts: Mapping[str, Any]
    files: Mapping[str, tuple[int, str]]

    @property
    def nbytes(self) -> int:
        return sum(size for size, _ in self.files.values())

    def text(self) -> str:
        """What is written as ``entry.json``."""
        content = {"schema": SCHEMA, "kind": self.kind, "parts": plain(self.parts), "files": self.files}
        return json.dumps(content, indent=1, sort_keys=True) + "\n"

    @staticmethod
    def of(kind: str, parts: Mapping[str, Any], folder: Path) -> Entry:
        """That of files which lie in ``folder``."""
        files = {name: ((folder / name).stat().st_size, digest_of(folder / name)) for name in FILES[kind]}
        return Entry(kind, key_of(kind, parts), parts, files)

    @staticmethod
    def parse(text: str | bytes, kind: str, key: str) -> Entry:
        """Reads ``entry.json`` of the entry ``kind/key``; raises :class:`DamagedEntryError` for what that cannot be."""
        try:
            content = json.loads(text)
            files = {str(n): (int(size), str(digest)) for n, (size, digest) in content["files"].items()}
            found = content["schema"], content["kind"], tuple(sorted(files)), key_of_plain(kind, content["parts"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedEntryError(f"{kind}/{key}: {MANIFEST} cannot be read ({type(error).__name__}: {error})") from error
        wanted = SCHEMA, kind, tuple(sorted(FILES.get(kind, ()))), key
        if found != wanted:
            raise DamagedEntryError(f"{kind}/{key}: {MANIFEST} is that of another entry: found {found}, expected {wanted}")
        return Entry(kind, key, content["parts"], files)


def read(folder: Path, kind: str, key: str) -> Entry:
    """The entry in ``folder``. Raises ``FileNotFoundError`` without ``entry.json``, ``OSError`` if that is a link, and
    :class:`DamagedEntryError`."""
    with open(os.open(folder / MANIFEST, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        return Entry.parse(file.read(LONGEST_MANIFEST), kind, key)


def check(folder: Path, entry: Entry) -> None:
    """Compares the files with what ``entry`` says. Raises :class:`DamagedEntryError`, ``OSError`` if one cannot be read."""
    for name, (size, digest) in entry.files.items():
        path = folder / name
        try:
            status = path.lstat()
            found = status.st_size if stat.S_ISREG(status.st_mode) else None
        except FileNotFoundError:
            found = None
        if found != size:
            raise DamagedEntryError(f"{entry.kind}/{entry.key}: {name} has {found} bytes, {size} were written")
        if digest_of(path) != digest:
            raise DamagedEntryError(f"{entry.kind}/{entry.key}: {name} is not what was written: its BLAKE3 digest differs")


def digest_of(path: Path) -> str:
    """BLAKE3 of a file, 64 hex digits. It is read, and not mapped: who cuts a mapped file short ends the process."""
    found, buffer = blake3(), _buffer()
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            found.update(buffer[:size])
    return found.hexdigest()


def _buffer() -> memoryview:
    """One for each thread: memory that is new has to be given page by page."""
    if not hasattr(_own, "buffer"):
        _own.buffer = memoryview(bytearray(BUFFER))
    buffer: memoryview = _own.buffer
    return buffer


_own = threading.local()


def touch(folder: Path) -> None:
    """Notes that an entry was used, for eviction; a folder that cannot be written has nothing to evict."""
    if os.access(folder / MANIFEST, os.W_OK):
        os.utime(folder / MANIFEST)
