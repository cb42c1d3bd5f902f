"""Pieces that every Triton skeleton is assembled from: arguments, word loads, scales of whole tiles, factors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import sympy

from ..formats.spec import ROW, TILE_N, Part, Plane
from . import triton_scale as scale
from .triton_print import Printer

Lines = Iterable[str]


def indented(lines: Lines, depth: int) -> list[str]:
    return ["    " * depth + line for line in lines]


def kernel(name: str, arguments: str, body: Lines) -> str:
    """The text of one jitted kernel."""
    return "\n".join(["@triton.jit", f"def {name}({arguments}):", *indented(body, 1)]) + "\n"


def plane_arguments(printer: Printer) -> str:
    return ", ".join(f"p_{p.name}" for p in printer.spec.parts)


def constexprs(*names: str) -> str:
    return ", ".join(f"{n}: tl.constexpr" for n in names)


def tile_at(along: str) -> list[str]:
    """Lines for whole tiles of 16 rows: the program's first tile on grid axis 0, its BT tiles (clamped to the last one)."""
    return [
        "L: tl.constexpr = 16",
        "first_tile = tl.program_id(0).to(tl.int64) * BT",
        f"{along} = tl.program_id(1)",
        "local_tile = tl.minimum(tl.arange(0, BT), tiles - 1 - first_tile.to(tl.int32))",
    ]


def word_pointers(printer: Printer, one_row: bool = False) -> Iterator[str]:
    """Pointers ``w_{part}_{r}`` of ``[BT, BG·L]`` words: one contiguous run of memory for each tile of 16 rows.

    Needs ``first_tile`` (int64), ``local_tile`` [BT], ``KP`` and ``BG``; group g is ``{words}·16`` words further on.
    With ``one_row`` L is 1 and ``lane`` names the row of the tile.
    """
    yield "at = tl.arange(0, BG * L)"
    for part, r in printer.words:
        per_tile = f"(KP // {part.entries} * 16)"
        count = printer.words_of(part)
        column = f"(at // L * {16 * count} + {16 * r} + {'lane' if one_row else 'at % 16'})"
        if count == 1 and not one_row:
            column = "at"
        yield (f"w_{part.name}_{r} = p_{part.name} + first_tile * {per_tile}"
               f" + local_tile[:, None] * {per_tile} + {column}[None, :]")  # fmt: skip


def word_loads(printer: Printer, group: str, tag: str = "") -> Iterator[str]:
    """Loads ``q_{part}_{r}{tag}`` of ``[BT, BG, L]`` words that begin at group ``group``; zero beyond KP if not EVEN."""
    for even in (True, False):
        yield "if EVEN:" if even else "else:"
        for part, r in printer.words:
            mask = "" if even else f", mask=(({group}) + at // L < KP // {printer.group})[None, :], other=0"
            where = f"w_{part.name}_{r} + ({group}) * {16 * printer.words_of(part)}"
            yield f"    d_{part.name}_{r}{tag} = tl.load({where}{mask})"
    for part, r in printer.words:
        yield f"q_{part.name}_{r}{tag} = tl.reshape(d_{part.name}_{r}{tag}, [BT, BG, L])"


def natural(printer: Printer) -> str:
    """Permutation of joined elements [BT, BG, L, j0, j1, s…] that puts the bits of k last, highest first."""
    bits = printer.group.bit_length() - 1
    return ", ".join(map(str, [0, 1, 2, *range(2 + bits, 2, -1)]))


def row_planes(printer: Printer) -> list[Plane]:
    return [p for p in printer.spec.scales if p.per == ROW]


def group_planes(printer: Printer) -> list[Plane]:
    return [p for p in printer.spec.scales if p.per != ROW]


def lanes_of(plane: Plane) -> int:
    """Entries stored side by side for the rows of a tile: 16, or 1 where rows share them."""
    return TILE_N if plane.rows == 1 else 1


def stored(part: Part) -> str:
    """Stored elements of a row of KP weights: the last may cover less."""
    return f"((KP + {span(part) - 1}) // {span(part)})"


def span(part: Part) -> int:
    """Weights that one stored element of a scale covers."""
    return part.plane.per * part.entries


def row_entry(plane: Plane) -> str:
    """The entry of a plane with one per row, from ``n_{part}``: the lowest bits of its byte."""
    return scale.entry(plane, lambda part: f"n_{part.name}", lambda part: "0")


# Scales of whole tiles, [BT, granules, 1, L]: what the kernels without a matrix product use. A granule is the longest run of
# weights, a power of two, that has one scale wherever it begins; entries that cover several granules are loaded for each.


def granules(printer: Printer) -> list[str]:
    """Constexpr ``BG`` groups and ``BP`` granules of a step of BK weights."""
    count = "1" if printer.granule == ROW else f"BK // {printer.granule}"
    return [f"BG: tl.constexpr = BK // {printer.group}", f"BP: tl.constexpr = {count}"]


def tile_scale_pointers(printer: Printer, one_row: bool = False) -> Iterator[str]:
    """Pointers ``f_{part}`` of ``[BT, BP·L]`` scales at the first step; what has an entry per row is loaded, as ``v_{plane}``."""
    if group_planes(printer):
        yield "granule = tl.arange(0, BP * L) // L"
    for p in group_planes(printer):
        lane = "" if lanes_of(p) == 1 else " + lane" if one_row else " + tl.arange(0, BP * L) % 16"
        for part in p.parts:
            per_tile, ratio = f"({stored(part)} * {lanes_of(p)})", span(part) // printer.granule
            start = f"p_{part.name} + first_tile * {per_tile} + local_tile[:, None] * {per_tile}"
            yield f"if BP % {ratio} == 0:"
            yield f"    f_{part.name} = {start} + (granule // {ratio} * {lanes_of(p)}{lane})[None, :]"
            yield "else:"
            yield f"    f_{part.name} = {start} + (granule * 0{lane})[None, :]"
    for p in row_planes(printer):
        lane = " * 0" if lanes_of(p) == 1 else " + lane" if one_row else ""
        for part in p.parts:
            start = f"p_{part.name} + first_tile * {lanes_of(p)} + local_tile[:, None] * {lanes_of(p)}"
            yield f"n_{part.name} = tl.load({start} + (tl.arange(0, L){lane})[None, :])"
        yield f"v_{p.name} = tl.reshape({row_entry(p)}, [BT, 1, 1, L])"


def tile_scale_loads(printer: Printer, step: str) -> Iterator[str]:
    """Loads ``n_{part}`` of the scales of step number ``step``; a step past the end gives zeros."""
    for p in group_planes(printer):
        for part in p.parts:
            ratio, lanes = span(part) // printer.granule, lanes_of(p)
            mask = f"mask=(({step}) * BP + granule < KP // {printer.granule})[None, :], other={0 if p.is_integer else 0.0})"
            yield f"if BP % {ratio} == 0:"
            yield f"    n_{part.name} = tl.load(f_{part.name} + ({step}) * (BP // {ratio} * {lanes}), {mask}"
            yield "else:"
            yield f"    n_{part.name} = tl.load(f_{part.name} + ((({step}) * BP + granule) // {ratio} * {lanes})[None, :], {mask}"


def tile_scale_views(printer: Printer, step: str) -> Iterator[str]:
    """``v_{plane}`` of step ``step`` as [BT, granules, 1, L]."""
    for p in group_planes(printer):
        each = p.per // printer.granule

        def shift(part: Part, each: int = each) -> str:
            return f"(({step}) * BP + granule) // {each} % {part.entries} * {part.bits}"

        value = scale.entry(p, lambda part: f"n_{part.name}", lambda part: f"({shift(part)})[None, :]")
        yield f"v_{p.name} = tl.reshape({value}, [BT, BP, 1, L])"


def factor(printer: Printer, expr: sympy.Expr) -> str:
    """``coeff`` or ``offset`` over the names ``v_{plane}``, in float32."""
    return scale.expression(printer.spec, expr, {p.name: f"v_{p.name}" for p in printer.spec.scales})


def placed_factor(printer: Printer, expr: sympy.Expr) -> str:
    """:func:`factor` where it is multiplied: as it is, [BT, BP, 1, L], or [BT, BG, L, parts] where groups have several."""
    value, reads = factor(printer, expr), {s.name for s in expr.free_symbols}
    if not printer.cut or not reads:
        return value
    if any(p.name in reads for p in group_planes(printer)):
        value = f"tl.reshape({value}, [BT, BG, {printer.group // printer.cut}, L])"
    return f"tl.permute({value}, 0, 1, 3, 2)"


def begin_end() -> list[str]:
    """The half-open range of K steps of this program, split along K by the last grid axis; padding beyond K is left out."""
    return ["begin = part * steps", "end = tl.minimum(begin + steps, (K + BK - 1) // BK)"]


HEADER = '''"""Generated by qcompile.codegen.triton for {label}. Do not edit: the file name is the hash of its text."""

import triton
import triton.language as tl
'''


def module(label: str, kernels: Lines, permutes: bool) -> str:
    header = HEADER.format(label=label) + ("from triton.language.extra.cuda import libdevice\n" if permutes else "")
    return "\n\n".join([header, *kernels])
