"""Skeletons with a matrix product, for 2 rows and more: yᵀ = W·xᵀ.

W is the left operand, because the left operand may come from registers on sm_80…sm_90 (mma, wgmma) and from tensor
memory on sm_100: decoded weights never pass through shared memory, and one row of x costs 8 columns, not 16 rows.
The order of K inside a step is free as long as x is loaded in the same order. It is chosen so that the bytes of a word
are elements that one thread of the operand layout holds: (slot, j1, group, j0) for 16-bit operands, whose threads own
pairs of neighbours, and (slot, group, j) for 8-bit operands, whose threads own four.
"""

from __future__ import annotations

from collections.abc import Iterator

import sympy

from ..formats.algebra import Affine
from ..formats.spec import ROW, Part, Plane
from . import triton_scale as scale
from . import triton_text as text
from .triton_act import STEP, blocks, bytes8, form8, is_integer
from .triton_print import Printer
from .triton_words import joined


def dot(printer: Printer, name: str) -> str:
    """out[M, N] = x·Wᵀ (+ bias), 16-bit operands, float32 sums; float32 x goes in as two 16-bit terms (PARTS = 2)."""
    return _kernel(printer, name, narrow=False)


def dot8(printer: Printer, name: str) -> str:
    """out[M, N] = x_scale·(x·Wᵀ) (+ bias) for x quantized per token: int8·int8 → int32, or e4m3 times an fp8 weight.

    The format's ``printer.fused8`` must hold.
    """
    return _kernel(printer, name, narrow=True)


def _kernel(printer: Printer, name: str, narrow: bool) -> str:
    arguments = (f"x_ptr, x_scale_ptr, x_sum_ptr, {text.plane_arguments(printer)}, bias_ptr, out_ptr, "
                 "M, N, K, KP, x_stride, tiles, steps, "
                 + text.constexprs("BT", "BM", "STAGES", "EVEN", "PARTIAL", "HAS_BIAS", "HAS_SCALE", "DEC", "DOT",
                                   "PARTS", "SUM_LOAD", "QUADS"))  # fmt: skip
    body = [
        *_where(printer), *([] if narrow else printer.units()), *text.begin_end(), *text.word_pointers(printer),
        *_x_pointers(printer, narrow), *_scale_pointers(printer), *_accumulators(printer, narrow),
        *([f"sums = KP // {blocks(printer)[1]}"] if narrow and printer.granule else []),
        *_scale_loads(printer, "begin"),
        "for step in tl.range(begin, end, num_stages=STAGES):",
        *text.indented(_step(printer, narrow), 1),
        *_end(printer, narrow),
    ]  # fmt: skip
    return text.kernel(name, arguments, body)


def _where(printer: Printer) -> Iterator[str]:
    count, size = blocks(printer)
    yield f"BK: tl.constexpr = {count * size}"
    yield f"BG: tl.constexpr = {max(size // printer.group, 1)}"
    yield "L: tl.constexpr = 16"
    yield "BN: tl.constexpr = BT * 16"
    yield "first_row = tl.program_id(0).to(tl.int64) * BM"
    yield "first_tile = tl.program_id(1).to(tl.int64) * BT"
    yield "part = tl.program_id(2)"
    yield "local_tile = tl.minimum(tl.arange(0, BT), tiles - 1 - first_tile.to(tl.int32))"
    yield "row = tl.minimum(tl.arange(0, BM), M - 1 - first_row.to(tl.int32))"


def _x_pointers(printer: Printer, narrow: bool) -> Iterator[str]:
    """``x_at`` [BK of one product] in the order of the decoded tile, ``x_from`` [BM, …]."""
    each = _each(printer)
    quads = f"x_at = order % 4 + 4 * (order // 4 // BG) + {each} * (order // 4 % BG)"
    pairs = f"2 * (order // 2 // BG % 2) + 4 * (order // 2 // (2 * BG)) + {each} * (order // 2 % BG)"
    yield f"order = tl.arange(0, {blocks(printer)[1]})"
    if narrow:
        yield quads
    else:
        yield from ("if QUADS:", f"    {quads}", "else:", f"    x_at = order % 2 + {pairs}")
    yield "x_from = x_ptr + first_row * x_stride + row[:, None] * x_stride + x_at[None, :]"


def _each(printer: Printer) -> int:
    """Weights of a group in one product: all, or those of one scale where a group has several."""
    return min(printer.group, blocks(printer)[1])


def _tile(printer: Printer, joined_elements: str, quads: bool) -> str:
    """Elements [BT, BG, 16, j0, j1, s…] as the left operand: rows are (tile, lane), columns in the order of ``x_at``."""
    bits = _each(printer).bit_length() - 1
    last = (1, 4, 3) if quads else (4, 1, 3)
    order = ", ".join(map(str, (0, 2, *range(2 + bits, 4, -1), *last)))
    return f"tl.reshape(tl.permute({joined_elements}, {order}), [BN, {blocks(printer)[1]}])"


def _scale_pointers(printer: Printer) -> Iterator[str]:
    """``f_{plane}`` [BN]: row n of the padded weight, clamped to the last tile."""
    yield "column = tl.minimum(tl.arange(0, BN), (tiles - first_tile.to(tl.int32)) * 16 - 1)"
    for p in text.group_planes(printer):
        for part in p.parts:
            per_tile = f"({text.stored(part)} * {text.lanes_of(p)})"
            yield f"f_{part.name} = p_{part.name} + first_tile * {per_tile} + column // 16 * {per_tile}{_lane(p)}"
    for p in text.row_planes(printer):
        for part in p.parts:
            yield f"n_{part.name} = tl.load(p_{part.name} + first_tile * {text.lanes_of(p)} + {_row(p)})"
        yield f"v_{p.name} = {text.row_entry(p)}"


def _lane(plane: Plane) -> str:
    return " + column % 16" if text.lanes_of(plane) > 1 else ""


def _row(plane: Plane) -> str:
    return "column" if text.lanes_of(plane) > 1 else "column // 16"


def _loads(printer: Printer, part: Part) -> int:
    """Loads of ``part`` in a step: one for each stored element that it touches at known places, else one for each product."""
    count, size = blocks(printer)
    covered = text.span(part)
    return STEP // covered if STEP % covered == 0 else 1 if covered % STEP == 0 else count


def _scale_loads(printer: Printer, step: str) -> Iterator[str]:
    """``n_{part}{i}`` [BN] of step ``step``; beyond the end of K, where x is zero, those of the end."""
    for p in text.group_planes(printer):
        for part in p.parts:
            covered, count = text.span(part), _loads(printer, part)
            for i in range(count):
                at = f"tl.minimum((({step}) * {STEP} + {i * (STEP // count)}) // {covered}, {text.stored(part)} - 1)"
                yield f"n_{part.name}{i} = tl.load(f_{part.name} + {at} * {text.lanes_of(p)})"


def _entries(printer: Printer, b: int) -> Iterator[str]:
    """``v_{plane}`` [BN] of product b of this step."""
    count, size = blocks(printer)

    def loaded(part: Part) -> str:
        return f"n_{part.name}{b * _loads(printer, part) // count}"

    def shift(part: Part) -> str:
        per = part.plane.per
        if STEP % text.span(part) == 0:
            return str(b * size // per % part.entries * part.bits)
        return f"(step * {STEP} + {b * size}) // {per} % {part.entries} * {part.bits}"

    for p in text.group_planes(printer):
        yield f"v_{p.name} = {scale.entry(p, loaded, shift)}"


def _accumulators(printer: Printer, narrow: bool) -> Iterator[str]:
    integer = narrow and is_integer(printer) and printer.granule == ROW
    yield f"acc = tl.zeros([BN, BM], {'tl.int32' if integer else 'tl.float32'})"
    if not narrow and printer.form.offset != 0:
        yield f"ones = tl.full([{blocks(printer)[1]}, 8], 0.125, DOT)"
        yield "sum_x = tl.zeros([BM, 8], tl.float32)"


def _step(printer: Printer, narrow: bool) -> Iterator[str]:
    count, size = blocks(printer)
    for b in range(count):
        if b * size % printer.group == 0:
            yield from text.word_loads(printer, f"(step * {STEP} + {b * size}) // {printer.group}", f"_{b}")
        base = f"step * BK + {b * size}"
        yield "if EVEN:"
        yield f"    x{b} = tl.load(x_from + ({base}))"
        yield "else:"
        yield f"    x{b} = tl.load(x_from + ({base}), mask=(x_at + ({base}) < K)[None, :], other=0.0)"
        if printer.form.offset != 0 and not narrow:
            natural = "x_ptr + first_row * x_stride + row[:, None] * x_stride + order[None, :]"
            yield "if SUM_LOAD:"
            yield f"    xn{b} = tl.load({natural} + ({base}), mask=(order + ({base}) < K)[None, :], other=0.0)"
    for b in range(count):
        yield from _entries(printer, b)
        yield from (_product8(printer, b) if narrow else _product(printer, b))
    # One step ahead in registers: a vector of scales is too narrow for an asynchronous copy.
    yield from _scale_loads(printer, "step + 1")


def _place(printer: Printer, b: int) -> tuple[str, slice]:
    """The tag of the words that hold product b, and which of their slots are its."""
    size, group = blocks(printer)[1], printer.group
    first = b * size % group // 4
    return f"_{b - b * size % group // size}", slice(first, first + _each(printer) // 4)


def _product(printer: Printer, b: int) -> Iterator[str]:
    form, row = printer.form, printer.granule == ROW
    tag, slots = _place(printer, b)
    lines, names = printer.elements(tag)
    yield from lines if slots.start == 0 else ()
    yield f"g = {joined([e for r in names[slots] for e in r])}.to(DOT)"
    yield from ("if QUADS:", f"    g = {_tile(printer, 'g', True)}", "else:", f"    g = {_tile(printer, 'g', False)}")
    yield f"xt = tl.trans(x{b}.to(DOT))"
    yield "acc = tl.dot(g, xt, acc)" if row else "part_sum = tl.dot(g, xt)"
    yield "if PARTS == 2:"
    yield f"    rest = (x{b} - x{b}.to(DOT).to(tl.float32)).to(DOT)"
    yield f"    {'acc = tl.dot(g, tl.trans(rest), acc)' if row else 'part_sum = tl.dot(g, tl.trans(rest), part_sum)'}"
    if form.offset != 0:
        yield from _sums(b, row)
    if not row:
        yield f"acc += part_sum * {_column(printer, form.coeff)}"
        if form.offset != 0:
            yield f"acc += {SPREAD} * {_column(printer, form.offset, unit=False)}"


SPREAD = "tl.sum(sum_x, 1)[None, :]"


def _sums(b: int, row: bool) -> Iterator[str]:
    """Σ x over a period on the matrix unit: x times eight columns of 1/8. Order does not matter, so with SUM_LOAD x is
    copied once more, in its natural order: Triton 3.6 copies nothing ahead that two products read in different roles."""
    yield "if SUM_LOAD:"
    yield f"    xs = xn{b}.to(DOT)"
    yield "else:"
    yield f"    xs = x{b}.to(DOT)"
    yield f"sum_x = tl.dot(xs, ones{', sum_x' if row else ''})"
    yield "if PARTS == 2:"
    yield "    sum_x = tl.dot(rest, ones, sum_x)"


def _column(printer: Printer, expr: sympy.Expr, unit: bool = True) -> str:
    """A hoisted factor as a column [BN, 1] (or a plain number, when it reads no plane)."""
    value = text.factor(printer, expr) + (" * UNIT" if unit else "")
    return f"({value})[:, None]" if expr.free_symbols else f"({value})"


def _product8(printer: Printer, b: int) -> Iterator[str]:
    form, row, integer = form8(printer), printer.granule == ROW, is_integer(printer)
    tag, slots = _place(printer, b)
    yield from bytes8(printer, tag) if slots.start == 0 else ()
    names = [f"b{s}{j}{tag}" for s in range(printer.slots)[slots] for j in range(4)]
    yield f"g = {_tile(printer, joined(names), True)}"
    kind = "out_dtype=tl.int32" if integer else "out_dtype=tl.float32"
    if integer and row:
        yield f"acc = tl.dot(g, tl.trans(x{b}), acc, {kind})"
        return
    # A fresh sum for every product: wgmma adds e4m3 products with about 14 bits, so long sums are taken in float32.
    yield f"part_sum = tl.dot(g, tl.trans(x{b}), {kind}).to(tl.float32)"
    yield "acc += part_sum" if row else f"acc += part_sum * {_column(printer, form.coeff, unit=False)}"
    if form.offset != 0 and not row:
        yield f"entry = step * {blocks(printer)[0]} + {b} + row * 0"
        yield "sum_x = tl.load(x_sum_ptr + (first_row + row) * sums + entry, mask=entry < sums, other=0.0)"
        yield f"acc += sum_x[None, :] * {_column(printer, form.offset, unit=False)}"


def _end(printer: Printer, narrow: bool) -> Iterator[str]:
    form: Affine = form8(printer) if narrow else printer.form
    if printer.granule == ROW:
        yield f"acc = acc.to(tl.float32) * {_column(printer, form.coeff, unit=not narrow)}"
        if form.offset != 0:
            total = "tl.load(x_sum_ptr + first_row + row)[None, :]" if narrow else SPREAD
            yield f"acc += {total} * {_column(printer, form.offset, unit=False)}"
    yield "n = first_tile * 16 + tl.arange(0, BN)"
    yield "m = first_row + tl.arange(0, BM)"
    yield "if HAS_SCALE:"
    yield "    acc = acc * tl.load(x_scale_ptr + first_row + row)[None, :]"
    yield "if HAS_BIAS and not PARTIAL:"
    yield "    acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]"
    yield "inside = (n < N)[:, None] & (m < M)[None, :]"
    yield "out = out_ptr + m[None, :] * N + n[:, None]"
    yield "if PARTIAL:"
    yield "    tl.store(out + part.to(tl.int64) * M * N, acc, mask=inside)"
    yield "else:"
    yield "    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)"
