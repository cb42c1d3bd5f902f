"""The sums of :mod:`qcompile.formats.moments` and the search for scales in C++, compiled once on a machine: what quantizing
spends its time on."""

from __future__ import annotations

import ctypes
import functools
import warnings
from importlib import resources

import torch

from ..errors import KernelBuildError
from ..formats.moments import Rounding, Three
from .cpp_build import load_library

SMALL = 1 << 14
"""Weights below which a library is not worth its loading."""

FLOATS, POINTER = ctypes.c_float, ctypes.c_void_p


def moments(
    rounding: Rounding, x: torch.Tensor, w: torch.Tensor | None, inverse: torch.Tensor, offset: torch.Tensor | None
) -> Three | None:
    """As :func:`qcompile.formats.moments.moments`, whose bits they are; None for few weights, and where nothing compiles C++."""
    if x.numel() < SMALL or (library := _library()) is None:
        return None
    out = torch.empty(3, *inverse.shape)
    arguments = [*_given(rounding), *_pointers(x, w, inverse, offset), x.shape[1], x.shape[0], len(inverse)]
    library.qc_moments(*arguments, out.data_ptr(), torch.get_num_threads())
    return out[0], out[1], out[2]


def search(
    rounding: Rounding, x: torch.Tensor, w: torch.Tensor | None, sums: torch.Tensor, starts: torch.Tensor, shares: torch.Tensor,
    planes: tuple[int, ...],
) -> torch.Tensor | None:  # fmt: skip
    """As :class:`qcompile.formats.moments.Native` says; None for few weights, and where nothing compiles C++."""
    if x.numel() < SMALL or (library := _library()) is None:
        return None
    out = torch.empty_like(starts)
    arguments = [*_given(rounding), *_pointers(x, w, sums, starts, shares), shares.shape[1], x.shape[1], x.shape[0]]
    library.qc_search(*arguments, (ctypes.c_int * len(planes))(*planes), out.data_ptr(), torch.get_num_threads())
    return out


def _given(rounding: Rounding) -> tuple[float | int | None, ...]:
    table = None if rounding.table is None else rounding.table.data_ptr()
    return rounding.low, rounding.high, rounding.shift, rounding.factor, table


def _pointers(*tensors: torch.Tensor | None) -> list[int | None]:
    """Addresses of contiguous tensors, which their callers keep alive."""
    assert all(t is None or t.is_contiguous() for t in tensors)
    return [None if t is None else t.data_ptr() for t in tensors]


@functools.cache
def _library() -> ctypes.CDLL | None:
    text = (resources.files(__package__) / "include" / "moments.cpp").read_text()
    try:
        library = load_library(text)[0]
    except KernelBuildError as error:
        warnings.warn(f"weights are quantized in PyTorch, with the same results but slower: {error}", stacklevel=2)
        return None
    rule, number = [FLOATS] * 4 + [POINTER], ctypes.c_int64
    library.qc_moments.argtypes = [*rule, *[POINTER] * 4, *[number] * 3, POINTER, ctypes.c_int]
    library.qc_search.argtypes = [*rule, *[POINTER] * 5, *[number] * 3, POINTER, POINTER, ctypes.c_int]
    library.qc_moments.restype = library.qc_search.restype = None
    return library
