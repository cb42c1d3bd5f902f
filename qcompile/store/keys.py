"""Names of what is kept: the digest of everything that it was made from. What cannot be told in full has no name."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from ..errors import FingerprintError

SCHEMA = 2
"""Version of names and of the files beside them."""

SOURCES = (".py", ".h", ".cpp")


def plain(value: Any) -> Any:
    """``value`` as JSON has it. Raises :class:`FingerprintError` for what is not text, number, None, list or dict of such."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [plain(v) for v in value]
    raise FingerprintError(f"{type(value).__name__} {value!r:.80} has no fingerprint, so nothing made from it is kept; "
                           "give its contents as text or numbers")  # fmt: skip


def key_of(kind: str, parts: Mapping[str, Any]) -> str:
    """SHA-256, 64 hex digits, over the kind and all ``parts`` of what an entry was made from; errors as :func:`plain`."""
    return key_of_plain(kind, plain(parts))


def key_of_plain(kind: str, parts: Any) -> str:
    """:func:`key_of` for ``parts`` that are JSON already."""
    text = json.dumps([SCHEMA, kind, parts], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def code_version(*packages: str) -> str:
    """SHA-256 over the sources of ``packages`` (names as in ``import``), headers of kernels included."""
    digest = hashlib.sha256()
    for package in packages:
        for name, file in _sources(package, resources.files(package)):
            digest.update(f"{name}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _sources(name: str, folder: Traversable) -> list[tuple[str, Traversable]]:
    found = []
    for item in sorted(folder.iterdir(), key=lambda i: i.name):
        if item.name.endswith(SOURCES):
            found.append((f"{name}/{item.name}", item))
        elif item.is_dir() and item.name != "__pycache__":
            found += _sources(f"{name}/{item.name}", item)
    return found
