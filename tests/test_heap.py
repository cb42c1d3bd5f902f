"""Pages of freed blocks go back to the system, those of other threads' heaps as well, and large blocks lie in no heap."""

import ctypes
import os
import subprocess
import sys
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


def alone(function: str) -> None:
    """Runs a function of this file in a process whose heap has no large block free, with glibc as it is by itself."""
    env = {k: v for k, v in os.environ.items() if k not in ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")}
    program = f"import sys; sys.path.insert(0, sys.argv[1]); import test_heap; test_heap.{function}()"
    done = subprocess.run([sys.executable, "-c", program, str(Path(__file__).parent)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def large_blocks() -> None:
    with heap.large_blocks_apart():
        assert is_apart(30 << 20) and not is_apart(1 << 16)
    assert not is_apart(30 << 20) and is_apart(64 << 20)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(heap.MOST)
    with heap.large_blocks_apart():
        assert not is_apart(29 << 20)


def calibration() -> None:
    found, serve = [], Session.serve

    def looks(self: Session, *arguments: Any) -> None:
        found.append(is_apart(30 << 20))
        serve(self, *arguments)

    Session.serve = looks  # type: ignore[method-assign]
    qcompile.calibrate(torch.nn.Sequential(torch.nn.Linear(64, 64)), [torch.randn(8, 64)], policy="int8", progress=False)
    assert found == [True] and not is_apart(30 << 20)


def test_large_blocks_lie_in_no_heap_meanwhile() -> None:
    alone("large_blocks")


def test_calibration_takes_them_apart() -> None:
    alone("calibration")


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
