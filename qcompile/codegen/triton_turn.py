"""Channels of keys, values and queries turned together in registers: what :mod:`qcompile.formats.turning` says."""

from __future__ import annotations

from collections.abc import Iterator

from ..formats.turning import MOST
from . import triton_text as text

AT_ONCE = 64
"""Channels that one product turns; more are then added to and taken from each other."""

LEAST = 16
"""Rows and channels that a product takes at least."""


def turning() -> list[str]:
    """The functions that kernels call. ``turn(x, zero, ROWS, B, R, DOT, TERMS)`` gives ``x`` float32 [ROWS, B], every R
    neighbouring channels (a power of two up to :data:`MOST`) times the Walsh–Hadamard matrix over the root of R. Products take
    ``x`` as TERMS terms of DOT: what DOT holds exactly needs one. ``zero`` is 0; where no compiler can know that, two matrices of
    signs do not become one that is kept through a loop between.
    """
    sizes = text.constexprs("ROWS", "B")
    return [text.kernel("butterfly", f"x, {sizes}, HALF: tl.constexpr", _butterfly()),
            text.kernel("turn", f"x, zero, {sizes}, {text.constexprs('R', 'DOT', 'TERMS')}", _turn())]  # fmt: skip


BLOCK = 16
"""Rows that :func:`turn_rows` takes at a time."""


def turn_rows(name: str) -> str:
    """out [B, H, L, D] = the rows of x [B, H, L, D], turned; x may be out. Grid: blocks of rows."""
    arguments = "x_ptr, out_ptr, rows, H, L, x_b, x_h, x_l, " + text.constexprs("D", "B", "TURN", "DOT", "TERMS")
    body = [
        f"row = tl.program_id(0) * {BLOCK} + tl.arange(0, {BLOCK})",
        "channel = tl.arange(0, B)",
        "inside = (row < rows)[:, None] & (channel < D)[None, :]",
        "sequence, head, place = row // (H * L), row // L % H, row % L",
        "start = sequence.to(tl.int64) * x_b + head.to(tl.int64) * x_h + place.to(tl.int64) * x_l",
        "x = tl.load(x_ptr + start[:, None] + channel[None, :], mask=inside, other=0.0).to(tl.float32)",
        f"x = turn(x, 0, {BLOCK}, B, TURN, DOT, TERMS)",
        "to = out_ptr + row.to(tl.int64)[:, None] * D + channel[None, :]",
        "tl.store(to, x.to(out_ptr.dtype.element_ty), mask=inside)",
    ]
    return text.kernel(name, arguments, body)


def _butterfly() -> Iterator[str]:
    yield "x = tl.reshape(x, [ROWS * B // (2 * HALF), 2, HALF])"
    yield "first, second = tl.split(tl.permute(x, 0, 2, 1))"
    yield "both = tl.join(first + second, first - second)"
    yield "return tl.reshape(tl.permute(both, 0, 2, 1), [ROWS, B])"


def _turn() -> Iterator[str]:
    yield f"E: tl.constexpr = {AT_ONCE} if R > {AT_ONCE} else R"
    yield f"if E < {LEAST}:"
    for half in _halves(1, LEAST // 2):
        yield f"    if E > {half}:"
        yield f"        x = butterfly(x, ROWS, B, {half})"
    yield "else:"
    yield from text.indented(_product(), 1)
    for half in _halves(AT_ONCE, MOST):
        yield f"if R > {half}:"
        yield f"    x = butterfly(x, ROWS, B, {half})"
    yield "return x * (1.0 / R**0.5)"


def _halves(first: int, end: int) -> Iterator[int]:
    while first < end:
        yield first
        first *= 2


def _product() -> Iterator[str]:
    """Every E channels times ±1, the parity of the bits that two of them share."""
    yield "bits = tl.arange(0, E) + zero"
    yield "bits = bits[:, None] & bits[None, :]"
    yield from (f"bits = bits ^ (bits >> {shift})" for shift in (4, 2, 1))
    yield "signs = 1.0 - 2.0 * (bits & 1).to(tl.float32)"
    yield "x = tl.reshape(x, [ROWS * B // E, E])"
    yield f"if ROWS * B // E >= {LEAST}:"
    yield "    near = x.to(DOT)"
    yield "    turned = tl.dot(near, signs.to(DOT))"
    yield "    if TERMS == 2:"
    yield "        turned = tl.dot((x - near.to(tl.float32)).to(DOT), signs.to(DOT), turned)"
    yield "    x = turned"
    yield "else:"
    yield "    x = tl.sum(x[:, :, None] * signs[None, :, :], 1)"
    yield "x = tl.reshape(x, [ROWS, B])"
