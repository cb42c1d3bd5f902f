"""Memory that was let go of and is not the system's again: the C library keeps up to 64 MiB of it in each thread's heap."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def trim() -> None:
    """Gives back all free pages of all heaps, in a few milliseconds. C libraries other than glibc have no call for it, and
    most of them keep less."""
    if (call := _malloc_trim()) is not None:
        call(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # TypeError: on Windows no library is named None
        return None
    found.argtypes, found.restype = (ctypes.c_size_t,), ctypes.c_int
    return found  # type: ignore[no-any-return]
