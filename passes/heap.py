"""Memory that was let go of and is not the system's again: glibc keeps up to 64 MiB of it in each thread's heap.

It maps large blocks by themselves, and gives them back when they are freed. But the first one that is freed raises what "large"
means to its size, up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD): from then on activations and rows of weights lie in heaps, and the
pages between those that live are kept. Other C libraries have no such calls, and most of them keep less.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Iterator

LARGE = 1 << 20
"""Bytes of the smallest block that is mapped by itself while :func:`large_blocks_apart`."""

TRIM_THRESHOLD, MMAP_THRESHOLD, MOST = -1, -3, 32 << 20
"""Parameters of ``mallopt`` (malloc.h), and the largest threshold, which any process that frees large tensors comes to."""


def trim() -> None:
    """Gives back all free pages of all heaps, in a few milliseconds."""
    if (call := _glibc("malloc_trim", ctypes.c_size_t)) is not None:
        call(0)


@contextlib.contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Meanwhile blocks of :data:`LARGE` bytes and more lie in no heap; afterwards only those of 32 MiB. Where the environment
    says which (``MALLOC_MMAP_THRESHOLD_``, ``GLIBC_TUNABLES``), that stays."""
    call = _glibc("mallopt", ctypes.c_int, ctypes.c_int)
    if call is None or {"MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"} & os.environ.keys():
        yield
        return
    call(MMAP_THRESHOLD, LARGE)
    try:
        yield
    finally:
        call(MMAP_THRESHOLD, MOST)
        call(TRIM_THRESHOLD, 2 * MOST)  # which glibc makes of it by itself, unless it was set


@functools.cache
def _glibc(name: str, *arguments: type) -> Callable[..., int] | None:
    try:
        library = ctypes.CDLL(None)
        found = getattr(library, name) if hasattr(library, "malloc_trim") else None
    except (OSError, TypeError):  # TypeError: on Windows no library is named None
        return None
    if found is not None:
        found.argtypes, found.restype = arguments, ctypes.c_int
    return found  # type: ignore[no-any-return]
