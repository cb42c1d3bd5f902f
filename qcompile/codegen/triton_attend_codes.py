"""Fresh queries, keys and values as the codes of 8-bit products: skeletons of the quantizing prologue of
:mod:`.triton_attend_fresh`.

Before they are rounded, keys lose their mean over the tokens, which moves all scores of a query alike and so no probability
(unless scores are capped); values in 8 bits lose theirs too, and it is added to the result, since probabilities sum to one. For
int8, channels of queries are multiplied by factors that keys are divided by, after which they are as wide in both: none make the
product of norms, and so the error of scores, less (SmoothAttention, arXiv:2405.04532). Then channels are turned together
(:mod:`qcompile.formats.turning`): of queries and keys alike; of values, and of the result back. Queries and keys have a scale per
row; where scores are all that int8 costs, a scale and a zero point for each group of their channels (:func:`group_of`). Values
have a scale per block of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..formats.turning import MOST
from . import triton_text as text
from .triton_act import ROUND


@dataclass(frozen=True)
class Kind:
    """The codes ("fp8": e4m3, "int8") that Q·Kᵀ and P·V are computed in; "" is 16 bits. ``grouped``: queries and keys have
    scales and zero points for groups of channels."""

    scores: str
    product: str
    grouped: bool = False

    def groups(self, block: int) -> int:
        """Scales that a query or key of ``block`` channels has."""
        return block // group_of(block) if self.grouped else 1


KINDS = {"fp8": Kind("fp8", "fp8"), "int8": Kind("int8", "", grouped=True), "int8_both": Kind("int8", "int8")}
LARGEST = {"fp8": 448.0, "int8": 127.0}

MOST_GROUPS = 4
"""Groups of channels that a row of queries or keys has at most."""

SHIFTS = 4 * MOST_GROUPS
"""Columns of zero points and sums, two to a group, and of zeros: as many as Triton multiplies at least."""


def group_of(block: int) -> int:
    """Channels that share a scale and a zero point, of ``block`` (a power of two from 32): half of them, at most 64 as far as
    there are groups enough."""
    return max(32, min(block // 2, 64), block // MOST_GROUPS)


def sums(name: str) -> str:
    """sums[head, chunk, 2, D] = Σx and Σx² over a chunk of STEPS·BT tokens, in float32. Grid: chunks, sequences times heads."""
    arguments = ("x_ptr, sums_ptr, T, HEADS, x_b, x_h, x_t, chunks, " + text.constexprs("D", "BD", "BT", "STEPS"))
    body = [
        "sequence = (tl.program_id(1) // HEADS).to(tl.int64)",
        "head = (tl.program_id(1) % HEADS).to(tl.int64)",
        "d = tl.arange(0, BD)",
        "from_x = x_ptr + sequence * x_b + head * x_h + d[None, :]",
        "total = tl.zeros([BT, BD], tl.float32)",
        "squares = tl.zeros([BT, BD], tl.float32)",
        "for step in range(0, STEPS):",
        "    token = (tl.program_id(0) * STEPS + step) * BT + tl.arange(0, BT)",
        "    inside = (token < T)[:, None] & (d < D)[None, :]",
        "    x = tl.load(from_x + token.to(tl.int64)[:, None] * x_t, mask=inside, other=0.0).to(tl.float32)",
        "    total += x",
        "    squares += x * x",
        "to = sums_ptr + (tl.program_id(1).to(tl.int64) * chunks + tl.program_id(0)) * 2 * D + d",
        "tl.store(to, tl.sum(total, 0), mask=d < D)",
        "tl.store(to + D, tl.sum(squares, 0), mask=d < D)",
    ]
    return text.kernel(name, arguments, body)


def sides(kind: str, name: str) -> str:
    """What sums say of a key-value head: the mean [BK] of its keys (0 unless SMOOTH); for int8 the factors [BK] of its queries;
    for P·V in 8 bits the mean [BV] of its values. Grid: sequences times heads."""
    arguments = ("k_sums, q_sums, v_sums, centers, factors, means, T, L, k_chunks, q_chunks, "
                 + text.constexprs("D", "DV", "BK", "BV", "GROUP", "SMOOTH"))  # fmt: skip
    body = [
        "place = tl.program_id(0).to(tl.int64)",
        "d = tl.arange(0, BK)",
        *_summed_up("k", "place * k_chunks", "k_chunks", "D", "BK"),
        "center = k_total / T if SMOOTH else tl.zeros([BK], tl.float32)",
        "tl.store(centers + place * BK + d, center)",
    ]
    if KINDS[kind].scores == "int8":
        body += [
            *_summed_up("q", "place * GROUP * q_chunks", "GROUP * q_chunks", "D", "BK"),
            "square = k_squares / T",
            "wide = tl.maximum(square - center * center, square * 1e-6)",  # less than that is what was rounded
            "wide = wide / (q_squares / (L * GROUP))",
            'known = (wide > 0.0) & (wide < float("inf"))',
            "tl.store(factors + place * BK + d, tl.where(known, tl.sqrt(tl.sqrt(wide)), 1.0))",
        ]
    if KINDS[kind].product:
        body += ["d = tl.arange(0, BV)", *_summed_up("v", "place * k_chunks", "k_chunks", "DV", "BV"),
                 "tl.store(means + place * BV + d, v_total / T)"]  # fmt: skip
    return text.kernel(name, arguments, body)


def _summed_up(side: str, first: str, count: str, real: str, block: str) -> Iterator[str]:
    """``…_total`` and ``…_squares`` [block] of ``count`` chunks from ``first``, in their order."""
    yield f"{side}_total = tl.zeros([{block}], tl.float32)"
    yield f"{side}_squares = tl.zeros([{block}], tl.float32)"
    yield f"for chunk in range(0, {count}):"
    yield f"    at = {side}_sums + ({first} + chunk) * 2 * {real} + d"
    yield f"    {side}_total += tl.load(at, mask=d < {real}, other=0.0)"
    yield f"    {side}_squares += tl.load(at + {real}, mask=d < {real}, other=0.0)"


def quantize(kind: str, name: str) -> str:
    """Codes [TP, BK] and scales [groups, TP] of a head's keys, if grouped zero points and sums [TP, SHIFTS]; for P·V in 8 bits
    codes [BV, TP] of its values (tokens side by side, as the matrix unit wants its right operand) and one scale for a
    block. Grid: blocks of BT tokens, heads."""
    scores, product = KINDS[kind].scores, KINDS[kind].product
    arguments = ("k_ptr, v_ptr, centers, factors, means, k_codes, k_scales, k_shifts, v_codes, v_scales, T, TP, HEADS, "
                 "k_b, k_h, k_t, v_b, v_h, v_t, " + text.constexprs("D", "DV", "BK", "BV", "W", "BT", "DOT"))  # fmt: skip
    body = [
        "sequence = (tl.program_id(1) // HEADS).to(tl.int64)",
        "head = (tl.program_id(1) % HEADS).to(tl.int64)",
        "place = tl.program_id(1).to(tl.int64)",
        "token = tl.program_id(0) * BT + tl.arange(0, BT)",
        "inside = token < T",
        *_loaded("k", "D", "BK"),
        *_less_mean("centers", "BK"),
        *(["x = x / tl.load(factors + place * BK + d)[None, :]"] if scores == "int8" else []),
        *turned(scores, "BT", "BK", "2"),
        *scaled(KINDS[kind], "BT"),
        *_kept(KINDS[kind]),
        f"tl.store(k_codes + (place * TP + token)[:, None] * BK + d[None, :], {rounded(scores, placed('x', 'BT', 'BK'))})",
        *(_values(product) if product else ()),
    ]
    return text.kernel(name, arguments, body)


def _loaded(side: str, real: str, block: str) -> Iterator[str]:
    yield f"d = tl.arange(0, {block})"
    yield f"from_x = {side}_ptr + sequence * {side}_b + head * {side}_h + token.to(tl.int64)[:, None] * {side}_t + d[None, :]"
    yield f"x = tl.load(from_x, mask=inside[:, None] & (d < {real})[None, :], other=0.0).to(tl.float32)"


def turned(codes: str, rows: str, block: str, terms: str, zero: str = "0") -> Iterator[str]:
    """``x`` [rows, block], its channels (padding too) turned, or turned back, if ``codes`` are int8.
    Products take it as ``terms`` terms."""
    if codes == "int8":
        yield f"x = turn(x, {zero}, {rows}, {block}, {block} if {block} < {MOST} else {MOST}, DOT, {terms})"


def scaled(kind: Kind, rows: str) -> Iterator[str]:
    """``x`` [rows, BK] in units of its codes; ``reach``, what the largest code stands for. If grouped, that is half of a group's
    range [rows, BK // W], whose ``middle``, a bfloat16 number, is its zero point; ``whole`` is the sum of a group."""
    if kind.grouped:
        yield f"x = tl.reshape(x, [{rows}, BK // W, W])"
        yield "high, low, whole = tl.max(x, 2), tl.min(x, 2), tl.sum(x, 2)"
        yield "middle = ((high + low) * 0.5).to(tl.bfloat16).to(tl.float32)"
        yield "reach = tl.maximum(high - middle, middle - low)"
        yield f"x = (x - middle[:, :, None]) * tl.where(reach > 0.0, {LARGEST[kind.scores]} / reach, 0.0)[:, :, None]"
        yield f"x = tl.reshape(x, [{rows}, BK])"
    else:
        yield "reach = tl.max(tl.abs(x), 1)"
        yield f"x = x * tl.where(reach > 0.0, {LARGEST[kind.scores]} / reach, 0.0)[:, None]"


def _kept(kind: Kind) -> Iterator[str]:
    """Stores what a key has beside its codes."""
    scale = f"reach * {1 / LARGEST[kind.scores]!r}"
    if kind.grouped:
        yield "group = place * (BK // W) + tl.arange(0, BK // W)"
        yield f"tl.store(k_scales + group[None, :] * TP + token[:, None], {scale})"
        yield f"to = k_shifts + (place * TP + token)[:, None] * {SHIFTS} + tl.arange(0, {SHIFTS})[None, :]"
        yield "tl.store(to, in_turns(middle, whole, BT, BK // W))"
    else:
        yield f"tl.store(k_scales + place * TP + token, {scale})"


def in_turns() -> str:
    """Function: columns of x and y [ROWS, GROUPS] in turns, and zeros between them up to [ROWS, SHIFTS], in bfloat16."""
    body = ["x = tl.reshape(tl.join(x, y), [ROWS, 2 * GROUPS])"]
    groups = 1
    while groups <= MOST_GROUPS:
        body += [f"if GROUPS <= {groups}:", f"    x = tl.reshape(tl.join(x, tl.zeros_like(x)), [ROWS, {4 * groups}])"]
        groups *= 2
    return text.kernel("in_turns", "x, y, " + text.constexprs("ROWS", "GROUPS"), [*body, "return x.to(tl.bfloat16)"])


def _less_mean(means: str, block: str) -> Iterator[str]:
    yield f"x = tl.where(inside[:, None], x - tl.load({means} + place * {block} + d)[None, :], 0.0)"


def rounded(codes: str, name: str) -> str:
    return f"{name}.to(tl.float8e4nv)" if codes == "fp8" else f"({name} + {ROUND}).to(tl.int32, bitcast=True).to(tl.int8)"


def placed(x: str, rows: str, columns: str) -> str:
    """``x`` [rows, columns] with column 16h + 8a + 2c + b at 16h + 4c + 2a + b. So stand the channels of keys and queries, and
    the tokens of values and probabilities: what a thread holds of a product (turned queries, scores) is then, in 8 bits, what
    it multiplies of the left operand of the next."""
    return f"tl.reshape(tl.permute(tl.reshape({x}, [{rows}, {columns} // 16, 2, 4, 2]), 0, 1, 3, 2, 4), [{rows}, {columns}])"


def _values(codes: str) -> Iterator[str]:
    yield from _loaded("v", "DV", "BV")
    yield from _less_mean("means", "BV")
    yield from turned(codes, "BT", "BV", "2")
    yield "top = tl.max(tl.abs(x))"  # at once: Triton 3.6 fails at maxima of maxima on sm_100
    yield f"x = x * tl.where(top > 0.0, {LARGEST[codes]} / top, 0.0)"
    yield f"tl.store(v_scales + place * (TP // BT) + tl.program_id(0), top * {1 / LARGEST[codes]!r})"
    yield "to = v_codes + (place * BV + d)[:, None] * TP + token[None, :]"
    yield f"tl.store(to, {rounded(codes, placed('tl.trans(x)', 'BV', 'BT'))})"
