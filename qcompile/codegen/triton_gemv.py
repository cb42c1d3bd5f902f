"""Skeletons without a matrix product: one row (GEMV), decode to a matrix, and the sum of split-K parts."""

from __future__ import annotations

from collections.abc import Iterator

from ..formats.spec import ROW
from . import triton_text as text
from .triton_print import Printer, joined


def gemv(printer: Printer, name: str) -> str:
    """y[N] = W·x for one row of x: every thread holds 4 rows, sums its own words, and scales once per word.

    The words of a step are contiguous, 16 bytes a thread, copied ahead by the pipeline; x comes from shared memory.
    """
    arguments = (f"x_ptr, {text.plane_arguments(printer)}, bias_ptr, out_ptr, N, K, KP, tiles, steps, "
                 + text.constexprs("BT", "BK", "STAGES", "EVEN", "PARTIAL", "HAS_BIAS", "DEC"))  # fmt: skip
    body = [
        "first_tile = tl.program_id(0).to(tl.int64) * BT",
        "part = tl.program_id(1)",
        "local_tile = tl.minimum(tl.arange(0, BT), tiles - 1 - first_tile.to(tl.int32))",
        *_step_shape(printer), *printer.units(), *text.begin_end(), *text.word_pointers(printer),
        *text.tile_scale_pointers(printer), *_accumulators(printer), *text.tile_scale_loads(printer, "begin"),
        "x_at = tl.arange(0, BK)",
        "for step in tl.range(begin, end, num_stages=STAGES):",
        *text.indented(_gemv_step(printer), 1),
        *_gemv_end(printer),
    ]  # fmt: skip
    return text.kernel(name, arguments, body)


def _step_shape(printer: Printer) -> list[str]:
    period = printer.spec.period
    periods = "1" if period == ROW else f"BK // {period}"
    return [f"BG: tl.constexpr = BK // {printer.group}", f"BP: tl.constexpr = {periods}"]


def _accumulators(printer: Printer) -> Iterator[str]:
    yield "acc = tl.zeros([BT, BP, BG // BP, 16], tl.float32)"
    if printer.form.offset != 0 and printer.spec.period == ROW:
        yield "total = tl.zeros([1, BP, BG // BP, 1], tl.float32)"


def _gemv_step(printer: Printer) -> Iterator[str]:
    form = printer.form
    yield from text.word_loads(printer, "step * BG")
    yield "if EVEN:"
    yield "    x = tl.load(x_ptr + step * BK + x_at)"
    yield "else:"
    yield "    x = tl.load(x_ptr + step * BK + x_at, mask=step * BK + x_at < K, other=0.0)"
    yield from text.tile_scale_views(printer)
    lines, names = printer.elements()
    yield from lines
    yield f"g = tl.permute({joined([e for row in names for e in row])}, {text.natural(printer)})"
    yield f"g = tl.reshape(g, [BT, BG, 16, {printer.group}]).to(tl.float32)"
    yield f"xs = tl.reshape(x, [1, BG, 1, {printer.group}]).to(tl.float32)"
    yield "dot = tl.reshape(tl.sum(g * xs, 3), [BT, BP, BG // BP, 16])"
    if form.offset != 0:
        yield "sum_x = tl.reshape(tl.sum(xs, 3), [1, BP, BG // BP, 1])"
    if printer.spec.period == ROW:
        yield "acc += dot"
        if form.offset != 0:
            yield "total += sum_x"
        return
    yield f"acc += dot * (({text.factor(printer, form.coeff)}) * UNIT)"
    if form.offset != 0:
        yield f"acc += sum_x * ({text.factor(printer, form.offset)})"
    # The next step's scales are too narrow for an asynchronous copy: they travel in registers, one step ahead.
    yield from text.tile_scale_loads(printer, "step + 1")


def _gemv_end(printer: Printer) -> Iterator[str]:
    form = printer.form
    if printer.spec.period == ROW:
        yield f"acc = acc * (({text.factor(printer, form.coeff)}) * UNIT)"
        if form.offset != 0:
            yield f"acc += total * ({text.factor(printer, form.offset)})"
    yield "y = tl.sum(tl.reshape(acc, [BT, BG, 16]), 1)"
    yield "n = (first_tile + tl.arange(0, BT))[:, None] * 16 + tl.arange(0, 16)[None, :]"
    yield "if HAS_BIAS and not PARTIAL:"
    yield "    y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)"
    yield "if PARTIAL:"
    yield "    tl.store(out_ptr + part * N + n, y, mask=n < N)"
    yield "else:"
    yield "    tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=n < N)"


def decode(printer: Printer, name: str) -> str:
    """out[N, K] = the weight in ``out``'s dtype, computed in float32 and rounded once."""
    arguments = (f"{text.plane_arguments(printer)}, out_ptr, N, K, KP, tiles, "
                 + text.constexprs("BT", "BK", "EVEN", "DEC"))  # fmt: skip
    lines, names = printer.elements()
    bits = printer.group.bit_length() - 1
    order = ", ".join(map(str, [0, 2, 1, *range(2 + bits, 2, -1)]))
    body = [
        "first_tile = tl.program_id(0).to(tl.int64) * BT",
        "step = tl.program_id(1)",
        "local_tile = tl.minimum(tl.arange(0, BT), tiles - 1 - first_tile.to(tl.int32))",
        *_step_shape(printer), *printer.units(), *text.word_pointers(printer), *text.tile_scale_pointers(printer),
        *text.word_loads(printer, "step * BG"), *text.tile_scale_loads(printer, "step"), *text.tile_scale_views(printer),
        *lines,
        f"g = {joined([e for row in names for e in row])}.to(tl.float32)",
        f"g = tl.reshape(g, [BT, BP, BG // BP, 16, {printer.group}])",
        *_decoded(printer),
        f"g = tl.permute(tl.reshape(g, [{text.joined_shape(printer)}]), {order})",
        "g = tl.reshape(g, [BT * 16, BK])",
        "row = tl.arange(0, BT * 16)",
        "k = step * BK + tl.arange(0, BK)",
        "inside = (first_tile * 16 + row < N)[:, None] & (k < K)[None, :]",
        "out = out_ptr + first_tile * 16 * K + row[:, None] * K + k[None, :]",
        "tl.store(out, g.to(out_ptr.dtype.element_ty), mask=inside)",
    ]  # fmt: skip
    return text.kernel(name, arguments, body)


def _decoded(printer: Printer) -> Iterator[str]:
    """``g`` of [BT, BP, groups, 16, weights] times coeff plus offset."""
    form = printer.form
    for expr, line in ((form.coeff, "g = g * {} * UNIT"), (form.offset, "g = g + {}")):
        if expr.free_symbols:
            yield line.format(f"tl.expand_dims({text.factor(printer, expr)}, 4)")
        elif expr != 0:
            yield line.format(text.factor(printer, expr))


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
