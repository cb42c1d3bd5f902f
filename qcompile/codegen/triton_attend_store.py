"""Quantizes new keys and values and writes their words into packed planes, a token and head at a time, in one launch.

Scales come from the least and greatest value of a group: what one program sees of one token is all they need. Every stored
element belongs to one token, so that no two programs write one. Tokens that there is no room for are not written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ..errors import FormatError
from ..formats.algebra import finite_range, gen_table, linear_gen
from ..formats.codes import borders_of
from ..formats.ranges import range_planes
from ..formats.spec import FormatSpec, Plane
from . import triton_text as text
from .triton_act import ROUND
from .triton_print import minifloat_gen
from .triton_scale import minifloat_bias, select

LONGEST_TABLE = 64
"""Values of a table of which the nearest is found by comparing with each border."""

FLOATS = {"f32": "tl.float32", "f16": "tl.float16", "bf16": "tl.bfloat16"}
LARGEST = {"f32": torch.finfo(torch.float32).max, "f16": torch.finfo(torch.float16).max,
           "bf16": torch.finfo(torch.bfloat16).max}  # fmt: skip


def check_stores(spec: FormatSpec) -> None:
    """Raises :class:`FormatError`, with the remedy, for a format that this kernel cannot write tokens in."""
    range_planes(spec)
    count, remedy = len(gen_table(spec)), "; use int8, fp8_e4m3 or int4_g32 for keys and values"
    if spec.period & (spec.period - 1):
        raise FormatError(f"format {spec.name!r}: the Triton kernel that writes tokens finds scales of groups of a power of two, "
                          f"found {spec.period}{remedy}")  # fmt: skip
    if linear_gen(spec) is None and minifloat_gen(spec) is None and count > LONGEST_TABLE:
        raise FormatError(f"format {spec.name!r}: the Triton kernel that writes tokens searches tables of at most "
                          f"{LONGEST_TABLE} values, found {count}{remedy}")  # fmt: skip


def storer(spec: FormatSpec, name: str) -> str:
    """A function that quantizes ``x`` float32 [TOK, BK] (zeros beyond D) and stores it in the planes of tile ``place`` in the
    rows ``lane`` [TOK], those that are ``inside``."""
    check_stores(spec)
    planes = ", ".join(f"p_{p.name}" for p in spec.parts)
    body = [
        f"P: tl.constexpr = {spec.period or 'BK'}",
        "G: tl.constexpr = BK // P",
        "x = tl.reshape(x, [TOK, G, P])",
        *_scales(spec),
        *_codes(spec),
        "code = tl.reshape(code, [TOK, BK])",
        *_words(spec),
        *_entries(spec),
    ]
    return text.kernel(name, f"x, {planes}, place, lane, inside, " + text.constexprs("KP", "BK", "TOK"), body)


def _scales(spec: FormatSpec) -> Iterator[str]:
    """``stored_…``: entries as they are stored, [TOK, G], and ``v`` [TOK, G, P], what codes are the nearest to.

    Without a zero the larger extreme meets that of the table; with a zero point the range, zero included, meets the table's;
    with a float offset the same without zero. The scale of nothing but zeros is 1, of what is not finite NaN.
    """
    plane, zero = range_planes(spec)
    low, high = finite_range(gen_table(spec))
    yield "greatest = tl.max(x, 2)"
    yield "least = tl.min(x, 2)"
    if zero is None or zero.is_integer:
        yield from ("greatest = tl.maximum(greatest, 0.0)", "least = tl.minimum(least, 0.0)")
    if zero is None:
        yield f"ideal = tl.div_rn(greatest, {high!r})"
        yield from [f"ideal = tl.maximum(ideal, tl.div_rn(least, {low!r}))"] if low < 0 else []
    else:
        yield f"ideal = tl.div_rn(greatest - least, {high - low!r})"
    yield "ideal = tl.where(ideal > 0.0, ideal, 1.0)"
    yield 'ideal = tl.where(tl.sum(x * 0.0, 2) == 0.0, ideal, float("nan"))'
    yield from _float_entry("scale", "ideal", plane)
    yield "v = tl.div_rn(x, tl.expand_dims(scale, 2))"
    if zero is None:
        return
    if zero.is_integer:
        yield f"point = {low!r} - tl.div_rn(least, scale)"
        yield f"point = tl.where(point > 0.0, tl.minimum(point, {float(2**zero.bits - 1)!r}), 0.0)"
        yield f"point = (point + {ROUND}) - {ROUND}"
        yield "stored_zero = point.to(tl.int32)"
    else:
        yield from _float_entry("zero", f"least - {low!r} * scale", zero)
        yield "point = tl.div_rn(-zero, scale)"
    yield "v += tl.expand_dims(point, 2)"


def _float_entry(name: str, ideal: str, plane: Plane) -> Iterator[str]:
    """Stored, and ``{name}`` as it is read back."""
    largest = LARGEST[plane.dtype]
    yield f"{name} = {ideal}"
    yield f"{name} = tl.where({name} == {name}, tl.minimum(tl.maximum({name}, {-largest!r}), {largest!r}), {name})"
    yield f"stored_{name} = {name}.to({FLOATS[plane.dtype]})"
    yield f"{name} = stored_{name}.to(tl.float32)"


def _codes(spec: FormatSpec) -> Iterator[str]:
    """``code`` int32 [TOK, G, P]: the patterns nearest to ``v``, within the finite values; any, where ``v`` is NaN."""
    linear, book = linear_gen(spec), minifloat_gen(spec)
    if linear is not None:
        low, _ = finite_range(gen_table(spec))
        yield f"v = tl.maximum((v - {low!r}) * {1.0 / linear[0]!r}, 0.0)"
        yield f"v = (tl.minimum(v, {float(2**spec.code.bits - 1)!r}) + {ROUND}) - {ROUND}"
        yield "code = v.to(tl.int32)" + (" ^ 128" if spec.code.dtype == "i8" else "")
    elif book is not None:
        assert book.minifloat is not None
        exponent, mantissa = book.minifloat
        low, high = finite_range(gen_table(spec))
        bias, width = minifloat_bias(book), exponent + mantissa
        yield f"v = tl.minimum(tl.maximum(v, {low!r}), {high!r})"
        # Steps are 2^(e − mantissa) for a leading power 2^e, at least that of subnormals: ties go to the even code.
        yield "power = (v.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)"
        yield f"magic = tl.maximum(power, {2.0 ** (1 - bias)!r}) * {ROUND / 2**mantissa!r}"
        yield "v = (v + magic) - magic"
        yield f"half = (v * {2.0 ** (bias - 15)!r}).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)"
        yield f"code = ((half & 0x8000) >> {15 - width}) | ((half & 0x7FFF) >> {10 - mantissa})"
    else:
        yield from _nearest(spec)


def _nearest(spec: FormatSpec) -> Iterator[str]:
    borders, patterns = borders_of(tuple(gen_table(spec).tolist()), False)
    yield "rank = tl.zeros([TOK, G, P], tl.int32)"
    for border in borders.tolist():
        yield f"rank += (v > {border!r}).to(tl.int32)"
    order = tuple(float(p) for p in patterns.tolist())
    padded = order + (0.0,) * (2 ** math.ceil(math.log2(len(order))) - len(order))
    trivial = order == tuple(map(float, range(len(order))))
    yield "code = rank" if trivial else f"code = {select('rank', padded)}.to(tl.int32)"


def _words(spec: FormatSpec) -> Iterator[str]:
    """Stores the words of every part of the codes, the rows of the tile side by side."""
    for part in spec.code.parts:
        slots = 8 // part.bits
        bits = "code" if part.bits == spec.code.bits else f"((code >> {part.shift}) & {2**part.bits - 1})"
        width = f"W_{part.name}"
        yield f"{width}: tl.constexpr = BK // {part.entries}"
        yield f"at = tl.arange(0, {slots})[:, None] * {part.bits} + tl.arange(0, 4)[None, :] * 8"
        yield f"word = tl.reshape({bits}, [TOK, {width}, {slots}, 4]) << tl.reshape(at, [1, 1, {slots}, 4])"
        yield "word = tl.sum(tl.sum(word, 3), 2)"
        yield from _store(part.name, "word", width, f"(KP // {part.entries})", "tl.int32")


def _entries(spec: FormatSpec) -> Iterator[str]:
    """Stores the entries of the scales; those of less than a byte next to each other."""
    for plane, name in zip(range_planes(spec), ("scale", "zero"), strict=True):
        for part in plane.parts if plane is not None else ():
            count = text.stored(part) if part.plane.per else "1"
            value, size = f"stored_{name}", "G"
            if part.plane.is_integer:
                value = f"((stored_{name} >> {part.shift}) & {2**part.bits - 1})"
            if part.entries > 1:
                each = f"E_{part.name}"
                yield f"{each}: tl.constexpr = {part.entries} if G >= {part.entries} else G"
                yield f"at = tl.reshape(tl.arange(0, {each}), [1, 1, {each}]) * {part.bits}"
                value, size = f"tl.sum(tl.reshape({value}, [TOK, G // {each}, {each}]) << at, 2)", f"G // {each}"
            yield from _store(part.name, value, size, count, "tl.uint8" if part.plane.is_integer else FLOATS[part.plane.dtype])


def _store(name: str, value: str, size: str, count: str, dtype: str) -> Iterator[str]:
    """Stores ``value`` [TOK, size], of which ``count`` exist: element e of a row lies 16·e + lane elements into its tile."""
    yield f"e = tl.arange(0, {size})"
    yield f"to = p_{name} + place * ({count} * 16) + e[:, None] * 16 + lane[None, :]"
    yield f"tl.store(to, tl.trans({value}).to({dtype}), mask=inside[None, :] & (e < {count})[:, None])"


def store(keys: FormatSpec, values: FormatSpec, name: str, store_keys: str, store_values: str) -> str:
    """Grid: blocks of TOK tokens (1, or the 16 of a tile), sequences times heads. ``room``: tokens of a sequence at most."""
    planes = {side: ", ".join(f"{side}_{p.name}" for p in spec.parts) for side, spec in (("k", keys), ("v", values))}
    arguments = (f"x_k, x_v, {planes['k']}, {planes['v']}, start_ptr, table_ptr, L, HEADS, k_b, k_h, k_l, v_b, v_h, v_l, "
                 "table_stride, page_tiles, room, "
                 + text.constexprs("D", "DV", "KP", "VP", "BK", "BV", "TOK", "PAGED", "TURN_K", "TURN_V", "DOT",
                                   "TERMS"))  # fmt: skip
    body = [
        "sequence = (tl.program_id(1) // HEADS).to(tl.int64)",
        "head = (tl.program_id(1) % HEADS).to(tl.int64)",
        "start = tl.load(start_ptr + sequence).to(tl.int32)",
        "base = (start // TOK + tl.program_id(0)) * TOK",
        "token = base + tl.arange(0, TOK) - start",
        "inside = (token >= 0) & (token < L) & (token + start < room)",
        "lane = base % 16 + tl.arange(0, TOK)",
        "tile = tl.minimum(tl.minimum(base, start + L - 1), room - 1) // 16",
        "if PAGED:",
        "    page = tl.load(table_ptr + sequence * table_stride + tile // page_tiles).to(tl.int64)",
        "    place = (page * HEADS + head) * page_tiles + tile % page_tiles",
        "else:",
        "    place = (sequence * HEADS + head) * page_tiles + tile",
    ]
    for side, sizes, helper in (("k", ("D", "KP", "BK"), store_keys), ("v", ("DV", "VP", "BV"), store_values)):
        real, stored, block = sizes
        body += [
            f"d = tl.arange(0, {block})",
            f"from_x = x_{side} + sequence * {side}_b + head * {side}_h + token.to(tl.int64)[:, None] * {side}_l + d[None, :]",
            f"x = tl.load(from_x, mask=inside[:, None] & (d < {real})[None, :], other=0.0).to(tl.float32)",
            f"if TURN_{side.upper()} > 1:",
            f"    x = turn(x, 0, TOK, {block}, TURN_{side.upper()}, DOT, TERMS)",
            f"{helper}(x, {planes[side]}, place, lane, inside, {stored}, {block}, TOK)",
        ]
    return text.kernel(name, arguments, body)
