"""The store: entries found and checked, made once by one process at a time, put aside when damaged, dropped when old.

An entry is a folder that is renamed into its place when it is complete, so whoever is killed leaves nothing behind that
could be taken for one. Locks are the kernel's: they go with the process that holds them. Without a folder that can be
written everything still works, and is made each time.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import CacheError, DamagedEntryError, OptionError
from .counters import MADE, count
from .entry import FILES, KEY, MANIFEST, Entry, check, read, touch
from .keys import SCHEMA, key_of

log = logging.getLogger(__name__)

DEFAULT_SIZE = "50G"
PATIENCE = 2.0
"""Seconds of waiting for another process before a message says so."""

USED: list[Callable[[str, Path], object]] = []
"""Called with the kind and the folder of each entry that is read or kept."""

_UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class Slot:
    """The place of one entry while this process is the one that makes it. ``found``: the folder, if it is there already."""

    def __init__(self, store: Store, kind: str, parts: Mapping[str, Any], found: Path | None) -> None:
        self.found = found
        self._store, self._kind, self._parts = store, kind, parts

    def put(self, fill: Callable[[Path], object]) -> Path | None:
        """Keeps what ``fill(folder)`` writes: every file of this kind. None, said once, where it cannot be kept."""
        count(MADE[self._kind])
        return self._store.keep(self._kind, self._parts, fill)


class Store:
    """What lies under ``root``, of ``bound`` bytes at most. Safe for any number of threads and processes."""

    def __init__(self, root: Path, bound: int) -> None:
        self.root, self.bound = root / f"store-{SCHEMA}", bound
        self._unscanned: int | None = None
        self._holding = threading.local()

    def find(self, kind: str, parts: Mapping[str, Any]) -> Path | None:
        """The folder of an entry, its files checked against what was written; None if there is none that is whole."""
        try:
            found = self._checked(kind, key_of(kind, parts))
        except DamagedEntryError:
            return None
        return _used(kind, found)

    @contextmanager
    def making(self, kind: str, parts: Mapping[str, Any]) -> Iterator[Slot]:
        """A :class:`Slot` whose entry is there, or which no other process fills meanwhile.

        Raises :class:`~qcompile.errors.FingerprintError` for ``parts`` that cannot be told in full.
        """
        key = key_of(kind, parts)
        found = self.find(kind, parts)
        with ExitStack() as stack:
            if found is None and self.bound:
                stack.enter_context(self._lock(kind, key))
                found = _used(kind, self._whole(kind, key))
            if found is not None:
                count(f"{kind} read")
            yield Slot(self, kind, parts, found)

    def keep(self, kind: str, parts: Mapping[str, Any], fill: Callable[[Path], object]) -> Path | None:
        """Writes an entry beside its place and renames it; the folder, or None where that is impossible."""
        if not self.bound:
            return None
        key = key_of(kind, parts)
        target, scratch = self._folder(kind, key), self.root / "unfinished" / f"{key}-{uuid.uuid4().hex}"
        try:
            scratch.mkdir(parents=True)
            try:
                fill(scratch)
                entry = Entry.of(kind, parts, scratch)
                (scratch / MANIFEST).write_text(entry.text())
                target.parent.mkdir(parents=True, exist_ok=True)
                os.rename(scratch, target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        except OSError as error:
            if self._is_there(kind, key):  # another process was faster: on a file system without locks
                return target
            count(f"{kind} given up")
            _say_once(self.root, _words(error))
            return None
        self._make_room(entry.nbytes)
        return _used(kind, target)

    def discard(self, kind: str, parts: Mapping[str, Any]) -> None:
        """Removes an entry that is of no more use, if it is there and can be removed."""
        try:
            self._drop(self._folder(kind, key_of(kind, parts)))
        except OSError as error:
            _say_once(self.root, _words(error))

    def entries(self) -> Iterator[tuple[Path, Entry | DamagedEntryError]]:
        """Every entry with what its ``entry.json`` says, or why it says nothing; files are not read."""
        for kind in FILES:
            for folder in _listed(self.root / kind):
                try:
                    yield folder, read(folder, kind, folder.name)
                except FileNotFoundError:
                    if folder.exists():
                        yield folder, DamagedEntryError(f"{kind}/{folder.name}: no {MANIFEST}")
                except OSError as error:
                    yield folder, DamagedEntryError(f"{kind}/{folder.name}: {MANIFEST} cannot be read ({error})")
                except DamagedEntryError as error:
                    yield folder, error

    def verify(self) -> list[DamagedEntryError]:
        """Reads every file of every entry, puts aside what is damaged, and returns what was wrong."""
        damaged = []
        for folder, entry in list(self.entries()):
            kind, key = folder.parent.name, folder.name
            try:
                if isinstance(entry, DamagedEntryError):
                    raise entry
                check(folder, entry)
            except DamagedEntryError as error:
                with self._lock(kind, key):
                    self._whole(kind, key)
                damaged.append(error)
            except FileNotFoundError:
                continue  # dropped by another process meanwhile
        return damaged

    def clear(self) -> int:
        """Removes every entry, what was put aside, and what killed processes left; returns how many entries there were.

        A process that is making an entry goes on, and keeps it or not. Raises :class:`~qcompile.errors.CacheError`.
        """
        number = sum(1 for _ in self.entries())
        try:
            parts = [p for p in self.root.iterdir() if p.name != "locks"] if self.root.exists() else []
            for part in parts:
                aside = self.root / f"cleared-{uuid.uuid4().hex}"
                with suppress(FileNotFoundError):  # cleared by another process meanwhile
                    os.rename(part, aside)  # entries go from their place at once, then file by file
                    shutil.rmtree(aside)
        except OSError as error:
            raise CacheError(f"cannot remove what lies in {self.root}: {error}") from error
        return number

    def folder(self, name: str) -> Path:
        """A folder of the store: ``quarantine`` or a kind of entry."""
        return self.root / name

    def _folder(self, kind: str, key: str) -> Path:
        return self.root / kind / key

    def _checked(self, kind: str, key: str) -> Path | None:
        """The folder of a whole entry, None without one. Raises :class:`DamagedEntryError`."""
        folder = self._folder(kind, key)
        try:
            check(folder, read(folder, kind, key))
            touch(folder)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not folder.exists():
                return None
            raise DamagedEntryError(f"{kind}/{key}: cannot be read ({error})") from error
        return folder

    def _is_there(self, kind: str, key: str) -> bool:
        try:
            return self._checked(kind, key) is not None
        except DamagedEntryError:
            return False

    def _whole(self, kind: str, key: str) -> Path | None:
        """As :meth:`_checked`, under the entry's lock: a damaged entry is put aside, so that it is made again."""
        try:
            return self._checked(kind, key)
        except DamagedEntryError as error:
            count("quarantined")
            log.warning("a damaged entry of the cache is put aside and made again: %s", error)
            aside = self.root / "quarantine" / f"{kind}-{key}-{uuid.uuid4().hex[:8]}"
            try:
                aside.parent.mkdir(parents=True, exist_ok=True)
                os.rename(self._folder(kind, key), aside)
            except OSError as failed:
                _say_once(self.root, _words(failed))
            return None

    @contextmanager
    def _lock(self, kind: str, key: str) -> Iterator[None]:
        """Held by one thread of one process for each key. Not nested: the inner entry may be made twice, but nobody waits
        for each other. Goes on without a lock, and says so once, where the file system has none."""
        from filelock import FileLock, Timeout

        if getattr(self._holding, "some", False):
            yield
            return
        lock = FileLock(self.root / "locks" / key[:2], is_singleton=False)
        try:
            (self.root / "locks").mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=PATIENCE)
            except Timeout:
                count("waits")
                log.warning("another process is making %s %s; waiting for it", kind, key[:12])
                lock.acquire()
        except (OSError, NotImplementedError) as error:
            _say_once(self.root, _words(error))
        self._holding.some = lock.is_locked
        try:
            yield
        finally:
            self._holding.some = False
            lock.release()

    def _make_room(self, added: int) -> None:
        """Drops what was not used for longest; looks again once more than a hundredth of the bound was added."""
        if self._unscanned is not None and self._unscanned + added < self.bound // 100:
            self._unscanned += added
            return
        self._unscanned = 0
        used = []
        for folder, entry in self.entries():
            with suppress(FileNotFoundError):  # dropped by another process meanwhile
                size = entry.nbytes if isinstance(entry, Entry) else 0
                used.append(((folder / MANIFEST).stat().st_mtime, folder, size))
        total = sum(size for _, _, size in used)
        for _, folder, size in sorted(used):
            if total <= self.bound:
                break
            self._drop(folder)
            count("dropped")
            total -= size
        self._sweep()

    def _drop(self, folder: Path) -> None:
        aside = self.root / "unfinished" / f"{folder.name}-{uuid.uuid4().hex}"
        try:
            aside.parent.mkdir(parents=True, exist_ok=True)
            os.rename(folder, aside)
        except FileNotFoundError:
            return  # it is not there, or was dropped by another process meanwhile
        shutil.rmtree(aside, ignore_errors=True)

    def _sweep(self) -> None:
        """Removes what killed processes left unfinished: whatever lies there while nobody holds its key's lock."""
        from filelock import FileLock, Timeout

        for scratch in _listed(self.root / "unfinished"):
            try:
                with FileLock(self.root / "locks" / scratch.name[:2], timeout=0, is_singleton=False):
                    shutil.rmtree(scratch, ignore_errors=True)
            except Timeout:
                continue  # its maker is alive


def _used(kind: str, folder: Path | None) -> Path | None:
    if folder is not None:
        for listener in USED:
            listener(kind, folder)
    return folder


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if KEY.match(p.name))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _words(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {error}"


@functools.cache
def _say_once(root: Path, why: str) -> None:
    log.warning("the cache in %s cannot be written: %s; going on without keeping what is made. Set QCOMPILE_CACHE_DIR to a "
                "folder that can be written, or QCOMPILE_CACHE_SIZE to 0", root, why)  # fmt: skip


def bytes_of(text: str) -> int:
    """``"50G"`` → 50·10⁹. Raises :class:`~qcompile.errors.OptionError` naming the variable."""
    number, unit = (text[:-1], text[-1]) if text[-1:].upper() in _UNITS else (text, "")
    if not number.replace(".", "", 1).isdigit():
        raise OptionError(f"QCOMPILE_CACHE_SIZE={text!r}: expected a number of bytes, or one with K, M, G or T: 50G; 0 keeps "
                          "nothing")  # fmt: skip
    return int(float(number) * _UNITS.get(unit.upper(), 1))


def the_store() -> Store:
    """The store that the environment names: ``$QCOMPILE_CACHE_DIR``, else the user's cache folder."""
    return _store(os.environ.get("QCOMPILE_CACHE_DIR"), os.environ.get("QCOMPILE_CACHE_SIZE") or DEFAULT_SIZE)


@functools.cache
def _store(directory: str | None, size: str) -> Store:
    if directory is None:
        import platformdirs

        directory = platformdirs.user_cache_dir("qcompile")
    return Store(Path(directory).absolute(), bytes_of(size))
