"""Attention over fresh keys and values in 8-bit products: skeletons of the quantizing prologue and of the attention.

``fp8``: Q·Kᵀ and P·V in e4m3. ``int8``: Q·Kᵀ in int8, P·V in 16 bits. ``int8_both``: both in int8. Before they are rounded,
keys lose their mean over the tokens, which moves all scores of a query alike and so no probability (unless scores are capped);
values in 8 bits lose theirs too, and it is added to the result, since probabilities sum to one. For int8, channels are then
turned together (:mod:`qcompile.formats.turning`): of queries and keys alike; of values, and of the result back.
Queries and keys have a scale per row, and where scores are all that int8 costs, a zero point, which lowers the error by about a
tenth; values have a scale per block of tokens. Every block's P·V in 8 bits is a sum of its own, added in float32, since wgmma
adds e4m3 with about 14 bits; its probabilities are relative to the block's own largest, since int8 has no small ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..formats.turning import MOST
from . import triton_text as text
from .triton_act import ROUND
from .triton_attend import Axes, masked, softmax


@dataclass(frozen=True)
class Kind:
    """The codes ("fp8": e4m3, "int8") that Q·Kᵀ and P·V are computed in; "" is 16 bits. ``shifted``: rows of queries and keys
    have zero points."""

    scores: str
    product: str
    shifted: bool = False

    @property
    def terms(self) -> int:
        """Numbers that a key has beside its codes: its scale; its zero point and the sum of its channels."""
        return 3 if self.shifted else 1


KINDS = {"fp8": Kind("fp8", "fp8"), "int8": Kind("int8", "", shifted=True), "int8_both": Kind("int8", "int8")}
LARGEST = {"fp8": 448.0, "int8": 127.0}
LIKELIEST = {"fp8": 256.0, "int8": 127.0, "": 0.0}
"""A block's largest probability in units of its codes: with 2^8, normal numbers of e4m3 reach down to 2^-14 of it. 0: in 16
bits, probabilities are relative to the largest so far."""

MAGIC = 0x4B400000
"""The bits of 1.5·2^23: added to an integer below 2^22 in size they make the float32 1.5·2^23 + integer."""

WIDEST = 256
"""Channels, or tokens, up to which products of int8 stay below 2^22."""


def sums(name: str) -> str:
    """sums[head, chunk, D] = Σ over a chunk of STEPS·BT tokens of x, in float32. Grid: chunks, sequences times heads."""
    arguments = ("x_ptr, sums_ptr, T, HEADS, x_b, x_h, x_t, chunks, " + text.constexprs("D", "BD", "BT", "STEPS"))
    body = [
        "sequence = (tl.program_id(1) // HEADS).to(tl.int64)",
        "head = (tl.program_id(1) % HEADS).to(tl.int64)",
        "d = tl.arange(0, BD)",
        "from_x = x_ptr + sequence * x_b + head * x_h + d[None, :]",
        "total = tl.zeros([BT, BD], tl.float32)",
        "for step in range(0, STEPS):",
        "    token = (tl.program_id(0) * STEPS + step) * BT + tl.arange(0, BT)",
        "    inside = (token < T)[:, None] & (d < D)[None, :]",
        "    total += tl.load(from_x + token.to(tl.int64)[:, None] * x_t, mask=inside, other=0.0).to(tl.float32)",
        "to = sums_ptr + (tl.program_id(1).to(tl.int64) * chunks + tl.program_id(0)) * D + d",
        "tl.store(to, tl.sum(total, 0), mask=d < D)",
    ]
    return text.kernel(name, arguments, body)


def quantize(kind: str, name: str) -> str:
    """Codes [TP, BK] and terms [:attr:`Kind.terms`, TP] of a head's keys; for P·V in 8 bits codes [BV, TP] of its values (tokens
    side by side, as the matrix unit wants its right operand), one scale for a block, and their mean [DV]. Grid: blocks of BT
    tokens, heads."""
    scores, product = KINDS[kind].scores, KINDS[kind].product
    arguments = ("k_ptr, v_ptr, k_sums_ptr, v_sums_ptr, k_codes, k_terms, v_codes, v_scales, means_ptr, T, TP, HEADS, "
                 "k_b, k_h, k_t, v_b, v_h, v_t, chunks, " + text.constexprs("D", "DV", "BK", "BV", "BT", "SMOOTH",
                                                                            "DOT"))  # fmt: skip
    body = [
        "sequence = (tl.program_id(1) // HEADS).to(tl.int64)",
        "head = (tl.program_id(1) % HEADS).to(tl.int64)",
        "place = tl.program_id(1).to(tl.int64)",
        "token = tl.program_id(0) * BT + tl.arange(0, BT)",
        "inside = token < T",
        *_loaded("k", "D", "BK"),
        "if SMOOTH:",
        *text.indented(_mean("k", "D", "BK"), 1),
        "    x = tl.where(inside[:, None], x - mean[None, :], 0.0)",
        *_turned(scores, "BT", "BK"),
        *_scaled(KINDS[kind]),
        f"to = k_terms + place * {KINDS[kind].terms} * TP + token",
        f"tl.store(to, top * {1 / LARGEST[scores]!r})",
        *(("tl.store(to + TP, middle)", "tl.store(to + 2 * TP, whole)") if KINDS[kind].shifted else ()),
        f"tl.store(k_codes + (place * TP + token)[:, None] * BK + d[None, :], {_rounded(scores, _placed('x', 'BT', 'BK'))})",
        *(_values(product) if product else ()),
    ]
    return text.kernel(name, arguments, body)


def _loaded(side: str, real: str, block: str) -> Iterator[str]:
    yield f"d = tl.arange(0, {block})"
    yield f"from_x = {side}_ptr + sequence * {side}_b + head * {side}_h + token.to(tl.int64)[:, None] * {side}_t + d[None, :]"
    yield f"x = tl.load(from_x, mask=inside[:, None] & (d < {real})[None, :], other=0.0).to(tl.float32)"


def _turned(codes: str, rows: str, block: str, zero: str = "0") -> Iterator[str]:
    """``x`` [rows, block], its channels (padding too) turned, or turned back, if ``codes`` are int8."""
    if codes == "int8":
        yield f"x = turn(x, {zero}, {rows}, {block}, {block} if {block} < {MOST} else {MOST}, DOT, 1)"


def _scaled(kind: Kind) -> Iterator[str]:
    """``x`` in units of its rows' codes; ``top``, what the largest code stands for. If shifted, that is half of a row's range,
    whose ``middle`` is its zero point; ``whole`` is the sum of a row."""
    if kind.shifted:
        yield "high, low, whole = tl.max(x, 1), tl.min(x, 1), tl.sum(x, 1)"
        yield "middle = (high + low) * 0.5"
        yield "top = (high - low) * 0.5"
        yield "x = x - middle[:, None]"
    else:
        yield "top = tl.max(tl.abs(x), 1)"
    yield f"x = x * tl.where(top > 0.0, {LARGEST[kind.scores]} / top, 0.0)[:, None]"


def _mean(side: str, real: str, block: str) -> Iterator[str]:
    """``mean`` [block] of a head, from the sums of its chunks in their order."""
    yield f"mean = tl.zeros([{block}], tl.float32)"
    yield "for chunk in range(0, chunks):"
    yield f"    mean += tl.load({side}_sums_ptr + (place * chunks + chunk) * {real} + d, mask=d < {real}, other=0.0)"
    yield "mean = mean / T"


def _rounded(codes: str, name: str) -> str:
    return f"{name}.to(tl.float8e4nv)" if codes == "fp8" else f"({name} + {ROUND}).to(tl.int32, bitcast=True).to(tl.int8)"


def _placed(x: str, rows: str, columns: str) -> str:
    """``x`` [rows, columns] with column 16h + 8a + 2c + b at 16h + 4c + 2a + b. So stand the channels of keys and queries, and
    the tokens of values and probabilities: what a thread holds of a product (turned queries, scores) is then, in 8 bits, what
    it multiplies of the left operand of the next."""
    return f"tl.reshape(tl.permute(tl.reshape({x}, [{rows}, {columns} // 16, 2, 4, 2]), 0, 1, 3, 2, 4), [{rows}, {columns}])"


def _values(codes: str) -> Iterator[str]:
    yield from _loaded("v", "DV", "BV")
    yield from _mean("v", "DV", "BV")
    yield "x = tl.where(inside[:, None], x - mean[None, :], 0.0)"
    yield from _turned(codes, "BT", "BV")
    yield "top = tl.max(tl.max(tl.abs(x), 1), 0)"
    yield f"x = x * tl.where(top > 0.0, {LARGEST[codes]} / top, 0.0)"
    yield f"tl.store(v_scales + place * (TP // BT) + tl.program_id(0), top * {1 / LARGEST[codes]!r})"
    yield "to = v_codes + (place * BV + d)[:, None] * TP + token[None, :]"
    yield f"tl.store(to, {_rounded(codes, _placed('tl.trans(x)', 'BV', 'BT'))})"
    yield "if tl.program_id(0) == 0:"
    yield "    tl.store(means_ptr + place * DV + d, mean, mask=d < DV)"


def fresh(kind: str, name: str) -> str:
    """out = softmax(scores)·V. Grid: blocks of BM queries, sequences times query heads (GROUP of them to a key-value head)."""
    arguments = ("q_ptr, k_codes, k_terms, v_ptr, v_codes, v_scales, means_ptr, mask_ptr, out_ptr, L, T, TP, HEADS, start, "
                 "q_b, q_h, q_l, v_b, v_h, v_t, mask_b, mask_h, mask_l, mask_t, mask_tokens, factor, cap, window, "
                 + text.constexprs("D", "DV", "BK", "BV", "GROUP", "BM", "BN", "STAGES", "CAUSAL", "MASK", "CAPPED", "WINDOW",
                                   "DOT"))  # fmt: skip
    axes, product = Axes(False), KINDS[kind].product
    body = [
        *_queries(KINDS[kind]), *_range(),
        "acc = tl.zeros([BM, BV], tl.float32)",
        'most = tl.full([BM], float("-inf"), tl.float32)',
        "total = tl.zeros([BM], tl.float32)",
        "for step in tl.range(begin, end, num_stages=STAGES):",
        *text.indented([*_scores(KINDS[kind]), *masked(axes), *softmax(axes, LIKELIEST[product]), *_product(product)], 1),
        "x = acc * tl.where(total > 0.0, 1.0 / total, 0.0)[:, None]",
        *(_restored(product) if product else ()),
        "to = out_ptr + ((sequence * HEADS * GROUP + query_head) * L + m)[:, None] * DV + channel[None, :]",
        "tl.store(to, x.to(out_ptr.dtype.element_ty), mask=(m < L)[:, None] & (channel < DV)[None, :])",
    ]  # fmt: skip
    return text.kernel(name, arguments, body)


def _queries(kind: Kind) -> Iterator[str]:
    """``q`` [BM, BK] as codes and ``q_factor`` [BM], its scale times that of scores; if shifted, what zero points and sums of
    keys are multiplied by."""
    yield "sequence = (tl.program_id(1) // (HEADS * GROUP)).to(tl.int64)"
    yield "query_head = (tl.program_id(1) % (HEADS * GROUP)).to(tl.int64)"
    yield "place = sequence * HEADS + query_head // GROUP"
    yield "first_m = tl.program_id(0) * BM"
    yield "m = first_m + tl.arange(0, BM)"
    yield "query = tl.minimum(m, L - 1)"
    yield "position = start + query"
    yield "d = tl.arange(0, BK)"
    yield "channel = tl.arange(0, BV)"
    yield "from_q = q_ptr + sequence * q_b + query_head * q_h + query.to(tl.int64)[:, None] * q_l + d[None, :]"
    yield "x = tl.load(from_q, mask=(d < D)[None, :], other=0.0).to(tl.float32)"
    yield from _turned(kind.scores, "BM", "BK")
    yield from _scaled(kind)
    yield f"q = {_rounded(kind.scores, _placed('x', 'BM', 'BK'))}"
    yield f"q_factor = top * (factor * {1 / LARGEST[kind.scores]!r})"
    if kind.shifted:
        yield "of_middles = (whole - BK * middle) * factor"
        yield "of_sums = middle * factor"
    yield "mask_at = sequence * mask_b + query_head * mask_h + query.to(tl.int64) * mask_l"


def _range() -> Iterator[str]:
    yield "high = tl.minimum(T, mask_tokens)"
    yield "if CAUSAL:"
    yield "    high = tl.minimum(high, start + tl.minimum(first_m + BM, L))"
    yield "begin = 0"
    yield "if WINDOW:"
    yield "    begin = tl.maximum(start + first_m - window + 1, 0) // BN"
    yield "end = tl.maximum((high + BN - 1) // BN, begin)"


def _scores(kind: Kind) -> Iterator[str]:
    """``s`` [BM, BN]: scores in base 2, or what their cap is taken of. Of rows q = a·x + b and k = c·y + d with codes x and y,
    the product is ac·Σxy + d·(Σq − b·BK) + b·Σk."""
    yield "token = step * BN + tl.arange(0, BN)"
    yield "kept = token < high"
    yield "k = tl.load(k_codes + (place * TP + token)[:, None] * BK + d[None, :])"
    yield f"from_terms = k_terms + place * {kind.terms} * TP + token"
    yield "k_scale = tl.load(from_terms)"
    if kind.scores == "fp8":
        yield "s = tl.dot(q, tl.trans(k)) * q_factor[:, None]"
    else:
        yield f"if BK <= {WIDEST}:"
        yield f"    s = {_summed('q', 'k', '[BM, BN]')}"
        yield f"    s = s * q_factor[:, None] - (q_factor * {ROUND})[:, None]"
        yield "else:"
        yield "    s = tl.dot(q, tl.trans(k), out_dtype=tl.int32).to(tl.float32) * q_factor[:, None]"
    if kind.shifted:
        yield "k_middle = tl.load(from_terms + TP)"
        yield "k_sum = tl.load(from_terms + 2 * TP)"
        yield "s = s * k_scale[None, :] + (of_middles[:, None] * k_middle[None, :] + of_sums[:, None] * k_sum[None, :])"
    else:
        yield "s = s * k_scale[None, :]"


def _summed(a: str, b: str, shape: str) -> str:
    """1.5·2^23 + a·bᵀ of int8, float32. Whoever multiplies it by a factor takes 1.5·2^23 times the factor away, in the same
    instruction; what that rounds is at most a unit of the products."""
    return f"tl.dot({a}, tl.trans({b}), tl.full({shape}, {MAGIC}, tl.int32), out_dtype=tl.int32).to(tl.float32, bitcast=True)"


def _product(codes: str) -> Iterator[str]:
    if codes:
        yield "v = tl.load(v_codes + (place * BV + channel)[:, None] * TP + token[None, :])"
        yield "beta = beta * tl.load(v_scales + place * (TP // BN) + step)"
        yield f"p = {_rounded(codes, _placed('p', 'BM', 'BN'))}"
    if codes == "fp8":
        yield "acc = acc * alpha[:, None] + tl.dot(p, tl.trans(v)) * beta[:, None]"
        return
    if codes == "int8":
        yield f"acc = acc * alpha[:, None] - (beta * {ROUND})[:, None]"
        yield f"acc += {_summed('p', 'v', '[BM, BV]')} * beta[:, None]"
        return
    yield "inside = (token < T)[:, None] & (channel < DV)[None, :]"
    yield "from_v = v_ptr + sequence * v_b + (query_head // GROUP) * v_h + token.to(tl.int64)[:, None] * v_t + channel[None, :]"
    yield "v = tl.load(from_v, mask=inside, other=0.0).to(DOT)"
    yield "acc = tl.dot(p.to(DOT), v, acc * alpha[:, None])"


def _restored(codes: str) -> Iterator[str]:
    """``x`` [BM, BV] turned back, with the mean of values."""
    yield from _turned(codes, "BM", "BV", "tl.minimum(T, 0)")
    yield "mean = tl.load(means_ptr + place * DV + channel, mask=channel < DV, other=0.0)"
    yield "x = tl.where((total > 0.0)[:, None], x + mean[None, :], 0.0)"
