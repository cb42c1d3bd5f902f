"""Pages of freed blocks go back to the system, those of other threads' heaps as well."""

import ctypes
import threading
from pathlib import Path

import pytest

from qcompile.passes import heap

SIZE, BLOCKS = 100 << 10, 2000
"""Blocks that glibc takes from a heap and not by mmap."""


def resident() -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) << 10


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc gives pages back when asked")
def test_free_pages_between_blocks_in_use_are_given_back() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    kept: list[int] = []

    def fills() -> None:
        made = [libc.malloc(SIZE) for _ in range(BLOCKS)]
        for block in made:
            ctypes.memset(block, 1, SIZE)
        kept.extend(made[::50])  # so that no heap can shrink from its end
        for block in set(made) - set(kept):
            libc.free(block)

    worker = threading.Thread(target=fills)
    worker.start()
    worker.join()
    before = resident()
    heap.trim()
    assert before - resident() > SIZE * BLOCKS // 2
    for block in kept:
        libc.free(block)
