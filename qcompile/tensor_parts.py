"""Rows, columns and single elements of a packed weight.

Rows of whole tiles are views. Others, and columns where groups allow, unpack codes, move them and pack again: exact, no second
rounding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from . import ops
from .errors import UnsupportedOnTensorError
from .experts import implements
from .formats import ALL, ROW, Plane
from .formats.layout import by_plane, pack_plane, unpack_plane
from .formats.spec import TILE_N
from .tensor import QuantizedTensor

aten = torch.ops.aten
ATEN: dict[Any, Callable[..., Any]] = {}
"""``__torch_dispatch__``: ATen operators."""


def _rows(w: QuantizedTensor, pick: Callable[[torch.Tensor], torch.Tensor], n: int) -> QuantizedTensor:
    """``pick`` applied to the rows ``[N, entries]`` of every plane; ``n`` rows come out."""
    spec, (rows, k) = w.scheme.format, w.nk
    planes: list[torch.Tensor] = []
    for plane, stored in _unpacked(w):
        entries = pick(unpack_plane(plane, stored, rows))
        if plane.rows not in (1, ALL):
            entries = _by_tile(entries, plane.name, w)
        elif plane.rows == ALL:
            entries = entries[:1]
        planes += pack_plane(spec, dataclasses.replace(plane, rows=min(plane.rows, TILE_N)), entries, n, k)
    return w.with_planes([*planes, *w.planes[len(planes) :]], (k, n) if w.transposed else (n, k))


def _by_tile(entries: torch.Tensor, name: str, w: QuantizedTensor) -> torch.Tensor:
    """One row for each 16 of ``entries``, which must agree: rows that share scales can only move together."""
    tiles = entries[::TILE_N]
    if not torch.equal(tiles.repeat_interleave(TILE_N, 0)[: len(entries)], entries):
        raise UnsupportedOnTensorError(f"rows of a {w.scheme.label} weight share {name!r} in blocks; slice at multiples of a "
                                       "block, or call .dequantize() first")  # fmt: skip
    return tiles


def _unpacked(w: QuantizedTensor) -> list[tuple[Plane, list[torch.Tensor]]]:
    """Planes in spec order with their stored parts."""
    grouped = by_plane(w.scheme.format, w.planes)
    return [(p, grouped[p.name]) for p in w.scheme.format.planes]


def _columns(w: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
    """Weights ``start``…``stop`` along K; both must lie on borders of the longest group (``stop`` may be K)."""
    spec, (n, k) = w.scheme.format, w.nk
    group = math.lcm(*(p.per for p in spec.scales if p.per != ROW))
    if spec.permuted or start % group or (stop % group and stop != k):
        why = "whose columns are permuted" if spec.permuted else f"cuts a group of {group} weights of {spec.name}"
        raise UnsupportedOnTensorError(f"slice {start}:{stop} along K = {k} {why}; slice at multiples of {group}, or call "
                                       ".dequantize() first")  # fmt: skip
    planes: list[torch.Tensor] = []
    for plane, stored in _unpacked(w):
        entries = unpack_plane(plane, stored, n)
        if plane.per != ROW:
            entries = entries[:, start // plane.per : -(-stop // plane.per)]
        if plane.rows != 1:
            entries = entries[:1] if plane.rows == ALL else entries[::TILE_N]
        planes += pack_plane(spec, dataclasses.replace(plane, rows=min(plane.rows, TILE_N)), entries, n, stop - start)
    planes += [each[start:stop] for each in w.planes[len(spec.parts) :]]
    return w.with_planes(planes, (stop - start, n) if w.transposed else (n, stop - start))


@implements(ATEN, aten.slice.Tensor)
def _slice(
    w: QuantizedTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> QuantizedTensor:
    start, stop, step = slice(start, end, step).indices(w.shape[dim])
    if (start, stop, step) == (0, w.shape[dim], 1):
        return w.with_planes([p.detach() for p in w.planes])
    if (dim % 2 == 0) != w.transposed:
        if step == 1 and start % TILE_N == 0 and (stop % TILE_N == 0 or stop == w.shape[dim]) and start < stop:
            return _tiles(w, start, stop)
        return _apart(_rows(w, lambda rows: rows[start:stop:step], len(range(start, stop, step))))
    if step != 1:
        raise UnsupportedOnTensorError(f"slice with step {step} along K of a packed weight: call .dequantize() first")
    return _apart(_columns(w, start, max(start, stop)))


def _tiles(w: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
    """Rows ``start`` … ``stop``, whole tiles: a view, as of any tensor."""
    parts, tiles = len(w.scheme.format.parts), slice(start // TILE_N, -(-stop // TILE_N))
    shape = (w.shape[0], stop - start) if w.transposed else (stop - start, w.shape[1])
    return w.with_planes([p[tiles] for p in w.planes[:parts]] + w.planes[parts:], shape)


def _apart(w: QuantizedTensor) -> QuantizedTensor:
    """A slice that is no view, marked: who writes into it would think to have written into the whole."""
    w.apart = True
    return w


@implements(ATEN, aten.split.Tensor)
def _split(w: QuantizedTensor, size: int, dim: int = 0) -> list[QuantizedTensor]:
    return [_slice(w, dim, i, i + size) for i in range(0, w.shape[dim], size)]


@implements(ATEN, aten.index_select.default)
def _index_select(w: QuantizedTensor, dim: int, index: torch.Tensor) -> Any:
    if (dim % 2 == 0) == w.transposed:
        return w.dequantize().index_select(dim, index)
    return _rows(w, lambda rows: rows.index_select(0, index), index.numel())


@implements(ATEN, aten.select.int)
def _select(w: QuantizedTensor, dim: int, index: int) -> torch.Tensor:
    """One row or column, as a float vector."""
    if (dim % 2 == 0) == w.transposed:
        return w.dequantize().select(dim, index)
    row = _slice(w, dim, index % w.shape[dim], index % w.shape[dim] + 1)
    return row.dequantize().select(dim, 0)


@implements(ATEN, aten.embedding.default)
def _embedding(w: QuantizedTensor, indices: torch.Tensor, *_: Any) -> torch.Tensor:
    """Gathers the packed rows that ``indices`` name and decodes only those; out of range raises ``IndexError``."""
    if w.transposed:
        return F.embedding(indices, w.dequantize())
    n, k = w.nk
    return ops.rows(w.planes, indices, w.key, n, k, w.dtype)
