"""Memory of packed planes: on Linux in huge pages, where the system gives them.

A kernel of few rows does little but read planes. CPUs prefetch up to the end of a page, which comes every 4 KiB in ordinary
memory and every 2 MiB in huge pages: on one core they are read 3 to 20 % faster. The memory is mapped for the tensor alone, for
what is advised stays so: in a heap, small blocks that come later would take 2 MiB each.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch

HUGE = 1 << 21
"""Bytes of a huge page on x86-64, and on ARM64 with pages of 4 KiB."""


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """As ``torch.empty``; on CPUs large ones start at a page, and their storage cannot be resized."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < 2 * HUGE or not hasattr(mmap, "MADV_HUGEPAGE") or _without_values():
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages; nothing depends on the wish
        memory.madvise(mmap.MADV_HUGEPAGE)
    storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    made = torch.empty(shape, dtype=dtype, device="meta")
    return torch.empty(0, dtype=dtype).set_(storage, 0, made.shape, made.stride())  # a view has a base, which compilers look at


def copy(plane: torch.Tensor) -> torch.Tensor:
    """``plane`` in memory of its own, which starts at a cache line."""
    return empty(plane.shape, plane.dtype, plane.device).copy_(plane)


def _without_values() -> bool:
    """Whether tensors are fake where this is called: not in a backend, which Dynamo calls with real ones."""
    return torch.compiler.is_dynamo_compiling() or type(torch.empty(0)) is not torch.Tensor
