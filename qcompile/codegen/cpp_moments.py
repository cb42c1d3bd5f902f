"""The sums of :mod:`qcompile.formats.moments` in C++, compiled once on a machine: what quantizing spends its time on."""

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
    tensors = [None if t is None else t.contiguous() for t in (rounding.table, x, w, inverse, offset)]
    out = torch.empty(3, *inverse.shape)
    numbers = (rounding.low, rounding.high, rounding.shift, rounding.factor)
    sizes = (x.shape[1], x.shape[0], len(inverse))
    library(*numbers, *(None if t is None else t.data_ptr() for t in tensors), *sizes, out.data_ptr(), torch.get_num_threads())
    return out[0], out[1], out[2]


@functools.cache
def _library() -> ctypes._CFuncPtr | None:  # type: ignore[name-defined]
    text = (resources.files(__package__) / "include" / "moments.cpp").read_text()
    try:
        function = load_library(text)[0].qc_moments
    except KernelBuildError as error:
        warnings.warn(f"weights are quantized in PyTorch, with the same results but slower: {error}", stacklevel=2)
        return None
    function.argtypes = [FLOATS] * 4 + [POINTER] * 5 + [ctypes.c_int64] * 3 + [POINTER, ctypes.c_int]
    function.restype = None
    return function
