"""Codes of checkpoints into stored planes, at the speed of memory: ``codegen/include/repack.cpp``, compiled once on a machine.

What the layouts mean is said by :mod:`qcompile.checkpoints.gguf_blocks` (a table of fields, also in plain PyTorch) and by the
readers; here are only strides.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from importlib import resources

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from ..codegen.cpp_build import load_library
from ..errors import CorruptCheckpointError, LayoutError
from ..formats import FormatSpec, Plane, find
from ..formats.layout import empty_parts, pack_plane
from .gguf_blocks import BLOCKS, row_bytes


class Kind(IntEnum):
    """How the codes of a row lie: bytes; a stream of bits, the lowest first; two in a byte, the first in the upper half; 32 //
    bits in each word; and with outputs along the words: GPTQ's columns, AWQ's eights."""

    BYTES = 0
    STREAM = 1
    NIBBLES_HIGH = 2
    PADDED = 3
    COLUMNS = 4
    OUTPUTS = 5


@dataclass(frozen=True)
class Codes:
    """The codes of an N×K weight: ``data`` [N, …] bytes or words of a row each, or for COLUMNS and OUTPUTS words [lines, …].
    ``flip``: bits of a byte that are inverted; ``order`` int32 [K]: the column that each stored one is."""

    kind: Kind
    data: torch.Tensor
    n: int
    k: int
    bits: int
    flip: int = 0
    order: torch.Tensor | None = None


class _Run(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("plane", "src", "dst", "count", "bit", "bits", "to")]


class _Part(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("plane", "code", "item", "bits", "shift")),
        ("exponent", ctypes.c_uint32), ("along", ctypes.c_int64), ("out", ctypes.c_void_p),
    ]  # fmt: skip


class _Source(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("kind", "bits", "flip", "reserved")),
        *((name, ctypes.c_int64) for name in ("n", "k", "stride")),
        *((name, ctypes.c_void_p) for name in ("data", "order")),
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    """Raises :class:`~qcompile.errors.KernelBuildError`."""
    import qcompile.codegen

    text = (resources.files(qcompile.codegen) / "include" / "repack.cpp").read_text()
    return load_library(text)[0]


def prepare() -> None:
    """Compiles the repacker unless this machine has it already. Raises :class:`~qcompile.errors.KernelBuildError`."""
    _library()


def repack_blocks(name: str, type_name: str, data: torch.Tensor, n: int, k: int) -> list[torch.Tensor]:
    """:func:`~qcompile.checkpoints.gguf_blocks.from_blocks` for tensors of the CPU, many times faster. Raises as it does, and
    :class:`CorruptCheckpointError` naming the tensor ``name`` for scales that are NaN or infinite."""
    spec = find(type_name)
    assert spec is not None
    if tuple(data.shape) != row_bytes(type_name, n, k) or data.dtype != torch.uint8:
        raise LayoutError(f"{type_name}: a {n}×{k} weight is uint8 {list(row_bytes(type_name, n, k))}, found {data.dtype} "
                          f"{list(data.shape)}")  # fmt: skip
    data = data.contiguous()
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    stored = empty_parts(spec, n, k, torch.device("cpu"))
    parts = _parts(spec, stored)
    entries = [block // p.per * p.entry_dtype.itemsize for p in spec.planes]
    runs = _runs(type_name)
    bad = _library().qc_repack_blocks(
        ctypes.c_void_p(data.data_ptr()), ctypes.c_int64(n), ctypes.c_int64(k // block), ctypes.c_int64(size),
        (_Run * len(runs))(*runs), len(runs), (ctypes.c_int32 * len(entries))(*entries), len(entries),
        (_Part * len(parts))(*parts), len(parts), torch.get_num_threads(),
    )  # fmt: skip
    if bad:
        raise CorruptCheckpointError(f"{name}: {NOT_FINITE}")
    return stored


@functools.cache
def _runs(type_name: str) -> list[_Run]:
    """The chunks of a type's fields, one run for each group of bytes."""
    spec = find(type_name)
    assert spec is not None
    block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    order = {p.name: (i, block // p.per * p.entry_dtype.itemsize) for i, p in enumerate(spec.planes)}
    runs, at = [], 0
    for field in BLOCKS[type_name]:
        each, bit = field.size // field.groups, 0
        for chunk in field.chunks:
            plane, total = order[chunk.plane]
            share = total // field.groups
            runs += [_Run(plane, at + g * each, g * share + chunk.first, each, bit, chunk.bits, chunk.to)
                     for g in range(field.groups)]  # fmt: skip
            bit += chunk.bits
        at += field.size
    return runs


Scales = Mapping[str, tuple[str, torch.Tensor]]
"""By plane: the name of the tensor in the file, and entries ``[rows, entries along K]`` of the plane's dtype."""

NOT_FINITE = "scales have NaN or infinite values; the file is damaged, download it again"

EXPONENTS = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F800000}
"""Bits that are all ones in an infinity and in NaN."""


def repack_codes(
    spec: FormatSpec, codes: Codes, scales: Scales, finite: tuple[str, tuple[int, ...]] | None = None
) -> list[torch.Tensor]:
    """The stored planes of a weight, ``order`` last if the format has it: its plane of codes from ``codes``, the others from
    ``scales``.

    ``finite``: a tensor's name and the codes that it must not have, since they stand for NaN or infinity. Raises
    :class:`CorruptCheckpointError` for those and for scales that are NaN or infinite, :class:`LayoutError` for entries of
    another shape.
    """
    n, k = codes.n, codes.k
    if codes.bits > spec.code.bits:
        raise LayoutError(f"{spec.name}: codes of {codes.bits} bits")
    stored = empty_parts(spec, n, k, torch.device("cpu"))
    parts = _parts(spec, stored)
    code_parts = [p for p in parts if p.code]
    seen = torch.zeros(256, dtype=torch.uint8)
    _library().qc_repack_codes(
        ctypes.byref(_source(codes)), ctypes.c_int64(spec.padded(n, k)[1]), (_Part * len(code_parts))(*code_parts),
        len(code_parts), ctypes.c_void_p(seen.data_ptr() if finite is not None else None), torch.get_num_threads(),
    )  # fmt: skip
    if finite is not None and bool(seen[list(finite[1])].any()):
        raise CorruptCheckpointError(f"{finite[0]}: has codes that are NaN or infinite; the file is damaged")
    for index, plane in enumerate(spec.planes):
        if not plane.is_code:
            held = [(p, t) for p, t in zip(parts, stored, strict=True) if p.plane == index]
            _repack_scales(spec, plane, *scales[plane.name], n, k, held)
    return stored if codes.order is None else [*stored, codes.order]


def _repack_scales(
    spec: FormatSpec, plane: Plane, name: str, entries: torch.Tensor, n: int, k: int, held: list[tuple[_Part, torch.Tensor]]
) -> None:
    _check_entries(spec, plane, entries, n, k)
    if plane.rows != 1:  # few entries, which several rows share
        for (_, into), made in zip(held, pack_plane(spec, plane, entries, n, k), strict=True):
            into.copy_(made)
        bad = plane.entry_dtype.is_floating_point and not bool(torch.isfinite(entries).all())
    else:
        parts = [part for part, _ in held]
        rows, columns = (s * entries.dtype.itemsize for s in entries.stride())
        bad = _library().qc_repack_entries(
            ctypes.c_void_p(entries.data_ptr()), ctypes.c_int64(n), ctypes.c_int64(entries.shape[1]), ctypes.c_int64(rows),
            ctypes.c_int64(columns), (_Part * len(parts))(*parts), len(parts), torch.get_num_threads(),
        )  # fmt: skip
    if bad:
        raise CorruptCheckpointError(f"{name}: {NOT_FINITE}")


def unpack(codes: Codes) -> torch.Tensor:
    """uint8 ``[N, K]`` of codes that lie along rows."""
    found = torch.empty(codes.n, codes.k, dtype=torch.uint8)
    _library().qc_unpack(ctypes.byref(_source(codes)), ctypes.c_void_p(found.data_ptr()), torch.get_num_threads())
    return found


def _source(codes: Codes) -> _Source:
    if not codes.data.is_contiguous():
        raise LayoutError(f"codes of a {codes.n}×{codes.k} weight must lie in a row, found strides {codes.data.stride()}")
    return _Source(codes.kind, codes.bits, codes.flip, 0, codes.n, codes.k, _stride(codes), codes.data.data_ptr(),
                   codes.order.data_ptr() if codes.order is not None else None)  # fmt: skip


def _stride(codes: Codes) -> int:
    """Bytes of a row, or words of a line. Raises :class:`LayoutError` unless ``data`` holds N×K codes."""
    data, n, k = codes.data, codes.n, codes.k
    if codes.kind in (Kind.COLUMNS, Kind.OUTPUTS):
        lines, words = (k * codes.bits // 32, n) if codes.kind is Kind.COLUMNS else (k, n // 8)
        needed, stride = (lines, words), data.shape[1]
    else:
        each = {Kind.BYTES: k, Kind.NIBBLES_HIGH: k // 2, Kind.PADDED: 4 * -(-k // (32 // codes.bits))}
        needed, stride = (n, each.get(codes.kind, -(-k * codes.bits // 8))), data.shape[1] * data.dtype.itemsize
    if data.shape[0] < needed[0] or stride < needed[1]:
        raise LayoutError(f"codes of a {n}×{k} weight take {list(needed)}, found {list(data.shape)} of {data.dtype}")
    return stride


def _check_entries(spec: FormatSpec, plane: Plane, entries: torch.Tensor, n: int, k: int) -> None:
    """Packing fills up what is missing, which must never hide that a reader found too little."""
    rows, along = spec.entry_shape(plane, n, k)[0], -(-k // plane.per) if plane.per else 1
    if entries.shape[0] != rows or entries.shape[1] < along or entries.dtype != plane.entry_dtype:
        raise LayoutError(f"plane {plane.name!r} of {spec.name} needs {plane.entry_dtype} [{rows}, {along}], found "
                          f"{entries.dtype} {list(entries.shape)}")  # fmt: skip


def _parts(spec: FormatSpec, stored: list[torch.Tensor]) -> list[_Part]:
    order = {p.name: i for i, p in enumerate(spec.planes)}
    return [
        _Part(order[part.plane.name], part.plane.is_code, tensor.dtype.itemsize, part.bits, part.shift,
              EXPONENTS.get(tensor.dtype, 0), tensor.shape[1], tensor.data_ptr())
        for part, tensor in zip(spec.parts, stored, strict=True)
    ]  # fmt: skip
