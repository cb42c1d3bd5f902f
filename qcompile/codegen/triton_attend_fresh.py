"""Attention over fresh keys and values in 8-bit products, which :mod:`.triton_attend_codes` makes: skeletons.

``fp8``: Q·Kᵀ and P·V in e4m3. ``int8``: Q·Kᵀ in int8, P·V in 16 bits. ``int8_both``: both in int8. Groups of channels that have
scales of their own are summed in float32. Every block's P·V in 8 bits is a sum of its own, added in float32, since wgmma adds
e4m3 with about 14 bits; its probabilities are relative to the block's own largest, since int8 has no small ones.
"""

from __future__ import annotations

from collections.abc import Iterator

from . import triton_text as text
from .triton_act import ROUND
from .triton_attend import Axes, masked, softmax
from .triton_attend_codes import KINDS, LARGEST, MOST_GROUPS, SHIFTS, Kind, placed, rounded, scaled, turned

LIKELIEST = {"fp8": 256.0, "int8": 127.0, "": 0.0}
"""A block's largest probability in units of its codes: with 2^8, normal numbers of e4m3 reach down to 2^-14 of it. 0: in 16
bits, probabilities are relative to the largest so far."""

MAGIC = 0x4B400000
"""The bits of 1.5·2^23: added to an integer below 2^22 in size they make the float32 1.5·2^23 + integer."""

WIDEST = 256
"""Channels, or tokens, up to which products of int8 stay below 2^22."""


def fresh(kind: str, name: str) -> str:
    """out = softmax(scores)·V. Grid: blocks of BM queries, sequences times query heads (GROUP of them to a key-value head)."""
    arguments = ("q_ptr, k_codes, k_scales, k_shifts, v_ptr, v_codes, v_scales, factors, means, mask_ptr, out_ptr, L, T, TP, "
                 "HEADS, start, q_b, q_h, q_l, v_b, v_h, v_t, mask_b, mask_h, mask_l, mask_t, mask_tokens, factor, cap, window, "
                 + text.constexprs("D", "DV", "BK", "BV", "W", "GROUP", "BM", "BN", "STAGES", "CAUSAL", "MASK", "CAPPED",
                                   "WINDOW", "DOT", "TERMS"))  # fmt: skip
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
        "m = first_m + tl.minimum(T, 0) + tl.arange(0, BM)",  # anew, of what no compiler knows to be 0: not kept through the loop
        "to = out_ptr + ((sequence * HEADS * GROUP + query_head) * L + m)[:, None] * DV + channel[None, :]",
        "tl.store(to, x.to(out_ptr.dtype.element_ty), mask=(m < L)[:, None] & (channel < DV)[None, :])",
    ]  # fmt: skip
    return text.kernel(name, arguments, body)


def _queries(kind: Kind) -> Iterator[str]:
    """``q`` [BM, BK] as codes of queries times the scale of scores, and ``q_factor`` [BM], their scale; if grouped, ``q0`` …
    [BM, W], ``q_factor0`` … and ``q_shifts`` [BM, SHIFTS], which zero points and sums of keys are multiplied by."""
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
    if kind.scores == "int8":
        yield "x = x * tl.load(factors + place * BK + d)[None, :]"
    yield from turned(kind.scores, "BM", "BK", "1 if DOT == tl.float16 else 2")  # times factors, 8 bits of bfloat16 are few
    yield "x = x * factor"
    yield from scaled(kind, "BM")
    yield f"q = {rounded(kind.scores, placed('x', 'BM', 'BK'))}"
    yield f"q_factor = reach * {1 / LARGEST[kind.scores]!r}"
    if kind.grouped:
        yield "q_shifts = in_turns(whole - W * middle, middle, BM, BK // W)"
        yield "in_group = tl.arange(0, W)"
        yield from _groups("q", "W")
        yield from _groups("q_factor", "1")
    yield "mask_at = sequence * mask_b + query_head * mask_h + query.to(tl.int64) * mask_l"


def _groups(name: str, width: str) -> Iterator[str]:
    """``name``0 … [BM, width], or [BM] if that is 1, of ``name`` [BM, groups·width]."""
    shape = "[BM]" if width == "1" else f"[BM, {width}]"
    yield "if BK // W == 1:"
    yield f"    {name}0 = tl.reshape({name}, {shape})"
    yield "if BK // W == 2:"
    yield f"    {name}0, {name}1 = halves({name}, BM, {width}, {shape})"
    yield "if BK // W == 4:"
    yield f"    {name}_low, {name}_high = halves({name}, BM, 2 * {width}, [BM, 2 * {width}])"
    yield f"    {name}0, {name}1 = halves({name}_low, BM, {width}, {shape})"
    yield f"    {name}2, {name}3 = halves({name}_high, BM, {width}, {shape})"


def halves() -> str:
    """Function: the two halves of x [ROWS, 2·WIDTH] along its columns, in SHAPE."""
    body = ["first, second = tl.split(tl.permute(tl.reshape(x, [ROWS, 2, WIDTH]), 0, 2, 1))",
            "return tl.reshape(first, SHAPE), tl.reshape(second, SHAPE)"]  # fmt: skip
    return text.kernel("halves", "x, " + text.constexprs("ROWS", "WIDTH", "SHAPE"), body)


def _range() -> Iterator[str]:
    yield "high = tl.minimum(T, mask_tokens)"
    yield "if CAUSAL:"
    yield "    high = tl.minimum(high, start + tl.minimum(first_m + BM, L))"
    yield "begin = 0"
    yield "if WINDOW:"
    yield "    begin = tl.maximum(start + first_m - window + 1, 0) // BN"
    yield "end = tl.maximum((high + BN - 1) // BN, begin)"


def _scores(kind: Kind) -> Iterator[str]:
    """``s`` [BM, BN]: scores in base 2, or what their cap is taken of."""
    yield "token = step * BN + tl.arange(0, BN)"
    yield "kept = token < high"
    if kind.grouped:
        yield from _grouped_scores()
        return
    yield "k = tl.load(k_codes + (place * TP + token)[:, None] * BK + d[None, :])"
    yield "k_scale = tl.load(k_scales + place * TP + token)"
    if kind.scores == "fp8":
        yield "s = tl.dot(q, tl.trans(k)) * q_factor[:, None]"
    else:
        yield f"if BK <= {WIDEST}:"
        yield f"    s = {_summed('q', 'k', '[BM, BN]')}"
        yield f"    s = s * q_factor[:, None] - (q_factor * {ROUND})[:, None]"
        yield "else:"
        yield "    s = tl.dot(q, tl.trans(k), out_dtype=tl.int32).to(tl.float32) * q_factor[:, None]"
    yield "s = s * k_scale[None, :]"


def _grouped_scores() -> Iterator[str]:
    """Of groups q = a·x + b and k = c·y + d with codes x and y, the product is ac·Σxy + d·(Σq − b·W) + b·Σk; all but the first
    are one product in bfloat16."""
    yield f"shifts = tl.load(k_shifts + place * TP * {SHIFTS} + (token[:, None] * {SHIFTS} + tl.arange(0, {SHIFTS})[None, :]))"
    yield 's = tl.dot(q_shifts, tl.trans(shifts))'
    for i in range(MOST_GROUPS):
        yield f"if BK // W > {i}:"
        yield f"    k = tl.load(k_codes + (place * TP * BK + {i} * W) + (token[:, None] * BK + in_group[None, :]))"
        yield f"    k_scale = tl.load(k_scales + ((place * (BK // W) + {i}) * TP) + token)"
        yield f"    part = {_summed(f'q{i}', 'k', '[BM, BN]')}"
        yield f"    part = part * q_factor{i}[:, None] - (q_factor{i} * {ROUND})[:, None]"
        yield "    s += part * k_scale[None, :]"


def _summed(a: str, b: str, shape: str) -> str:
    """1.5·2^23 + a·bᵀ of int8, float32. Whoever multiplies it by a factor takes 1.5·2^23 times the factor away, in the same
    instruction; what that rounds is at most a unit of the products."""
    return f"tl.dot({a}, tl.trans({b}), tl.full({shape}, {MAGIC}, tl.int32), out_dtype=tl.int32).to(tl.float32, bitcast=True)"


def _product(codes: str) -> Iterator[str]:
    if codes:
        yield "v = tl.load(v_codes + (place * BV + channel)[:, None] * TP + token[None, :])"
        yield "beta = beta * tl.load(v_scales + place * (TP // BN) + step)"
        yield f"p = {rounded(codes, placed('p', 'BM', 'BN'))}"
    if codes == "fp8":
        yield "acc = acc * alpha[:, None] + tl.dot(p, tl.trans(v)) * beta[:, None]"
        return
    if codes == "int8":
        yield f"acc = acc * alpha[:, None] - (beta * {ROUND})[:, None]"
        yield f"acc += {_summed('p', 'v', '[BM, BV]')} * beta[:, None]"
        return
    yield "near = tl.minimum(token, T - 1).to(tl.int64)"
    yield "from_v = v_ptr + sequence * v_b + (query_head // GROUP) * v_h + near[:, None] * v_t + channel[None, :]"
    yield "v = tl.load(from_v, mask=(channel < DV)[None, :], other=0.0).to(DOT)"
    yield "acc = tl.dot(p.to(DOT), v, acc * alpha[:, None])"


def _restored(codes: str) -> Iterator[str]:
    """``x`` [BM, BV] turned back, with the mean of values."""
    yield from turned(codes, "BM", "BV", "TERMS", "tl.minimum(T, 0)")
    yield "mean = tl.load(means + place * BV + channel)"
    yield "x = tl.where((total > 0.0)[:, None], x + mean[None, :], 0.0)"
