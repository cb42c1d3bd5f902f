"""The bytes of GGUF tensors ⇄ stored planes, bit for bit.

A row of a GGUF tensor is a sequence of blocks (32 or 256 weights). Every bit of a block is one bit of an entry of one
plane, so a type is the list of its fields; ``ggml-common.h`` of llama.cpp has the same lists as C structs (``block_q4_K``),
and gguf-py's ``quants.py`` reads them in the same order of bits. MXFP4's values are our ``mxfp4``'s: ggml doubles its table
of e2m1 values and halves the scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from .. import formats
from ..errors import LayoutError, UnknownFormatError
from ..formats.layout import by_plane, check_planes, empty_parts, pack_plane, unpack_plane
from ..formats.reference import CHUNK_ELEMENTS, tile_rows
from ..formats.spec import TILE_N, FormatSpec, Plane


@dataclass(frozen=True)
class Chunk:
    """``bits`` bits of each byte of a field: bits ``to`` … ``to + bits`` of an entry of ``plane``. The first byte's belong to
    entry ``first`` of the field's share of the plane, the next byte's to the next entry."""

    plane: str
    bits: int
    to: int = 0
    first: int = 0


@dataclass(frozen=True)
class Field:
    """``size`` bytes of a block, in groups of ``group`` bytes (:data:`None`: one group). Groups share the entries of a plane
    equally; ``chunks`` divide every byte, lowest bits first."""

    size: int
    chunks: tuple[Chunk, ...]
    group: int | None = None

    @property
    def groups(self) -> int:
        return self.size // (self.group or self.size)


def whole(plane: str, size: int) -> Field:
    """Whole bytes: floats (little-endian) and 8-bit entries."""
    return Field(size, (Chunk(plane, 8),))


def split(plane: str, size: int, bits: int, group: int, to: int = 0) -> Field:
    """Bytes of 8/``bits`` entries each: in a group of bytes, the lowest bits are the first ``group`` entries, the next
    bits the next ``group``."""
    return Field(size, tuple(Chunk(plane, bits, to, c * group) for c in range(8 // bits)), group)


SCALES_K4 = (
    Field(4, (Chunk("sc", 6), Chunk("sc", 2, 4, 4))),
    Field(4, (Chunk("mn", 6), Chunk("mn", 2, 4, 4))),
    Field(4, (Chunk("sc", 4, 0, 4), Chunk("mn", 4, 0, 4))),
)
"""8 scales and 8 minima of 6 bits in 12 bytes (``get_scale_min_k4``): the first four of each whole, the top bits of the last
four above them, and their low nibbles behind."""

BLOCKS: Mapping[str, tuple[Field, ...]] = {
    "Q4_0": (whole("d", 2), split("q", 16, 4, 16)),
    "Q4_1": (whole("d", 2), whole("m", 2), split("q", 16, 4, 16)),
    "Q5_0": (whole("d", 2), split("q", 4, 1, 1, to=4), split("q", 16, 4, 16)),
    "Q5_1": (whole("d", 2), whole("m", 2), split("q", 4, 1, 1, to=4), split("q", 16, 4, 16)),
    "Q8_0": (whole("d", 2), whole("q", 32)),
    "Q2_K": (Field(16, (Chunk("sc", 4), Chunk("mn", 4))), split("q", 64, 2, 32), whole("d", 2), whole("dmin", 2)),
    "Q3_K": (
        split("q", 32, 1, 32, to=2), split("q", 64, 2, 32), split("sc", 8, 4, 8), split("sc", 4, 2, 4, to=4), whole("d", 2),
    ),
    "Q4_K": (whole("d", 2), whole("dmin", 2), *SCALES_K4, split("q", 128, 4, 32)),
    "Q5_K": (whole("d", 2), whole("dmin", 2), *SCALES_K4, split("q", 32, 1, 32, to=4), split("q", 128, 4, 32)),
    "Q6_K": (split("q", 128, 4, 64), split("q", 64, 2, 32, to=4), whole("sc", 16), whole("d", 2)),
    "IQ4_NL": (whole("d", 2), split("q", 16, 4, 16)),
    "IQ4_XS": (whole("d", 2), split("sc", 2, 2, 1, to=4), split("sc", 4, 4, 1), split("q", 128, 4, 16)),
    "MXFP4": (whole("s", 1), split("q", 16, 4, 16)),
}  # fmt: skip
"""Fields in the order of their bytes, by the name of the type in ``GGMLQuantizationType``."""


def from_blocks(type_name: str, data: torch.Tensor, n: int, k: int) -> list[torch.Tensor]:
    """uint8 ``[N, bytes of a row]`` of a GGUF tensor of N×K weights → the stored planes of the format of that name.

    Raises :class:`UnknownFormatError` for a type that is not in :data:`BLOCKS`, :class:`LayoutError` when sizes do not fit.
    """
    spec, (rows, width) = _format(type_name), row_bytes(type_name, n, k)
    if tuple(data.shape) != (rows, width) or data.dtype != torch.uint8:
        raise LayoutError(
            f"{type_name}: a {n}×{k} weight is uint8 [{rows}, {width}], found {data.dtype} {list(data.shape)}"
        )
    stored = empty_parts(spec, n, k, data.device)
    for start, count in _chunks(n, k):
        entries = _read(type_name, spec, data[start : start + count], k)
        parts = [part for p in spec.planes for part in pack_plane(spec, p, entries[p.name], count, k)]
        for all_rows, part in zip(tile_rows(spec, stored, start, count), parts, strict=True):
            all_rows.copy_(part)
    return stored


def to_blocks(type_name: str, planes: Sequence[torch.Tensor], n: int, k: int) -> torch.Tensor:
    """Stored planes of an N×K weight → uint8 ``[N, bytes of a row]`` of a GGUF tensor: the inverse of :func:`from_blocks`.

    Raises as it does, also for planes of another shape.
    """
    spec, shape = _format(type_name), row_bytes(type_name, n, k)
    check_planes(spec, planes, n, k)
    data = torch.empty(shape, dtype=torch.uint8, device=planes[0].device)
    for start, count in _chunks(n, k):
        grouped = by_plane(spec, tile_rows(spec, planes, start, count))
        entries = {p.name: unpack_plane(p, grouped[p.name], count)[:, : k // p.per] for p in spec.planes}
        data[start : start + count] = _write(type_name, spec, entries)
    return data


def row_bytes(type_name: str, n: int, k: int) -> tuple[int, int]:
    """Shape of a GGUF tensor's bytes: N rows of K/block · size. Raises :class:`LayoutError` unless blocks divide K."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    if k % block:
        raise LayoutError(
            f"{type_name}: blocks of {block} weights do not divide a row of {k}; GGUF has no part of a block"
        )
    return n, k // block * size


def _format(type_name: str) -> FormatSpec:
    if type_name not in BLOCKS:
        raise UnknownFormatError(type_name, BLOCKS)
    return formats.get(type_name)


def _chunks(n: int, k: int) -> list[tuple[int, int]]:
    """(first row, rows) of about :data:`CHUNK_ELEMENTS` weights, whole tiles: entries take a byte for each weight."""
    step = max(1, CHUNK_ELEMENTS // max(k, 1) // TILE_N) * TILE_N
    return [(start, min(step, n - start)) for start in range(0, n, step)]


def _count(plane: Plane, block: int) -> int:
    """Bytes that the entries of a block take, one for each entry of integers."""
    return block // plane.per * plane.entry_dtype.itemsize


def _places(field: Field, by_plane: Mapping[str, torch.Tensor]) -> list[tuple[Chunk, int, torch.Tensor]]:
    """(chunk, its first bit in a byte, the entries ``[rows, blocks, groups, bytes of a group]`` that it holds bits of)."""
    places, bit, each = [], 0, field.size // field.groups
    for chunk in field.chunks:
        entries = by_plane[chunk.plane].unflatten(-1, (field.groups, -1))
        places.append((chunk, bit, entries[..., chunk.first : chunk.first + each]))
        bit += chunk.bits
    return places


def _read(type_name: str, spec: FormatSpec, data: torch.Tensor, k: int) -> dict[str, torch.Tensor]:
    """Entries ``[rows, entries along K]`` by plane of rows of bytes."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    blocks, at = data.reshape(len(data), k // block, size), 0
    entries = {p.name: data.new_zeros(len(data), k // block, _count(p, block)) for p in spec.planes}
    for field in BLOCKS[type_name]:
        taken = blocks[..., at : at + field.size].unflatten(-1, (field.groups, -1))
        for chunk, bit, place in _places(field, entries):
            place |= ((taken >> bit) & (2**chunk.bits - 1)) << chunk.to
        at += field.size
    return {p.name: entries[p.name].flatten(1).view(p.entry_dtype) for p in spec.planes}


def _write(type_name: str, spec: FormatSpec, entries: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The inverse of :func:`_read`: ``[rows, bytes of a row]``."""
    block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    raw = {p.name: entries[p.name].view(torch.uint8).unflatten(-1, (-1, _count(p, block))) for p in spec.planes}
    fields = []
    for field in BLOCKS[type_name]:
        bits = [((place >> chunk.to) & (2**chunk.bits - 1)) << bit for chunk, bit, place in _places(field, raw)]
        fields.append(torch.stack(bits).sum(0, dtype=torch.uint8).flatten(-2))
    return torch.cat(fields, -1).flatten(1)
