"""Memory of packed planes: on Linux in huge pages, where the system gives them.

A kernel of few rows does little but read planes. CPUs prefetch up to the end of a page, which comes every 4 KiB in ordinary
memory and every 2 MiB in huge pages: on one core they are read 3 to 20 % faster.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable, Sequence

import torch

HUGE = 1 << 21
"""Bytes of a huge page on x86-64, and on ARM64 with pages of 4 KiB."""


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """As ``torch.empty``."""
    made = torch.empty(shape, dtype=dtype, device=device)
    real = not torch.compiler.is_compiling() and type(made) is torch.Tensor and made.device.type == "cpu"
    if real and made.nbytes >= 2 * HUGE and (advise := _madvise()) is not None:
        start, end = made.data_ptr(), made.data_ptr() + made.nbytes
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        advise(first, last - first, mmap.MADV_HUGEPAGE)  # a wish: where the kernel has none, nothing changes
    return made


def copy(plane: torch.Tensor) -> torch.Tensor:
    """``plane`` in memory of its own, which starts at a cache line."""
    return empty(plane.shape, plane.dtype, plane.device).copy_(plane)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    found = ctypes.CDLL(None).madvise
    found.argtypes, found.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return found  # type: ignore[no-any-return]
