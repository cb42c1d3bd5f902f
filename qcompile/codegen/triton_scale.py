"""Scales in generated Triton text: their stored entries, and expressions (coeff, offset) over them in float32."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import sympy
import torch

from ..errors import FormatError
from ..formats.spec import Codebook, FormatSpec, Part, Plane

LARGEST_SELECT = 64
"""Entries of a scale's codebook that is no minifloat: a select for each of them, once per period."""


def entry(plane: Plane, loaded: Callable[[Part], str], shift: Callable[[Part], str]) -> str:
    """The entry of ``plane`` from loaded elements of its parts, ``shift`` bits into their bytes: int32 for integers (the
    value for i8, the pattern for others), the stored type for floats."""
    if not plane.is_integer:
        return loaded(plane.parts[0])
    if plane.dtype == "i8":
        return f"{loaded(plane.parts[0])}.to(tl.int8, bitcast=True).to(tl.int32)"
    terms = []
    for part in plane.parts:
        byte = f"{loaded(part)}.to(tl.int32)"
        if part.entries > 1:
            byte = f"(({byte} >> ({shift(part)})) & {2**part.bits - 1})"
        terms.append(f"({byte} << {part.shift})" if part.shift else byte)
    return " | ".join(terms)


def expression(spec: FormatSpec, expr: sympy.Expr, names: dict[str, str]) -> str:
    """``expr`` over scale planes, in float32; ``names`` are tensors as :func:`entry` gives them.

    Raises :class:`FormatError` for what has no printed form.
    """
    if expr.is_Number:
        return repr(float(expr))
    if expr.is_Symbol:
        return f"{names[expr.name]}.to(tl.float32)"
    if expr.is_Add or expr.is_Mul:
        sign = " + " if expr.is_Add else " * "
        return "(" + sign.join(expression(spec, a, names) for a in expr.args) + ")"
    if expr.is_Pow and expr.exp.is_Integer and expr.exp > 0:
        return "(" + " * ".join([expression(spec, expr.base, names)] * int(expr.exp)) + ")"
    book = next((b for b in spec.codebooks if b.name == expr.func.__name__), None)
    if book is None or not expr.args[0].is_Symbol or (len(book.values) > LARGEST_SELECT and not is_minifloat(book)):
        raise FormatError(f"format {spec.name!r}: no Triton kernel for scales by {expr}; they can have sums, products, powers, "
                          f"minifloats and codebooks of at most {LARGEST_SELECT} values")  # fmt: skip
    plane = next(p for p in spec.planes if p.name == expr.args[0].name)
    code = f"({names[plane.name]} & 255)" if plane.dtype == "i8" else names[plane.name]
    return minifloat(code, book) if is_minifloat(book) else select(code, book.values)


def minifloat_bias(book: Codebook) -> int:
    assert book.minifloat is not None
    return int(2 ** (book.minifloat[0] - 1) - 1)


@functools.cache
def is_minifloat(book: Codebook) -> bool:
    """Whether the finite values are those of a float of the marked shape (OCP: biased exponent, subnormals)."""
    if book.minifloat is None:
        return False
    exponent, mantissa = book.minifloat
    if len(book.values) not in (2 ** (exponent + mantissa), 2 ** (1 + exponent + mantissa)):
        return False
    if book.minifloat == (8, 0):
        wanted = tuple(math.ldexp(1.0, c - 127) for c in range(255))
        return len(book.values) == 256 and book.values[:255] == wanted
    codes = torch.arange(len(book.values))
    e, m = (codes >> mantissa) & (2**exponent - 1), codes & (2**mantissa - 1)
    step = 2.0 ** (e.clamp_min(1) - minifloat_bias(book)).double()
    size = torch.where(e > 0, 1 + m / 2**mantissa, m / 2**mantissa) * step
    want = torch.tensor(book.values, dtype=torch.float64)
    finite = torch.isfinite(want)
    sign = 1 - 2 * (codes >> (exponent + mantissa))
    return exponent <= 5 and mantissa <= 10 and torch.equal((sign * size).double()[finite], want[finite])


def minifloat(code: str, book: Codebook) -> str:
    """The float32 value of int32 patterns: e8m0 by its bits in float32, others by theirs in float16; both exact.

    Patterns that are NaN stay NaN where float16's are not (e4m3 has one of either sign).
    """
    assert book.minifloat is not None
    exponent, mantissa = book.minifloat
    if exponent == 8:
        bits = f"tl.where({code} == 0, {1 << 22}, tl.where({code} == 255, {0x7FC00000}, {code} << 23))"
        return f"{bits}.to(tl.float32, bitcast=True)"
    width = exponent + mantissa
    half = f"(({code} & {2**width - 1}) << {10 - mantissa})"
    if len(book.values) == 2 ** (width + 1):
        half = f"(({code} & {2**width}) << {15 - width} | {half})"
    value = f"({half}.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * {2.0 ** (15 - minifloat_bias(book))})"
    for pattern, number in enumerate(book.values):
        if math.isnan(number) and exponent < 5:
            value = f'tl.where({code} == {pattern}, float("nan"), {value})'
    return value


def select(code: str, values: tuple[float, ...]) -> str:
    """A tree of selects on the bits of ``code``: ``values[code]`` in float32 with no memory access."""
    if len(values) == 1:
        return repr(float(values[0])) if math.isfinite(values[0]) else f'float("{values[0]}")'
    half = len(values) // 2
    picked = f"tl.where(({code} & {half}) != 0, {select(code, values[half:])}, {select(code, values[:half])})"
    return f"{picked}.to(tl.float32)" if half == 1 else picked
