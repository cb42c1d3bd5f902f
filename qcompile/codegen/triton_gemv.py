"""Skeletons for one row (GEMV), and for the sum of split-K parts."""

from __future__ import annotations

from collections.abc import Iterator

from ..formats.spec import ROW
from . import triton_text as text
from .triton_print import Printer
from .triton_words import joined


def gemv(printer: Printer, name: str) -> str:
    """y[N] = W·x for one row of x: every thread holds 4 rows, sums its own words, and scales once per word.

    The words of a step are contiguous, 16 bytes a thread, copied ahead by the pipeline; x comes from shared memory.
    """
    arguments = (f"x_ptr, {text.plane_arguments(printer)}, bias_ptr, out_ptr, N, K, KP, tiles, steps, "
                 + text.constexprs("BT", "BK", "STAGES", "EVEN", "PARTIAL", "HAS_BIAS", "DEC"))  # fmt: skip
    body = [
        *text.tile_at("part"), *text.granules(printer), *printer.units(), *text.begin_end(), *text.word_pointers(printer),
        *text.tile_scale_pointers(printer), *_accumulators(printer), *text.tile_scale_loads(printer, "begin"),
        "x_at = tl.arange(0, BK)",
        "for step in tl.range(begin, end, num_stages=STAGES):",
        *text.indented(_gemv_step(printer), 1),
        *_gemv_end(printer),
    ]  # fmt: skip
    return text.kernel(name, arguments, body)


def _accumulators(printer: Printer) -> Iterator[str]:
    parts = printer.group // printer.cut if printer.cut else 1
    yield f"acc = tl.zeros({f'[BT, BG, 16, {parts}]' if printer.cut else '[BT, BP, BG // BP, 16]'}, tl.float32)"
    if printer.form.offset != 0 and printer.granule == ROW:
        yield "total = tl.zeros([1, BP, BG // BP, 1], tl.float32)"


def _gemv_step(printer: Printer) -> Iterator[str]:
    form = printer.form
    yield from text.word_loads(printer, "step * BG")
    yield "if EVEN:"
    yield "    x = tl.load(x_ptr + step * BK + x_at)"
    yield "else:"
    yield "    x = tl.load(x_ptr + step * BK + x_at, mask=step * BK + x_at < K, other=0.0)"
    yield from text.tile_scale_views(printer, "step")
    lines, names = printer.elements()
    yield from lines
    yield f"g = tl.permute({joined([e for row in names for e in row])}, {text.natural(printer)})"
    yield f"g = tl.reshape(g, [BT, BG, 16, {printer.group}]).to(tl.float32)"
    yield f"xs = tl.reshape(x, [1, BG, 1, {printer.group}]).to(tl.float32)"
    if printer.cut:
        parts = f"{printer.group // printer.cut}, {printer.cut}"
        yield f"dot = tl.sum(tl.reshape(g * xs, [BT, BG, 16, {parts}]), 4)"
    else:
        yield "dot = tl.reshape(tl.sum(g * xs, 3), [BT, BP, BG // BP, 16])"
    if form.offset != 0:
        yield (f"sum_x = tl.sum(tl.reshape(xs, [1, BG, 1, {parts}]), 4)" if printer.cut else
               "sum_x = tl.reshape(tl.sum(xs, 3), [1, BP, BG // BP, 1])")  # fmt: skip
    if printer.granule == ROW:
        yield "acc += dot"
        if form.offset != 0:
            yield "total += sum_x"
        return
    yield f"acc += dot * (({text.placed_factor(printer, form.coeff)}) * UNIT)"
    if form.offset != 0:
        yield f"acc += sum_x * ({text.placed_factor(printer, form.offset)})"
    # The next step's scales are too narrow for an asynchronous copy: they travel in registers, one step ahead.
    yield from text.tile_scale_loads(printer, "step + 1")


def _gemv_end(printer: Printer) -> Iterator[str]:
    form = printer.form
    if printer.granule == ROW:
        yield f"acc = acc * (({text.factor(printer, form.coeff)}) * UNIT)"
        if form.offset != 0:
            yield f"acc += total * ({text.factor(printer, form.offset)})"
    yield "y = tl.sum(tl.sum(acc, 3), 1)" if printer.cut else "y = tl.sum(tl.reshape(acc, [BT, BG, 16]), 1)"
    yield "n = (first_tile + tl.arange(0, BT))[:, None] * 16 + tl.arange(0, 16)[None, :]"
    yield "if HAS_BIAS and not PARTIAL:"
    yield "    y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)"
    yield "if PARTIAL:"
    yield "    tl.store(out_ptr + part * N + n, y, mask=n < N)"
    yield "else:"
    yield "    tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=n < N)"


def reduce(name: str) -> str:
    """out[M, N] = Σ over parts, in part order, plus bias: the deterministic end of a product split along K."""
    arguments = "parts_ptr, bias_ptr, out_ptr, N, size, count, " + text.constexprs("BLOCK", "HAS_BIAS")
    body = [
        "at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)",
        "y = tl.zeros([BLOCK], tl.float32)",
        "for part in range(0, count):",
        "    y += tl.load(parts_ptr + part * size + at, mask=at < size, other=0.0)",
        "if HAS_BIAS:",
        "    y += tl.load(bias_ptr + at % N, mask=at < size, other=0.0).to(tl.float32)",
        "tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=at < size)",
    ]
    return text.kernel(name, arguments, body)
