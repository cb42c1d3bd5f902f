"""Pages of freed blocks go back to the system, those of other threads' heaps as well, and large blocks lie in no heap."""

import ctypes
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompile
from qcompile.passes import heap
from qcompile.passes.session import Session

SIZE, BLOCKS = 100 << 10, 2000
"""Blocks that glibc takes from a heap and not by mmap."""


def resident() -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) << 10


pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc gives pages back when asked")


class Mallinfo(ctypes.Structure):
    """``struct mallinfo2`` (mallinfo(3)); ``hblkhd``: bytes in blocks that are mapped by themselves."""

    names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in names]


def mapped() -> int:
    found = ctypes.CDLL(None).mallinfo2
    found.restype = Mallinfo
    return int(found().hblkhd)


def is_apart(nbytes: int) -> bool:
    """Whether a new tensor has a mapping of its own."""
    before = mapped()
    made = torch.empty(nbytes, dtype=torch.uint8)
    return mapped() - before >= made.nbytes


def test_large_blocks_lie_in_no_heap_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    with heap.large_blocks_apart():
        assert is_apart(2 << 20) and not is_apart(1 << 16)
    assert not is_apart(2 << 20) and is_apart(64 << 20)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(heap.MOST))
    with heap.large_blocks_apart():
        assert not is_apart(2 << 20)


def test_calibration_takes_them_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    with heap.large_blocks_apart():
        pass  # from now on they are not, elsewhere
    found, serve = [], Session.serve

    def looks(self: Session, *arguments: Any) -> None:
        found.append(is_apart(2 << 20))
        serve(self, *arguments)

    monkeypatch.setattr(Session, "serve", looks)
    qcompile.calibrate(torch.nn.Sequential(torch.nn.Linear(64, 64)), [torch.randn(8, 64)], policy="int8", progress=False)
    assert found == [True] and not is_apart(2 << 20)


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
