"""Skeletons that write weights: a whole matrix, or the rows that indices name. They serve every period."""

from __future__ import annotations

from collections.abc import Iterator

from . import triton_text as text
from .triton_print import Printer
from .triton_words import joined


def decode(printer: Printer, name: str) -> str:
    """out[N, K] = the weight in ``out``'s dtype, computed in float32 and rounded once."""
    arguments = (f"{text.plane_arguments(printer)}, out_ptr, N, K, KP, tiles, "
                 + text.constexprs("BT", "BK", "EVEN", "DEC"))  # fmt: skip
    body = [
        *text.tile_at("step"), *_weights(printer),
        "row = tl.arange(0, BT * 16)",
        "inside = (first_tile * 16 + row < N)[:, None] & (k < K)[None, :]",
        "out = out_ptr + first_tile * 16 * K + row[:, None] * K + k[None, :]",
        "tl.store(out, g.to(out_ptr.dtype.element_ty), mask=inside)",
    ]  # fmt: skip
    return text.kernel(name, arguments, body)


def rows(printer: Printer, name: str) -> str:
    """out[i, K] = row ``indices[i]`` of the weight, as :func:`decode` gives it; a program does BK weights of one row."""
    arguments = (f"indices_ptr, {text.plane_arguments(printer)}, out_ptr, K, KP, "
                 + text.constexprs("BK", "EVEN", "DEC"))  # fmt: skip
    body = [
        "BT: tl.constexpr = 1",
        "L: tl.constexpr = 1",
        "place = tl.program_id(0).to(tl.int64)",
        "step = tl.program_id(1)",
        "index = tl.load(indices_ptr + place).to(tl.int64)",
        "first_tile = index // 16",
        "lane = (index % 16).to(tl.int32)",
        "local_tile = tl.arange(0, BT)",
        *_weights(printer, one_row=True),
        "out = out_ptr + place * K + k[None, :]",
        "tl.store(out, g.to(out_ptr.dtype.element_ty), mask=(k < K)[None, :])",
    ]
    return text.kernel(name, arguments, body)


def _weights(printer: Printer, one_row: bool = False) -> Iterator[str]:
    """``g`` [BT·L, BK]: the weights at ``k`` [BK] of step ``step``."""
    yield from loads(printer, one_row)
    yield from values(printer)
    yield "g = tl.reshape(tl.permute(g, 0, 2, 1, 3), [BT * L, BK])"
    yield "k = step * BK + tl.arange(0, BK)"


def loads(printer: Printer, one_row: bool = False) -> Iterator[str]:
    """Words ``q_{part}_{r}`` [BT, BG, L] and scales ``v_{plane}`` [BT, BP or 1, 1, L] of step ``step``."""
    yield from text.granules(printer)
    yield from printer.units()
    yield from text.word_pointers(printer, one_row)
    yield from text.tile_scale_pointers(printer, one_row)
    yield from text.word_loads(printer, "step * BG")
    yield from text.tile_scale_loads(printer, "step")
    yield from text.tile_scale_views(printer, "step")


def elements(printer: Printer) -> Iterator[str]:
    """``g`` [BT, BG, L, group]: the elements of loaded words, gen / UNIT in ``DEC``."""
    lines, names = printer.elements()
    yield from lines
    yield f"g = tl.permute({joined([e for row in names for e in row])}, {text.natural(printer)})"
    yield f"g = tl.reshape(g, [BT, BG, L, {printer.group}])"


def values(printer: Printer) -> Iterator[str]:
    """``g`` [BT, BG, L, group] in float32: the weights of loaded words and scales."""
    yield from elements(printer)
    yield "g = g.to(tl.float32) * UNIT"
    yield from _scaled(printer)


def _scaled(printer: Printer) -> Iterator[str]:
    """``g`` times coeff plus offset; factors are [BT, BP, 1, L], with several granules in a group or several groups in one."""
    form, group = printer.form, printer.group
    cut = printer.cut
    shape = f"[BT, BG, L, {group // cut}, {cut}]" if cut else f"[BT, BP, BG // BP, L, {group}]"
    yield f"g = tl.reshape(g, {shape})"
    for expr, sign in ((form.coeff, "*"), (form.offset, "+")):
        if not expr.free_symbols:
            if expr != (1 if sign == "*" else 0):
                yield f"g = g {sign} {text.factor(printer, expr)}"
            continue
        yield f"f = {text.placed_factor(printer, expr)}"
        yield f"g = g {sign} tl.expand_dims(f, 4)"
    yield f"g = tl.reshape(g, [BT, BG, L, {group}])"
