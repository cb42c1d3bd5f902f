"""The one physical layout of planes: 16-row interleaved 32-bit words.

A code part of b bits of an N×K weight is an int32 tensor ``[N/16, K/c, 16]`` with c = 32/b codes in a word. Word
``(t, w, l)`` belongs to row ``n = 16·t + l`` and holds the weights ``k = c·w + 4·s + j`` at bits ``8·j + b·s``
(byte j = 0…3, slot s = 0…8/b−1). Hence ``(word >> b·s) & mask`` gives four consecutive k as four bytes, which is what
byte dot products take, and the sixteen lanes of a vector are sixteen rows, which makes horizontal sums unnecessary and
scale vectors contiguous. Codes of 3, 5, 6 and 7 bits are the sum of several such parts.

Scales are ``[N/16, entries, 16]`` in their own dtype; integer scales below 8 bits have 8/b consecutive entries in a byte,
the first in the lowest bits. Scales that rows share have one entry for each tile of 16 rows, ``[N/16, entries, 1]``.
Padding is zero.

A stack of E matrices ``[E, N, K]``, the experts of a layer, is stored as its matrices one after the other, each with its
rows padded to whole tiles: the planes of an (E·N)×K matrix where N is a multiple of 16. No scale serves two of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..errors import LayoutError
from . import huge_pages
from .spec import ALL, ROW, TILE_N, FormatSpec, Part, Plane


def matrix_shape(shape: Sequence[int], transposed: bool = False) -> tuple[int, int]:
    """(rows, K) of the matrix whose planes hold a weight ``[N, K]`` or a stack ``[E, N, K]`` (``[…, K, N]`` if ``transposed``).

    Raises :class:`LayoutError` for any other number of dimensions.
    """
    if len(shape) not in (2, 3):
        raise LayoutError(f"a weight of shape {list(shape)}: planes hold matrices [N, K] and stacks of them [E, N, K]")
    n, k = shape[:-3:-1] if transposed else shape[-2:]
    return (n, k) if len(shape) == 2 else (shape[0] * -(-n // TILE_N) * TILE_N, k)


def pack_plane(spec: FormatSpec, plane: Plane, entries: torch.Tensor, n: int, k: int) -> list[torch.Tensor]:
    """``[rows, entries along K]`` (uint8, or int8 for i8; floats) of an N×K weight → the stored tensors of the plane's parts.

    Rows and columns that ``entries`` lacks are stored as zero.
    """
    if plane.rows != 1:
        tiles = -(-n // TILE_N)
        each = entries.expand(tiles, -1) if plane.rows == ALL else entries.repeat_interleave(plane.rows // TILE_N, 0)[:tiles]
        return [_pack_scale(part, each, spec.part_shape(part, n, k)) for part in plane.parts]
    pack = _pack_code if plane.is_code else _pack_scale
    return [pack(part, entries, spec.part_shape(part, n, k)) for part in plane.parts]


def _pack_code(part: Part, entries: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    tiles, words, _ = shape
    slots = 8 // part.bits
    codes = _padded(entries.view(torch.uint8), tiles * TILE_N, words * part.entries)
    if part.bits != part.plane.bits:
        codes = (codes >> part.shift) & (2**part.bits - 1)
    codes = codes.view(tiles, TILE_N, words, slots, 4)
    byte = codes[..., 0, :].clone()
    for s in range(1, slots):
        byte |= codes[..., s, :] << (part.bits * s)
    word = byte.view(torch.int32).view(tiles, TILE_N, words)
    return word.transpose(1, 2).contiguous()


def _pack_scale(part: Part, entries: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    tiles, along, lanes = shape
    full = _padded(entries.to(part.plane.entry_dtype), tiles * lanes, along * part.entries)
    if part.plane.is_integer and part.plane.bits < 8:
        full = ((full >> part.shift) & (2**part.bits - 1)).view(tiles * lanes, along, part.entries)
        byte = full[..., 0].clone()
        for s in range(1, part.entries):
            byte |= full[..., s] << (part.bits * s)
        full = byte
    return full.view(part.dtype).view(tiles, lanes, along).transpose(1, 2).contiguous()


def _padded(entries: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """``entries`` with zeros added, or what lies beyond the last stored column taken away."""
    entries = entries[:, :cols]
    if entries.shape == (rows, cols):
        return entries.contiguous()
    full = entries.new_zeros(rows, cols)
    full[: entries.shape[0], : entries.shape[1]] = entries
    return full


def unpack_plane(plane: Plane, stored: Sequence[torch.Tensor], n: int) -> torch.Tensor:
    """``[n, padded entries along K]`` of the stored parts of a plane of an N×K weight: uint8, int8 for i8, floats. Entries
    that rows share are repeated for each of them."""
    if not plane.is_integer:
        return _rows_of(stored[0], n)
    code = torch.zeros((), dtype=torch.uint8, device=stored[0].device)
    count = min(t.shape[1] * part.entries for part, t in zip(plane.parts, stored, strict=True))  # bytes end at several places
    for part, tensor in zip(plane.parts, stored, strict=True):
        rows = _rows_of(tensor, n)
        mask, shifts = 2**part.bits - 1, torch.arange(0, 8, part.bits, dtype=torch.uint8, device=tensor.device)
        if plane.is_code:
            byte = rows.view(torch.uint8).view(n, -1, 1, 4)
            bits = ((byte >> shifts.view(1, 1, -1, 1)) & mask).reshape(n, -1)
        else:
            bits = ((rows.unsqueeze(-1) >> shifts) & mask).reshape(n, -1)
        code = code | (bits[:, :count] << part.shift)
    return code.view(plane.entry_dtype)


def _rows_of(stored: torch.Tensor, n: int) -> torch.Tensor:
    """``[N/16, along, 16 or 1]`` → a copy ``[n, along]``, contiguous also in the strides of dimensions of 1, as
    ``view(dtype)`` asks."""
    tiles, along, _ = stored.shape
    rows = stored.new_empty(tiles, TILE_N, along).copy_(stored.transpose(1, 2))
    return rows.view(tiles * TILE_N, along)[:n]


def by_plane(spec: FormatSpec, stored: Sequence[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """Stored tensors (in spec order) by the name of their plane."""
    grouped: dict[str, list[torch.Tensor]] = {p.name: [] for p in spec.planes}
    for part, tensor in zip(spec.parts, stored, strict=False):
        grouped[part.plane.name].append(tensor)
    return grouped


def columns_multiple(spec: FormatSpec) -> int:
    """Weights along K between two places where every stored tensor can be cut."""
    return math.lcm(spec.k_multiple, *(part.plane.per * part.entries for part in spec.parts if part.plane.per != ROW))


def columns_of(spec: FormatSpec, stored: Sequence[torch.Tensor], start: int, stop: int) -> list[torch.Tensor]:
    """Copies of the parts of columns ``start`` … ``stop`` of a weight, which are the parts of an N×(stop − start) one; both ends
    are multiples of :func:`columns_multiple`, or ``stop`` is K or more."""
    cut = []
    for part, tensor in zip(spec.parts, stored, strict=False):
        each = part.plane.per * part.entries
        cut.append(tensor[:, start // each : -(-stop // each)].contiguous() if each else tensor)
    return cut


def check_planes(spec: FormatSpec, planes: Sequence[torch.Tensor], n: int, k: int, layer: str = "weight") -> None:
    """Raises :class:`LayoutError` unless ``planes`` (stored, in spec order) have the shapes and dtypes of an N×K weight."""
    if len(planes) != len(spec.part_names):
        raise LayoutError(f"{layer}: format {spec.name} has {len(spec.part_names)} planes, found {len(planes)}")
    wanted: list[tuple[tuple[int, ...], torch.dtype]] = [(spec.part_shape(part, n, k), part.dtype) for part in spec.parts]
    wanted += [((k,), dtype) for dtype in spec.columns.values()]
    for name, (shape, dtype), tensor in zip(spec.part_names, wanted, planes, strict=True):
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise LayoutError(f"{layer}: plane {name!r} of {spec.name} for a {n}×{k} weight must be {dtype} "
                              f"{list(shape)}, found {tensor.dtype} {list(tensor.shape)}; quantize or load it again")  # fmt: skip


def empty_parts(spec: FormatSpec, n: int, k: int, device: torch.device) -> list[torch.Tensor]:
    """Those of the planes in parts, without the entries for columns."""
    return [huge_pages.empty(spec.part_shape(part, n, k), part.dtype, device) for part in spec.parts]


def empty_planes(spec: FormatSpec, n: int, k: int, device: torch.device) -> list[torch.Tensor]:
    """Stored tensors of an N×K weight, in spec order, whose values are not set."""
    return empty_parts(spec, n, k, device) + [torch.empty(k, dtype=dtype, device=device) for dtype in spec.columns.values()]


def pages(spec: FormatSpec, count: int, heads: int, tokens: int, dim: int, device: torch.device) -> list[torch.Tensor]:
    """Zeroed stored tensors ``[count, heads, *part_shape]`` of a KV cache: for each page and head, those of a weight whose
    rows are ``tokens`` tokens, rounded up to tiles of 16, of ``dim`` elements."""
    shapes = [(count, heads, *spec.part_shape(p, tokens, dim)) for p in spec.parts]
    return [huge_pages.empty(shape, p.dtype, device).zero_() for shape, p in zip(shapes, spec.parts, strict=True)]


CENTERED_FROM = 16
"""Tokens whose mean is a better center of keys than zero, whatever they are: of fewer, the mean is mostly themselves."""


def center_of(k: torch.Tensor) -> torch.Tensor:
    """What keys ``k [B, H, L, D]``, the first of their sequences, are stored without: their mean by sequence and head,
    ``[B, H, 1, D]``. 0 for fewer than :data:`CENTERED_FROM`, and where it is not finite: a token that is not must not spoil the
    others."""
    if k.shape[2] < CENTERED_FROM:
        return k.new_zeros(*k.shape[:2], 1, k.shape[3])
    return k.mean(2, keepdim=True, dtype=torch.float32).nan_to_num(0.0, 0.0, 0.0).to(k.dtype)
