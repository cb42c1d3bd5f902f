"""The header of a GGUF file: metadata and where each tensor lies, every count and offset checked before it is followed.

The layout is that of ggml's ``docs/gguf.md``, versions 2 and 3, little-endian. It is parsed here, over the mapped file and
with bounds, because the ``gguf`` package's reader loops as often as a damaged file says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from ..errors import CorruptCheckpointError, UnsupportedCheckpointError
from .files import MappedFile, Stored, check_layout

MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
MAX_DIMS, MAX_TENSORS, MAX_STRINGS, MAX_NUMBERS, MAX_KEYS = 4, 1 << 20, 1 << 22, 1 << 24, 1 << 16
"""Dimensions of a tensor (ggml's), and what a header may hold; a vocabulary has about 2¹⁸ strings."""

SCALARS = {
    GGUFValueType.UINT8: "<u1", GGUFValueType.INT8: "<i1", GGUFValueType.UINT16: "<u2", GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4", GGUFValueType.INT32: "<i4", GGUFValueType.FLOAT32: "<f4", GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8", GGUFValueType.INT64: "<i8", GGUFValueType.FLOAT64: "<f8",
}  # fmt: skip
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Value:
    """A value of the metadata as its Python type (arrays: a list of strings, or a numpy array), with its types in the file."""

    value: Any
    type: GGUFValueType
    item: GGUFValueType | None = None


@dataclass(frozen=True)
class Tensor:
    """A tensor of a GGUF file: ``type`` is its name in ``GGMLQuantizationType``; ``shape`` has the row's length last. ``stored``
    holds floats in that shape, or the bytes of rows: uint8 [product of the other dimensions, bytes of a row]."""

    name: str
    type: str
    shape: tuple[int, ...]
    stored: Stored


@dataclass(frozen=True)
class Header:
    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, Tensor]

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata[key].value if key in self.metadata else default


class _Cursor:
    """Reads on from a place in the file; raises :class:`CorruptCheckpointError` at its end."""

    def __init__(self, file: MappedFile) -> None:
        self.file, self.at = file, 0

    def take(self, size: int, what: str) -> bytes:
        if size > self.file.size - self.at:
            raise CorruptCheckpointError(f"{self.file.path}: {what} of {size} bytes at byte {self.at} reaches beyond the file's "
                                         f"{self.file.size}; it is cut off or damaged")  # fmt: skip
        self.at += size
        return self.file.bytes[self.at - size : self.at]

    def number(self, size: int, what: str) -> int:
        return int.from_bytes(self.take(size, what), "little")

    def text(self, what: str) -> str:
        data = self.take(self.number(8, what), what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise CorruptCheckpointError(f"{self.file.path}: {what} at byte {self.at - len(data)} is no UTF-8") from error

    def count(self, limit: int, what: str) -> int:
        number = self.number(8, what)
        if number > limit:
            raise CorruptCheckpointError(f"{self.file.path}: {number} as {what}; at most {limit} are read")
        return number


def read_header(path: Path) -> Header:
    """Metadata and tensors of a file. Raises :class:`CorruptCheckpointError` naming the key or tensor that does not hold,
    :class:`UnsupportedCheckpointError` for another version, byte order or type."""
    file = MappedFile(path)
    cursor = _Cursor(file)
    if cursor.take(4, "the magic number") != MAGIC:
        raise CorruptCheckpointError(f"{path}: begins with {bytes(file.bytes[:4])!r} in place of {MAGIC!r}; this is no GGUF file")
    version = cursor.number(4, "the version")
    if version not in VERSIONS:
        swapped = " (a big-endian file?)" if version & 0xFFFF == 0 else ""
        raise UnsupportedCheckpointError(f"{path}: version {version} of GGUF{swapped}; {VERSIONS} are read")
    tensors, keys = cursor.count(MAX_TENSORS, "number of tensors"), cursor.count(MAX_KEYS, "number of keys")
    metadata: dict[str, Value] = {}
    budget = [MAX_STRINGS, MAX_NUMBERS]
    for _ in range(keys):
        key = cursor.text("a key")
        if key in metadata:
            raise CorruptCheckpointError(f"{key}: comes twice in {path}")
        metadata[key] = _value(cursor, key, cursor.number(4, key), budget)
    infos = [_info(cursor) for _ in range(tensors)]
    alignment = metadata["general.alignment"].value if "general.alignment" in metadata else ALIGNMENT
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise CorruptCheckpointError(f"general.alignment: {alignment!r} is no power of two from 8 on")
    start = -(-cursor.at // alignment) * alignment
    found = [_tensor(file, start, alignment, *info) for info in infos]
    check_layout([(t.name, t.stored.offset, t.stored.nbytes) for t in found], min(start, file.size), file, gaps=True)
    named = {t.name: t for t in found}
    if len(named) != len(found):
        names = [t.name for t in found]
        twice = next(n for n in names if names.count(n) > 1)
        raise CorruptCheckpointError(f"{twice}: two tensors of {path} have that name")
    return Header(path, metadata, named)


def _value(cursor: _Cursor, key: str, kind: int, budget: list[int]) -> Value:
    """The value of ``key``; ``budget``: how many strings and numbers arrays may still hold."""
    if kind == GGUFValueType.STRING:
        return Value(cursor.text(key), GGUFValueType.STRING)
    if kind != GGUFValueType.ARRAY:
        dtype = np.dtype(SCALARS[_type(cursor, key, kind)])
        return Value(np.frombuffer(cursor.take(dtype.itemsize, key), dtype)[0].item(), GGUFValueType(kind))
    item = cursor.number(4, key)
    if item == GGUFValueType.STRING:
        count = cursor.count(budget[0], f"{key}: number of strings")
        budget[0] -= count
        return Value([cursor.text(key) for _ in range(count)], GGUFValueType.ARRAY, GGUFValueType.STRING)
    dtype = np.dtype(SCALARS[_type(cursor, key, item)])
    count = cursor.count(budget[1], f"{key}: number of entries")
    budget[1] -= count
    return Value(np.frombuffer(cursor.take(count * dtype.itemsize, key), dtype), GGUFValueType.ARRAY, GGUFValueType(item))


def _type(cursor: _Cursor, key: str, kind: int) -> GGUFValueType:
    if kind not in SCALARS:
        raise CorruptCheckpointError(f"{key}: unknown type {kind} of a value at byte {cursor.at} of {cursor.file.path}")
    return GGUFValueType(kind)


def _info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape, type, offset from the start of the data) of one tensor."""
    name = cursor.text("a tensor's name")
    dims = cursor.number(4, name)
    if not 0 < dims <= MAX_DIMS:
        raise CorruptCheckpointError(f"{name}: {dims} dimensions; a GGUF tensor has 1 to {MAX_DIMS}")
    shape = tuple(cursor.number(8, name) for _ in range(dims))[::-1]
    return name, shape, cursor.number(4, name), cursor.number(8, name)


def _tensor(
    file: MappedFile, start: int, alignment: int, name: str, shape: tuple[int, ...], kind: int, offset: int
) -> Tensor:
    """Checked as far as it stands alone. Raises :class:`UnsupportedCheckpointError` for a type that ggml knows and we do not."""
    if any(s < 1 for s in shape) or math.prod(shape) >= 2**62:
        raise CorruptCheckpointError(f"{name}: shape {list(shape)} has no room in a file")
    if offset % alignment:
        raise CorruptCheckpointError(f"{name}: its offset {offset} is no multiple of the alignment {alignment}")
    try:
        type_name = GGMLQuantizationType(kind).name
    except ValueError as error:
        raise CorruptCheckpointError(f"{name}: unknown type {kind}; damaged, or of a later ggml") from error
    at, rows = start + offset, math.prod(shape[:-1])
    if type_name in FLOATS:
        return Tensor(name, type_name, shape, Stored(name, FLOATS[type_name], shape, file, at))
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if shape[-1] % block:
        raise CorruptCheckpointError(f"{name}: blocks of {block} weights of {type_name} do not divide rows of {shape[-1]}")
    return Tensor(name, type_name, shape, Stored(name, torch.uint8, (rows, shape[-1] // block * size), file, at))
