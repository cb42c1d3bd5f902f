"""Attention over packed keys and values: skeletons that are blind to the two formats.

Tokens are the rows of the weights that keys and values are stored as, 16 to a tile. A program takes BM queries of one
key-value head (all query heads that share it, and neighbouring positions) and BN = 16·BT tokens at a time, with a running
softmax in base 2 and float32. Where scales are constant over a row they leave the products: coeff of a key multiplies its
scores, coeff of a value its probabilities. Other periods are decoded to the operands' type.

Two orientations of one text (:class:`Axes`): with few queries tokens are the rows of S = K·Qᵀ, and channels those of
O = Vᵀ·P, so that 16 queries cost 16 columns and not 64 rows; with many queries it is S = Q·Kᵀ and O = P·V. Float32
queries, and then probabilities, go in as two 16-bit terms (TERMS = 2): exact to 2^-17 where the elements of codes are exact.
Where channels of keys are turned, so are queries and centers beforehand; where those of values are, so are outputs, afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from . import triton_text as text
from .triton_attend_read import Pair, channels, hoists, lift, shifts

LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Axes:
    """Where tokens (and channels) and queries lie in the matrices of a kernel: ``left`` puts tokens in the rows."""

    left: bool

    @property
    def tokens(self) -> int:
        """The axis of tokens in S, of channels in O."""
        return 0 if self.left else 1

    def of_tokens(self, name: str) -> str:
        """A vector over tokens (of S) or channels (of O), to be broadcast."""
        return f"{name}[:, None]" if self.left else f"{name}[None, :]"

    def of_queries(self, name: str) -> str:
        return f"{name}[None, :]" if self.left else f"{name}[:, None]"


def attend(pair: Pair, name: str, axes: Axes) -> str:
    """out = softmax(scores)·V over a part of the tokens: normalized, or if PARTIAL with its maxima and sums in ``stats``.

    Grid: parts of the tokens, sequences times key-value heads, blocks of BM queries. Query m of a head is query m // GROUP of
    the sequence in query head m % GROUP of the GROUP that share the key-value head.
    """
    arguments = (f"q_ptr, {pair.planes()}, start_ptr, table_ptr, mask_ptr, center_ptr, out_ptr, stats_ptr, L, HEADS, "
                 "q_b, q_h, q_l, mask_b, mask_h, mask_l, mask_t, mask_tokens, table_stride, page_tiles, room, factor, cap, "
                 "window, parts, "
                 + text.constexprs("D", "DV", "KP", "VP", "GROUP", "BT", "BM", "BK", "BV", "PAIR", "STAGES", "PAGED", "CAUSAL",
                                   "MASK", "CAPPED", "CENTERED", "WINDOW", "PARTIAL", "DOT", "TERMS"))  # fmt: skip
    body = [
        *_where(pair), *_range(), *_accumulators(pair, axes),
        "for step in tl.range(begin, end, num_stages=STAGES):",
        *text.indented([*_place(), *_scores(pair, axes), *masked(axes), *softmax(axes), *_product(pair, axes)], 1),
        *_end(pair, axes),
    ]  # fmt: skip
    return text.kernel(name, arguments, body)


def _where(pair: Pair) -> Iterator[str]:
    """The program's queries: ``m`` of GROUP·L, ``query`` in the sequence, its ``position``, ``q`` [BM, BK]."""
    yield "BN: tl.constexpr = BT * 16"
    yield "part = tl.program_id(0)"
    yield "sequence = (tl.program_id(1) // HEADS).to(tl.int64)"
    yield "head = (tl.program_id(1) % HEADS).to(tl.int64)"
    yield "first_m = tl.program_id(2) * BM"
    yield "m = first_m + tl.arange(0, BM)"
    yield "query = tl.minimum(m // GROUP, L - 1)"
    yield "query_head = head * GROUP + m % GROUP"
    yield "start = tl.load(start_ptr + sequence).to(tl.int32)"
    yield "position = start + query"
    yield from channels(pair.keys)
    yield "from_q = q_ptr + sequence * q_b + query_head[:, None] * q_h + query.to(tl.int64)[:, None] * q_l + d[None, :]"
    yield "whole = tl.load(from_q, mask=(d < D)[None, :], other=0.0)"
    yield "q = whole.to(DOT)"
    yield "rest = (whole.to(tl.float32) - q.to(tl.float32)).to(DOT)"
    if shifts(pair.keys):
        yield "sum_q = tl.sum(whole.to(tl.float32), 1) * factor"
    yield "if CENTERED:"
    yield "    center = tl.load(center_ptr + (sequence * HEADS + head) * D + d, mask=d < D, other=0.0)"
    yield "    central = tl.sum(whole.to(tl.float32) * center[None, :], 1) * factor"


def _range() -> Iterator[str]:
    """Blocks ``begin`` … ``end`` of this part: every sequence is cut into parts by its own length, behind its window."""
    yield "high = tl.minimum(tl.minimum(start + L, mask_tokens), room)"
    yield "if CAUSAL:"
    yield "    high = tl.minimum(high, start + tl.minimum((first_m + BM - 1) // GROUP, L - 1) + 1)"
    yield "low = 0"
    yield "if WINDOW:"
    yield "    low = tl.maximum(start + first_m // GROUP - window + 1, 0)"
    yield "last_tile = (high - 1) // 16"
    yield "low_block = low // BN"
    yield "blocks = tl.maximum((high + BN - 1) // BN - low_block, 0)"
    yield "each = (blocks + parts - 1) // parts"
    yield "begin = low_block + tl.minimum(part * each, blocks)"
    yield "end = low_block + tl.minimum((part + 1) * each, blocks)"


def _accumulators(pair: Pair, axes: Axes) -> Iterator[str]:
    yield f"acc = tl.zeros({'[BV, BM]' if axes.left else '[BM, BV]'}, tl.float32)"
    yield 'most = tl.full([BM], float("-inf"), tl.float32)'
    yield "total = tl.zeros([BM], tl.float32)"
    if shifts(pair.values):
        yield "shift = tl.zeros([BM], tl.float32)"
    yield "mask_at = sequence * mask_b + query_head * mask_h + query.to(tl.int64) * mask_l"


def _place() -> Iterator[str]:
    """``place`` int64 [BT]: tiles in the order of storage (the last one that counts, beyond it); ``token`` [BN]."""
    yield "tile = tl.minimum(step * BT + tl.arange(0, BT), last_tile)"
    yield "if PAGED:"
    yield "    page = tl.load(table_ptr + sequence * table_stride + tile // page_tiles).to(tl.int64)"
    yield "    place = (page * HEADS + head) * page_tiles + tile % page_tiles"
    yield "else:"
    yield "    place = (sequence * HEADS + head) * page_tiles + tile"
    yield "token = step * BN + tl.arange(0, BN)"
    yield "kept = token < high"


def _scores(pair: Pair, axes: Axes) -> Iterator[str]:
    """``s``: scores in base 2, or what their cap is taken of."""
    yield pair.read("k")
    first, second = ("g, tl.trans(q)", "g, tl.trans(rest)") if axes.left else ("q, tl.trans(g)", "rest, tl.trans(g)")
    yield f"s = tl.dot({first})"
    yield from ("if TERMS == 2:", f"    s = tl.dot({second}, s)")
    yield f"s = s * {axes.of_tokens('(k_coeff * factor)') if hoists(pair.keys) else 'factor'}"
    if hoists(pair.keys) and shifts(pair.keys):
        yield f"s += {axes.of_tokens('k_offset')} * {axes.of_queries('sum_q')}"
    yield from ("if CENTERED:", f"    s += {axes.of_queries('central')}")


def masked(axes: Axes) -> Iterator[str]:
    """Cap, mask, causality and window on scores ``s``; needs ``token``, ``kept``, ``position``, and pointers of the mask."""
    token, position = axes.of_tokens("token"), axes.of_queries("position")
    yield "if CAPPED:"
    yield "    s = (2.0 * tl.sigmoid(2.0 * s) - 1.0) * cap"
    yield f"seen = {axes.of_tokens('kept')}"
    yield "if CAUSAL:"
    yield f"    seen = seen & ({token} <= {position})"
    yield "if WINDOW:"
    yield f"    seen = seen & ({token} > {position} - window)"
    yield "if MASK > 0:"
    yield f"    from_mask = mask_ptr + {axes.of_queries('mask_at')} + {axes.of_tokens('token.to(tl.int64)')} * mask_t"
    yield f"    given = tl.load(from_mask, mask={axes.of_tokens('kept')}, other=0)"
    yield "if MASK == 1:"
    yield "    seen = seen & (given != 0)"
    yield "if MASK == 2:"
    yield f"    given = given.to(tl.float32) * {LOG2E!r}"
    # The least float16 or float32 as a mask is a number: a query that has nothing else attends to all alike.
    yield '    s += tl.where(given == float("-inf"), given, tl.maximum(given, -1e38))'
    yield 's = tl.where(seen, s, float("-inf"))'


def softmax(axes: Axes, largest: float = 0.0) -> Iterator[str]:
    """``p`` of this block, ``alpha`` that earlier sums are multiplied by. If ``largest`` > 0, ``p`` is relative to the block's
    own maximum, where it is ``largest``, and ``beta`` is what the block's sums are multiplied by."""
    yield f"top = tl.max(s, {axes.tokens})"
    yield "above = tl.maximum(most, top)"
    yield 'safe = tl.where(above == float("-inf"), 0.0, above)'
    yield "alpha = tl.exp2(most - safe)"
    if largest:
        yield "beta = tl.exp2(top - safe)"
        yield f'safe = tl.where(top == float("-inf"), 0.0, top) - {math.log2(largest)!r}'
    yield f"p = tl.exp2(s - {axes.of_queries('safe')})"
    yield f"total = total * alpha + tl.sum(p, {axes.tokens}){' * beta' if largest else ''}"
    yield "most = above"


def _product(pair: Pair, axes: Axes) -> Iterator[str]:
    yield pair.read("v")
    if shifts(pair.values):
        yield f"shift = shift * alpha + tl.sum(p * {axes.of_tokens('v_offset')}, {axes.tokens})"
    if hoists(pair.values):
        yield f"p = p * {axes.of_tokens('v_coeff')}"
    yield f"acc = acc * {axes.of_queries('alpha')}"
    first, second = ("tl.trans(g), near", "tl.trans(g), far") if axes.left else ("near, g", "far, g")
    yield "near = p.to(DOT)"
    yield f"acc = tl.dot({first}, acc)"
    yield from ("if TERMS == 2:", "    far = (p - near.to(tl.float32)).to(DOT)", f"    acc = tl.dot({second}, acc)")


def _end(pair: Pair, axes: Axes) -> Iterator[str]:
    if hoists(pair.values):
        yield "DEC: tl.constexpr = DOT"
        yield from pair.values.units()
        yield f"acc = acc * (UNIT * {1.0 / lift(pair.values)!r})"
    if shifts(pair.values):
        yield f"acc += {axes.of_queries('shift')}"
    # A sequence longer than its planes is wrong wherever it comes from: all of it becomes NaN.
    yield 'total = tl.where(start + L > room, float("nan"), total)'
    yield "row = (sequence * HEADS * GROUP + query_head) * L + query"
    yield "channel = tl.arange(0, BV)"
    yield f"inside = {axes.of_queries('(m < GROUP * L)')} & {axes.of_tokens('(channel < DV)')}"
    yield "if PARTIAL:"
    yield "    at = row * parts + part"
    yield f"    tl.store(out_ptr + {axes.of_queries('at')} * DV + {axes.of_tokens('channel')}, acc, mask=inside)"
    yield "    tl.store(stats_ptr + at * 2, most, mask=m < GROUP * L)"
    yield "    tl.store(stats_ptr + at * 2 + 1, total, mask=m < GROUP * L)"
    yield "else:"
    yield "    inverse = tl.where(total == 0.0, 0.0, 1.0 / total)"
    yield f"    out = (acc * {axes.of_queries('inverse')}).to(out_ptr.dtype.element_ty)"
    yield f"    tl.store(out_ptr + {axes.of_queries('row')} * DV + {axes.of_tokens('channel')}, out, mask=inside)"


MERGED = 16
"""Parts that the merging kernel reads at once."""


def merge(name: str) -> str:
    """out[row] = Σ 2^(most − top)·acc / Σ 2^(most − top)·total over parts, in their order; zeros where nothing was seen.
    Sums of values whose channels are turned, TURN together, are turned back."""
    arguments = "acc_ptr, stats_ptr, out_ptr, parts, " + text.constexprs("DV", "BV", "BP", "TURN")
    body = [
        "row = tl.program_id(0).to(tl.int64) * parts",
        "channel = tl.arange(0, BV)",
        "part = tl.arange(0, BP)",
        'most = tl.load(stats_ptr + (row + part) * 2, mask=part < parts, other=float("-inf"))',
        "top = tl.max(most, 0)",
        'top = tl.where(top == float("-inf"), 0.0, top)',
        "acc = tl.zeros([BV], tl.float32)",
        "total = 0.0",
        f"for first in range(0, parts, {MERGED}):",
        f"    at = first + tl.arange(0, {MERGED})",
        "    inside = at < parts",
        '    weight = tl.exp2(tl.load(stats_ptr + (row + at) * 2, mask=inside, other=float("-inf")) - top)',
        "    total += tl.sum(weight * tl.load(stats_ptr + (row + at) * 2 + 1, mask=inside, other=0.0), 0)",
        "    from_acc = acc_ptr + (row + at)[:, None] * DV + channel[None, :]",
        "    some = tl.load(from_acc, mask=inside[:, None] & (channel < DV)[None, :], other=0.0)",
        "    acc += tl.sum(weight[:, None] * some, 0)",
        "acc = acc * tl.where(total == 0.0, 0.0, 1.0 / total)",
        "if TURN > 1:",
        "    acc = tl.reshape(turn(tl.reshape(acc, [1, BV]), 0, 1, BV, TURN, tl.float32, 1), [BV])",
        "tl.store(out_ptr + tl.program_id(0).to(tl.int64) * DV + channel, acc.to(out_ptr.dtype.element_ty), mask=channel < DV)",
    ]
    return text.kernel(name, arguments, body)
