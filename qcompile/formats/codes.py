"""Codes nearest to wanted values, and the values of codes."""

from __future__ import annotations

import functools
import math

import torch

from .algebra import codebook_of_gen, finite_range, gen_table, linear_gen
from .spec import Codebook, FormatSpec


def nearest_code(spec: FormatSpec, wanted: torch.Tensor) -> torch.Tensor:
    """Codes (uint8, int8 for i8) whose ``gen`` is nearest to ``wanted`` (float32, any shape, overwritten).

    Saturates at both ends; NaN gives a code that stands for NaN where there is one, else any. Ties go to the even code of
    linear formats and minifloats (as IEEE 754 rounds), else to the lower value.
    """
    linear, book = linear_gen(spec), codebook_of_gen(spec)
    if linear is not None:
        step, base = linear
        signed = spec.code.dtype == "i8"
        if step != 1.0:
            wanted.div_(step)
        wanted.sub_(base / step).round_() if base else wanted.round_()
        wanted.clamp_(*((-128, 127) if signed else (0, 2**spec.code.bits - 1)))
        return wanted.to(spec.code.entry_dtype)
    if book is not None and book.cast is not None:
        low, high = finite_range(gen_table(spec))
        return wanted.clamp_(low, high).to(book.cast).view(torch.uint8)
    return nearest_entry(gen_table(spec), wanted, book).view(spec.code.entry_dtype)


CELLS = 4096
"""Cells that the range of a table is divided into, to find codes without a search."""

FEW = 4096
"""Values below which cells are not worth while."""


def nearest_entry(table: torch.Tensor, wanted: torch.Tensor, book: Codebook | None = None) -> torch.Tensor:
    """uint8 patterns whose entries of ``table`` (float64, NaN: no value) are nearest to ``wanted`` (float32).

    Ties go to the lower value, or for a minifloat ``book`` to the even pattern. Of two patterns of one value the lower wins.
    """
    even = book is not None and book.minifloat is not None
    key = tuple(table.tolist()), even
    borders, patterns = (t.to(wanted.device) for t in borders_of(*key))
    if wanted.numel() < FEW or (cells := _border_cells(*key)) is None:
        return patterns[torch.bucketize(wanted, borders, out_int32=True)]
    # One look at the border nearest to the cell instead of a binary search: a few times faster.
    low, width, border_of, below = cells
    at = wanted.sub(low).div_(width).clamp_(0, CELLS - 1).flatten().int()
    border, base = border_of.to(wanted.device).index_select(0, at), below.to(wanted.device).index_select(0, at)
    return patterns.index_select(0, base.add_(wanted.flatten() > border)).view(wanted.shape)


@functools.cache
def _border_cells(table: tuple[float, ...], even: bool) -> tuple[float, float, torch.Tensor, torch.Tensor] | None:
    """(start, width, border nearest to each cell, how many borders lie below that) of cells over all borders of a table; None
    where borders lie too close for cells."""
    borders = borders_of(table, even)[0].double()
    if len(borders) < 2:
        return None
    span = float(borders[-1] - borders[0])
    low, width = float(borders[0]) - span / 8, 1.25 * span / CELLS
    if float(borders.diff().min()) < 4 * width:
        return None
    middles = low + (torch.arange(CELLS, dtype=torch.float64) + 0.5) * width
    nearest = (middles[:, None] - borders[None, :]).abs().argmin(1)
    return low, width, borders[nearest].to(torch.float32), nearest.to(torch.int32)


@functools.cache
def borders_of(table: tuple[float, ...], even: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 borders between values (a value on a border belongs below it), and the patterns in order of their values."""
    first: dict[float, int] = {}
    for pattern, value in enumerate(table):
        if value == value and abs(value) != float("inf"):
            first.setdefault(value + 0.0, pattern)  # −0 is 0
    values = sorted(first)
    patterns = [first[v] for v in values]
    borders = torch.tensor([(a + b) / 2 for a, b in zip(values, values[1:], strict=False)], dtype=torch.float64).to(torch.float32)
    if even:
        up = torch.tensor([p % 2 == 1 for p in patterns[:-1]])  # the lower neighbour is odd: a tie belongs above
        borders = torch.where(up, torch.nextafter(borders, torch.tensor(-torch.inf)), borders)
    return borders, torch.tensor(patterns, dtype=torch.uint8)


def gen_values(spec: FormatSpec, codes: torch.Tensor) -> torch.Tensor:
    """float32 ``gen`` of ``codes`` as :func:`nearest_code` gives them."""
    linear = linear_gen(spec)
    if linear is not None:
        step, base = linear
        wide = codes.to(torch.float32)
        if step != 1.0:
            wide.mul_(step)
        return wide.add_(base) if base else wide
    table = gen_table(spec).to(torch.float32).to(codes.device)
    return table.index_select(0, codes.view(torch.uint8).flatten().int()).view(codes.shape)


@functools.cache
def reach(spec: FormatSpec) -> tuple[float, float]:
    """Least and greatest ``gen``, each half a step further out: beyond them weights are cut off."""
    values = sorted({v for v in gen_table(spec).tolist() if math.isfinite(v)})
    if len(values) < 2:
        return values[0], values[0]
    return values[0] - (values[1] - values[0]) / 2, values[-1] + (values[-1] - values[-2]) / 2


def nearest_gen(spec: FormatSpec, wanted: torch.Tensor) -> torch.Tensor:
    """``gen`` of the codes nearest to ``wanted`` (float32, overwritten): float32, same shape.

    For tables, what lies within 1/4096 of the range of a border may be taken for its neighbour: good for choosing scales.
    """
    linear = linear_gen(spec)
    low, high = finite_range(gen_table(spec))
    if linear is None:
        wanted.sub_(low).mul_((CELLS - 1) / (high - low)).clamp_(0, CELLS - 1)
        return cells_of(spec).to(wanted.device).index_select(0, wanted.flatten().int()).view(wanted.shape)
    if linear[0] != 1.0:
        return gen_values(spec, nearest_code(spec, wanted))
    shift = linear[1] - round(linear[1])  # rounding may happen where codes are integers: only a fraction must be taken away
    if shift:
        return wanted.sub_(shift).round_().add_(shift).clamp_(low, high)
    return wanted.round_().clamp_(low, high)


@functools.cache
def cells_of(spec: FormatSpec) -> torch.Tensor:
    """float32 ``[CELLS]``: ``gen`` of the code nearest to the middle of each cell."""
    low, high = finite_range(gen_table(spec))
    middles = low + (torch.arange(CELLS, dtype=torch.float64) + 0.5) * ((high - low) / (CELLS - 1))
    return gen_values(spec, nearest_code(spec, middles.to(torch.float32)))
