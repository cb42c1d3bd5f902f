"""CPU kernels: one C++ source and one shared library for each scheme, called through ctypes.

The source is the format printed as a struct (:mod:`.cpp_format`) between skeletons that are blind to formats
(``include/*.h``). Few rows of x read every weight once and decode it in registers; many rows decode a panel of weights
into cache and multiply it in register tiles.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

import torch

from ..errors import LayoutError
from ..formats.layout import check_planes
from ..formats.scheme import Scheme
from ..formats.spec import ROW, TILE_N
from .cpp_build import load_library
from .cpp_call import caller
from .cpp_format import format_struct
from .cpp_many import Product, has_matrix_units
from .cpp_scale import element_type
from .kept import kept_source

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Float dtypes of x, y and bias and their numbers in the C interface."""

LONGEST_INT_ROW = 131072
"""Largest K whose int8 products, summed without scales in between, stay inside int32: 128 · 127 · K < 2^31."""

_BEFORE = ("simd.h", "convert.h", "dot.h", "layer.h", "job.h")
_AFTER = ("rows.h", "panel.h", "entry.h")


def source(scheme: Scheme) -> str:
    """The whole C++ source of ``scheme``. Raises :class:`FormatError` when the format cannot be printed."""
    folder = resources.files(__package__) / "include"
    headers = {name: (folder / name).read_text() for name in (*_BEFORE, *_AFTER)}
    before, after = ("\n".join(headers[n] for n in names) for names in (_BEFORE, _AFTER))
    return f"{before}\n{format_struct(scheme)}\n{after}\n{_exports(scheme)}"


def _exports(scheme: Scheme) -> str:
    planes = [(element_type(p), p.name) for p in scheme.format.parts]
    parameters = ", ".join(f"const {kind}* plane_{name}" for kind, name in planes)
    values = "{" + ", ".join(f"plane_{name}" for _, name in planes) + "}"
    return f"""#define QC_EXPORT extern "C" __attribute__((visibility("default")))

QC_EXPORT int qc_linear(const Layer* layers, int64_t count, const void* x, int dtype, int threads, int64_t m, int64_t k,
                        int64_t padded, int64_t stride) {{
  Job job = {{}};
  job.layers = layers, job.count = count, job.dtype = dtype, job.threads = threads, job.m = m, job.k = padded;
  return linear<Format>(job, {{x, k, stride, (const int32_t*)layers[0].planes[{len(planes)}]}});
}}

QC_EXPORT void qc_decode(void* out, int dtype, int threads, int64_t n, int64_t k, int64_t padded, {parameters}) {{
  decode<Format>(out, dtype, n, k, padded, threads, {values});
}}

QC_EXPORT void qc_rows(void* out, const int64_t* rows, int64_t count, int dtype, int threads, int64_t k, int64_t padded,
                       {parameters}) {{
  gather_rows<Format>(out, dtype, rows, count, k, padded, threads, {values});
}}

QC_EXPORT const char* qc_variant(int64_t m, int dtype) {{
  static const char* const names[] = {{"rows", "rows_bf16", "rows_int8", "panel", "panel_bf16", "panel_int8"}};
  return names[kernel_of<Format>(m, dtype)];
}}
"""


class CpuKernels:
    """Compiled kernels of one :class:`Scheme`; ``isa`` is a key of :data:`.cpp_build.ISA_FLAGS`, ``address`` that of the
    compiled ``qc_linear``, for ``call``: the ``linear`` of :func:`.cpp_call.caller`, or where many rows may be faster in another
    way, a :class:`.cpp_many.Product`.

    Raises :class:`FormatError` when the format cannot be printed and :class:`KernelBuildError` when the compiler fails.
    Calls release the interpreter lock and may run in several threads at once.
    """

    reorders = True

    def __init__(self, scheme: Scheme, isa: str = "native") -> None:
        self.scheme = scheme
        self.source = kept_source("cpp", (scheme.key,), lambda: source(scheme))
        library, self.path = load_library(self.source, isa)
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        planes = (pointer,) * len(scheme.format.parts)
        self.address: int = ctypes.cast(library.qc_linear, pointer).value or 0
        self._grouped, self._name = caller().grouped, f"qcompile::linear {scheme.label}"
        self._decode = library.qc_decode
        self._decode.argtypes = [pointer, number, number, size, size, size, *planes]
        self._decode.restype = None
        many = scheme.activations is None and any(map(has_matrix_units, DTYPES))
        self.call: Callable[..., Any] = Product(scheme, self._decode, self.path, tuple(DTYPES)) if many else caller().linear
        self._rows = library.qc_rows
        self._rows.argtypes = [pointer, pointer, size, number, number, size, size, *planes]
        self._rows.restype = None
        self._variant = library.qc_variant
        self._variant.argtypes = [size, number]
        self._variant.restype = ctypes.c_char_p
        self._layouts: dict[tuple[int, int], tuple[int, list[int]]] = {}

    def linear(
        self, x: torch.Tensor, planes: Sequence[torch.Tensor], bias: torch.Tensor | None, n: int
    ) -> torch.Tensor:
        """x ``[..., K]`` times the transposed weight plus ``bias`` ``[n]``: ``[..., n]`` in x's dtype.

        x is float32, float16 or bfloat16, of any strides and any number of rows, none included; bias is of any float
        dtype. ``planes`` are the stored tensors of an n×K weight in the format's order. Sums are in float32 (int32
        within a scale's span with int8 activations). One plane more, int32 ``[K]``, is the order in which the weight takes
        the columns of x. Raises :class:`LayoutError` for tensors that do not fit.
        """
        dtype = DTYPES.get(x.dtype)
        if dtype is None or not x.is_cpu:
            raise LayoutError(f"{self.scheme.label}: x must be float32, float16 or bfloat16 on the CPU, found {x.dtype} on "
                              f"{x.device}; convert it first")  # fmt: skip
        shape = x.shape
        k = shape[-1]
        rows = math.prod(shape[:-1])
        parts = len(self.scheme.format.parts)
        padded = self._checked(planes[:parts], n, k)
        for order in planes[parts:]:
            _check_order(order, k, self.scheme.label)
        y = torch.empty(*shape[:-1], n, dtype=x.dtype)
        x2 = x if x.dim() == 2 else x.reshape(rows, k)
        if x2.stride(1) != 1 and k > 1:
            x2 = x2.contiguous()
        bias_dtype = 0
        if bias is not None:
            bias = self._bias(bias, n)
            bias_dtype = DTYPES[bias.dtype]
        self.call(self.address, x2, dtype, rows, k, padded, x2.stride(0), 1, y, bias, bias_dtype, n, *planes, self._name)
        return y

    def grouped(
        self, x: torch.Tensor, planes: Sequence[torch.Tensor], groups: torch.Tensor, ends: bool, experts: int, n: int
    ) -> torch.Tensor:
        """x ``[T, K]``, each row times the transposed weight of its expert: ``[T, n]`` in x's dtype.

        ``planes`` are the stored tensors of a stack of ``experts`` n×K weights. ``groups`` is integer: ``[T]``, the expert of
        each row; or with ``ends`` ``[experts]``, one past the last row of each, rows being sorted by expert (those beyond the
        last give zeros). Only experts that have rows are read. Raises :class:`LayoutError` for tensors that do not fit, and
        ``IndexError`` for numbers out of range.
        """
        label = self.scheme.label
        wanted = (experts,) if ends else x.shape[:1]
        if x.dtype not in DTYPES or x.dim() != 2 or not x.is_cpu:
            raise LayoutError(f"{label}: x must be [T, K] float32, float16 or bfloat16 on the CPU, found {list(x.shape)} "
                              f"{x.dtype} on {x.device}; reshape or convert it first")  # fmt: skip
        if groups.dtype not in (torch.int32, torch.int64) or groups.shape != wanted or not groups.is_cpu:
            raise LayoutError(f"{label}: {'ends' if ends else 'numbers'} of experts must be int32 or int64 {list(wanted)} on the "
                              f"CPU, found {groups.dtype} {list(groups.shape)} on {groups.device}")  # fmt: skip
        (m, k), rows = x.shape, -(-n // TILE_N) * TILE_N
        padded = self._checked(planes, experts * rows, k)
        if x.stride(1) != 1 and k > 1:
            x = x.contiguous()
        y, groups = torch.empty(m, n, dtype=x.dtype), groups.contiguous()
        sizes = (p.nbytes // experts for p in planes)
        self._grouped(self.address, y, x, groups, DTYPES[x.dtype], groups.dtype == torch.int64, ends, m, experts, n, k, padded,
                      x.stride(0), *planes, *sizes, self._name)  # fmt: skip
        return y

    def decode(self, planes: Sequence[torch.Tensor], n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
        """The weight ``[n, k]`` that ``planes`` stand for, evaluated in float32 and rounded once to ``dtype``.

        Raises :class:`LayoutError` for planes that do not fit.
        """
        padded = self._checked(planes, n, k)
        native = dtype if dtype in DTYPES else torch.float32
        out = torch.empty(n, k, dtype=native)
        if out.numel():
            pointers = (p.data_ptr() for p in planes)
            self._decode(out.data_ptr(), DTYPES[native], torch.get_num_threads(), n, k, padded, *pointers)
        return out.to(dtype)

    def rows(
        self, planes: Sequence[torch.Tensor], indices: torch.Tensor, n: int, k: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Rows ``indices`` (int64, any shape, 0 … n − 1: not checked) of the weight that ``planes`` stand for:
        ``[*indices.shape, k]`` in ``dtype``. Reads only the tiles of 16 rows that the indices name."""
        padded = self._checked(planes, n, k)
        native = dtype if dtype in DTYPES else torch.float32
        flat = indices.reshape(-1).to(torch.int64).contiguous()
        out = torch.empty(*indices.shape, k, dtype=native)
        if out.numel():
            pointers = (p.data_ptr() for p in planes)
            self._rows(out.data_ptr(), flat.data_ptr(), len(flat), DTYPES[native], torch.get_num_threads(), k, padded, *pointers)
        return out.to(dtype)

    def variant(self, rows: int, dtype: torch.dtype) -> str:
        """Name of the kernel that serves ``rows`` rows of x of ``dtype``, for reports: rows…, panel…"""
        return self._variant(rows, DTYPES[dtype]).decode()

    def padded(self, n: int, k: int) -> int:
        """K of the stored planes of an n×k weight. Raises :class:`LayoutError` where integer sums of one scale overflow."""
        spec = self.scheme.format
        padded: int = spec.padded(n, k)[1]
        if self.scheme.activations == "int8" and spec.period == ROW and padded > LONGEST_INT_ROW:
            raise LayoutError(f"{self.scheme.label}: K = {k} overflows int32 sums of one scale per row (limit "
                              f"{LONGEST_INT_ROW}); use a format with groups")  # fmt: skip
        return padded

    def _checked(self, planes: Sequence[torch.Tensor], n: int, k: int) -> int:
        """K of the stored planes, which are checked by size; sizes are remembered for each weight shape."""
        layout = self._layouts.get((n, k))
        if layout is None:
            layout = self._layouts[n, k] = self._layout(planes, n, k)
        padded, sizes = layout
        if len(planes) != len(sizes):
            check_planes(self.scheme.format, planes, n, k)
        for plane, size in zip(planes, sizes, strict=True):
            if plane.nbytes != size or not plane.is_cpu or not plane.is_contiguous():
                check_planes(self.scheme.format, planes, n, k)
                raise LayoutError(f"{self.scheme.label}: planes must be contiguous CPU tensors, found strides "
                                  f"{plane.stride()} on {plane.device}; call .contiguous() on them")  # fmt: skip
        return padded

    def _layout(self, planes: Sequence[torch.Tensor], n: int, k: int) -> tuple[int, list[int]]:
        spec = self.scheme.format
        check_planes(spec, planes, n, k)
        return self.padded(n, k), [math.prod(spec.part_shape(p, n, k)) * p.dtype.itemsize for p in spec.parts]

    def _bias(self, bias: torch.Tensor, n: int) -> torch.Tensor:
        if bias.shape != (n,) or not bias.is_floating_point() or not bias.is_cpu:
            raise LayoutError(f"{self.scheme.label}: bias must be a float CPU tensor [{n}], found {bias.dtype} "
                              f"{list(bias.shape)} on {bias.device}")  # fmt: skip
        return (bias if bias.dtype in DTYPES else bias.float()).contiguous()


def _check_order(order: torch.Tensor, k: int, label: str) -> None:
    if order.shape != (k,) or order.dtype != torch.int32 or not order.is_cpu or not order.is_contiguous():
        raise LayoutError(f"{label}: the order of columns must be contiguous int32 [{k}] on the CPU, found {order.dtype} "
                          f"{list(order.shape)} on {order.device}")  # fmt: skip


@functools.cache
def cpu_kernels(scheme: Scheme) -> CpuKernels:
    """The kernels of ``scheme`` for this machine, built once in a process."""
    return CpuKernels(scheme)
