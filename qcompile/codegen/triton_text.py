"""Pieces that every Triton skeleton is assembled from: arguments, word loads, scale loads, epilogue."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import sympy

from ..formats.spec import ROW, Plane
from .triton_print import Printer

Lines = Iterable[str]


def indented(lines: Lines, depth: int) -> list[str]:
    return ["    " * depth + line for line in lines]


def kernel(name: str, arguments: str, body: Lines) -> str:
    """The text of one jitted kernel."""
    return "\n".join(["@triton.jit", f"def {name}({arguments}):", *indented(body, 1)]) + "\n"


def plane_arguments(printer: Printer) -> str:
    return ", ".join(f"p_{p.name}" for p in printer.spec.planes)


def constexprs(*names: str) -> str:
    return ", ".join(f"{n}: tl.constexpr" for n in names)


def word_pointers(printer: Printer) -> Iterator[str]:
    """Pointers ``w_{plane}_{r}`` of ``[BT, BG·16]`` words: one contiguous run of memory for each tile of 16 rows.

    Needs ``first_tile`` (int64), ``local_tile`` [BT], ``KP`` and ``BG``; group g is ``{words}·16`` words further on.
    """
    yield "at = tl.arange(0, BG * 16)"
    for plane, r in printer.words:
        per_tile = f"(KP // {32 // plane.bits} * 16)"
        count = printer.words_of(plane)
        column = "at" if count == 1 else f"(at // 16 * {16 * count} + {16 * r} + at % 16)"
        yield (f"w_{plane.name}_{r} = p_{plane.name} + first_tile * {per_tile}"
               f" + local_tile[:, None] * {per_tile} + {column}[None, :]")  # fmt: skip


def word_loads(printer: Printer, group: str, tag: str = "") -> Iterator[str]:
    """Loads ``q_{plane}_{r}{tag}`` of ``[BT, BG, 16]`` words that begin at group ``group``; zero beyond KP if not EVEN."""
    yield "if EVEN:"
    for plane, r in printer.words:
        where = f"w_{plane.name}_{r} + ({group}) * {16 * printer.words_of(plane)}"
        yield f"    d_{plane.name}_{r}{tag} = tl.load({where})"
    yield "else:"
    for plane, r in printer.words:
        where = f"w_{plane.name}_{r} + ({group}) * {16 * printer.words_of(plane)}"
        yield (f"    d_{plane.name}_{r}{tag} = tl.load({where}, "
               f"mask=(({group}) + at // 16 < KP // {printer.group})[None, :], other=0)")  # fmt: skip
    for plane, r in printer.words:
        yield f"q_{plane.name}_{r}{tag} = tl.reshape(d_{plane.name}_{r}{tag}, [BT, BG, 16])"


def joined_shape(printer: Printer) -> str:
    """[BT, BG, 16, 2, 2, …]: the shape of joined elements, one dimension for each bit of k inside a group."""
    return ", ".join(["BT", "BG", "16", *["2"] * (printer.group.bit_length() - 1)])


def natural(printer: Printer) -> str:
    """Permutation of joined elements [BT, BG, 16, j0, j1, s…] that puts the bits of k last, highest first."""
    bits = printer.group.bit_length() - 1
    return ", ".join(map(str, [0, 1, 2, *range(2 + bits, 2, -1)]))


def loop_planes(printer: Printer, expr: sympy.Expr) -> list[Plane]:
    """Scale planes of ``expr`` that change along K."""
    return [p for p in printer.span(expr) if p.per != ROW]


def row_planes(printer: Printer) -> list[Plane]:
    return [p for p in printer.spec.scales if p.per == ROW]


def group_planes(printer: Printer) -> list[Plane]:
    return [p for p in printer.spec.scales if p.per != ROW]


# Scales of whole tiles, [BT, periods, 1, 16]: what the kernels without a matrix product use.


def tile_scale_pointers(printer: Printer) -> Iterator[str]:
    """Pointers ``f_{plane}`` of ``[BT, E·16]`` scales, E = ``E_{plane}`` entries in a step of BK weights."""
    for p in group_planes(printer):
        per_tile = f"(KP // {p.per} * 16)"
        yield f"E_{p.name}: tl.constexpr = max(BK // {p.per}, 1)"
        yield f"t_{p.name} = tl.arange(0, E_{p.name} * 16)"
        yield (f"f_{p.name} = p_{p.name} + first_tile * {per_tile} + local_tile[:, None] * {per_tile}"
               f" + t_{p.name}[None, :]")  # fmt: skip
    for p in row_planes(printer):
        yield (f"v_{p.name} = tl.reshape(tl.load(p_{p.name} + first_tile * 16 + local_tile[:, None] * 16"
               " + tl.arange(0, 16)[None, :]), [BT, 1, 1, 16])")  # fmt: skip


def tile_scale_loads(printer: Printer, step: str, into: str = "n_") -> Iterator[str]:
    """Loads ``{into}{plane}`` of the scales of step number ``step``; a step past the end gives zeros."""
    for p in group_planes(printer):
        entry = f"({step}) * BK // {p.per}"
        yield (f"{into}{p.name} = tl.load(f_{p.name} + {entry} * 16, "
               f"mask=({entry} + t_{p.name} // 16 < KP // {p.per})[None, :], other=0.0)")  # fmt: skip


def tile_scale_views(printer: Printer, source: str = "n_") -> Iterator[str]:
    """``v_{plane}`` as [BT, periods, 1, 16], entries that cover several periods repeated."""
    for p in group_planes(printer):
        yield f"v_{p.name} = tl.reshape({source}{p.name}, [BT, E_{p.name}, 1, 16])"
        if p.per != printer.spec.period:
            yield (f"v_{p.name} = tl.reshape(tl.broadcast_to(v_{p.name}, [BT, E_{p.name}, BP // E_{p.name}, 16]),"
                   " [BT, BP, 1, 16])")  # fmt: skip


def factor(printer: Printer, expr: sympy.Expr) -> str:
    """``coeff`` or ``offset`` over the names ``v_{plane}``, in float32."""
    return printer.scaled(expr, {p.name: f"v_{p.name}" for p in printer.spec.scales})


def begin_end() -> list[str]:
    """The half-open range of K steps of this program, split along K by the last grid axis."""
    return ["begin = part * steps", "end = tl.minimum(begin + steps, (KP + BK - 1) // BK)"]


HEADER = '''"""Generated by qcompile.codegen.triton for {label}. Do not edit: the file name is the hash of its text."""

import triton
import triton.language as tl
'''


def module(label: str, kernels: Lines) -> str:
    return "\n\n".join([HEADER.format(label=label), *kernels])
