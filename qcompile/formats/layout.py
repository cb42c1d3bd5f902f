"""The one physical layout of planes: 16-row interleaved 32-bit words.

A code plane of b bits of an N×K weight is an int32 tensor ``[N/16, K/c, 16]`` with c = 32/b codes in a word. Word
``(t, w, l)`` belongs to row ``n = 16·t + l`` and holds the weights ``k = c·w + 4·s + j`` at bits ``8·j + b·s``
(byte j = 0…3, slot s = 0…8/b−1). Hence ``(word >> b·s) & mask`` gives four consecutive k as four bytes, which is what
byte dot products take, and the sixteen lanes of a vector are sixteen rows, which makes horizontal sums unnecessary and
scale vectors contiguous. Scale planes are ``[N/16, entries, 16]`` in their own dtype. Padding is zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import LayoutError
from .spec import TILE_N, FormatSpec, Plane


def pack_plane(plane: Plane, entries: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """``[n, entries along K]`` (codes as uint8, or int8 for i8; scales as float) → the stored tensor of ``shape``.

    Rows and columns that ``entries`` lacks are stored as zero.
    """
    tiles, words, _ = shape
    per_row = words * 32 // plane.bits if plane.is_code else words
    n, cols = entries.shape
    if not plane.is_code:
        full = _padded(entries.to(plane.storage_dtype), tiles * TILE_N, per_row)
        return full.view(tiles, TILE_N, words).transpose(1, 2).contiguous()
    codes = _padded(entries.view(torch.uint8), tiles * TILE_N, per_row)
    slots = 8 // plane.bits
    codes = codes.view(tiles, TILE_N, words, slots, 4)
    byte = codes[..., 0, :].clone()
    for s in range(1, slots):
        byte |= codes[..., s, :] << (plane.bits * s)
    word = byte.view(torch.int32).view(tiles, TILE_N, words)
    return word.transpose(1, 2).contiguous()


def _padded(entries: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    if entries.shape == (rows, cols):
        return entries.contiguous()
    full = entries.new_zeros(rows, cols)
    full[: entries.shape[0], : entries.shape[1]] = entries
    return full


def unpack_plane(plane: Plane, stored: torch.Tensor, n: int) -> torch.Tensor:
    """Inverse of :func:`pack_plane`: ``[n, padded entries along K]``; codes come as uint8 (int8 for i8)."""
    tiles, words, _ = stored.shape
    rows = stored.transpose(1, 2).contiguous()
    if not plane.is_code:
        return rows.view(tiles * TILE_N, words)[:n]
    byte = rows.view(torch.uint8).view(tiles * TILE_N, words, 1, 4)[:n]
    shifts = torch.arange(0, 8, plane.bits, dtype=torch.uint8, device=stored.device).view(1, 1, -1, 1)
    codes = (byte >> shifts) & (2**plane.bits - 1)
    codes = codes.reshape(n, words * 32 // plane.bits)
    return codes.view(torch.int8) if plane.dtype == "i8" else codes


def check_planes(spec: FormatSpec, planes: Sequence[torch.Tensor], n: int, k: int, layer: str = "weight") -> None:
    """Raises :class:`LayoutError` unless ``planes`` (in spec order) have the shapes and dtypes of an N×K weight."""
    if len(planes) != len(spec.planes):
        raise LayoutError(f"{layer}: format {spec.name} has {len(spec.planes)} planes, found {len(planes)}")
    for plane, tensor in zip(spec.planes, planes, strict=True):
        shape = spec.plane_shape(plane, n, k)
        if tuple(tensor.shape) != shape or tensor.dtype != plane.storage_dtype:
            raise LayoutError(f"{layer}: plane {plane.name!r} of {spec.name} for a {n}×{k} weight must be {plane.storage_dtype} "
                              f"{list(shape)}, found {tensor.dtype} {list(tensor.shape)}; quantize or load it again")  # fmt: skip
