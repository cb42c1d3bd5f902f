"""Prints the parts of Triton kernels that depend on a format; the skeletons in ``triton_text*.py`` are blind to it.

Weights are decoded from the words of :mod:`qcompile.formats.layout`. A *group* is the 4·S weights of the coarsest word
(S slots), so weight k = 4·S·g + 4·s + j is byte j, slot s of group g. A skeleton loads word tensors
``[BT, BG, 16]`` (tiles of 16 rows, groups, lanes) and asks for the element tensors of every (s, j), in ``DEC``:

- integer codes and minifloats: 16-bit *lanes* are cut out of the words with 32-bit shifts, so that two weights share one
  register; the masked bits are taken as a subnormal number, u·2^-24 in float16 (u·2^-133 in bfloat16, linear up to 255
  because the first normal binade has the same spacing), and one fused multiply-add turns that into gen / UNIT, exactly;
- anything else: the expression itself in float32, tables as a tree of selects.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import sympy
import torch

from ..errors import FormatError
from ..formats.algebra import Affine, affine
from ..formats.spec import ROW, Codebook, FormatSpec, Plane

FP16_LIFT, FP16_UNIT = 2.0**15, 2.0**9
BF16_LIFT, BF16_UNIT = 2.0**127, 2.0**6
LARGEST_LANE = 255


@dataclass(frozen=True)
class Linear:
    """``gen = factor * (Σ weight·code + offset)`` with the sum of codes in 0…255 (i8 codes are taken as code + 128)."""

    weights: tuple[tuple[Plane, int], ...]
    offset: float
    factor: float


@functools.cache
def linear_gen(spec: FormatSpec) -> Linear | None:
    """The linear form of ``gen`` when 8-bit lanes can hold its sum of codes and bfloat16 its values exactly."""
    form = affine(spec)
    if form.gen.atoms(sympy.Function):
        return None
    poly = sympy.Poly(form.gen, *(sympy.Symbol(p.name, real=True) for p in spec.codes))
    if poly.total_degree() != 1:
        return None
    factors = [poly.coeff_monomial(g) for g in poly.gens]
    factor = functools.reduce(sympy.gcd, factors)
    weights = tuple((p, int(c / factor)) for p, c in zip(spec.codes, factors, strict=True))
    offset = sympy.Rational(poly.coeff_monomial(1)) / factor - sum(128 * a for p, a in weights if p.dtype == "i8")
    top = sum(a * (2**p.bits - 1) for p, a in weights)
    if any(a < 0 for _, a in weights) or top > LARGEST_LANE:
        return None
    values = torch.arange(top + 1, dtype=torch.float64) + float(offset)
    if not torch.equal(values.to(torch.bfloat16).double(), values):
        return None
    return Linear(weights, float(offset), float(factor))


@functools.cache
def minifloat_gen(spec: FormatSpec) -> Codebook | None:
    """The codebook when ``gen`` is one lookup in a signed minifloat whose table has the OCP values."""
    gen = affine(spec).gen
    book = next((b for b in spec.codebooks if b.minifloat and len(spec.codes) == 1
                 and str(gen) == f"{b.name}({spec.codes[0].name})"), None)  # fmt: skip
    if book is None or book.minifloat is None:
        return None
    exponent, mantissa = book.minifloat
    if 1 + exponent + mantissa != spec.codes[0].bits:
        return None
    codes = torch.arange(len(book.values))
    e, m = (codes >> mantissa) & (2**exponent - 1), codes & (2**mantissa - 1)
    bias = minifloat_bias(book)
    size = torch.where(e > 0, (1 + m / 2**mantissa) * 2.0 ** (e - bias), m / 2**mantissa * 2.0 ** (1 - bias))
    want = torch.tensor(book.values, dtype=torch.float64)
    finite = torch.isfinite(want)
    sign = 1 - 2 * (codes >> (exponent + mantissa))
    return book if torch.equal((sign * size).double()[finite], want[finite]) else None


def minifloat_bias(book: Codebook) -> int:
    assert book.minifloat is not None
    return int(2 ** (book.minifloat[0] - 1) - 1)


@dataclass(frozen=True)
class Printer:
    """Prints one format. ``slots`` is S; ``words`` lists the word tensors of a group as (plane, which word)."""

    spec: FormatSpec

    @functools.cached_property
    def form(self) -> Affine:
        return affine(self.spec)

    @functools.cached_property
    def slots(self) -> int:
        return max(8 // p.bits for p in self.spec.codes)

    @functools.cached_property
    def group(self) -> int:
        """Weights of a group, 4·S."""
        return 4 * self.slots

    @functools.cached_property
    def words(self) -> tuple[tuple[Plane, int], ...]:
        return tuple((p, r) for p in self.spec.codes for r in range(self.words_of(p)))

    def words_of(self, plane: Plane) -> int:
        """Words of ``plane`` in one group."""
        return self.slots * plane.bits // 8

    @functools.cached_property
    def exact16(self) -> bool:
        """Whether 16-bit lanes hold every value of ``gen`` exactly, in float16 and in bfloat16."""
        return linear_gen(self.spec) is not None or minifloat_gen(self.spec) is not None

    @functools.cached_property
    def wide(self) -> str:
        """The type that kernels without a matrix product decode to: the narrowest that is exact."""
        return "float16" if self.exact16 else "float32"

    def check(self) -> None:
        """Raises :class:`FormatError` when scales change inside one group of words or at odd places."""
        period = self.spec.period
        if period != ROW and (period < 16 or period % self.group or period & (period - 1)):
            raise FormatError(f"format {self.spec.name!r}: no Triton kernel for scales that change every {period} weights; its "
                              f"words hold {self.group}, so use a power of two from {max(self.group, 16)} on")  # fmt: skip

    def units(self) -> list[str]:
        """Lines that define constexpr ``LIFT`` and ``UNIT`` (gen = element · UNIT) from constexpr ``DEC``."""
        book, linear = minifloat_gen(self.spec), linear_gen(self.spec)
        if linear is not None:
            half, brain = (FP16_LIFT, FP16_UNIT * linear.factor), (BF16_LIFT, BF16_UNIT * linear.factor)
        elif book is not None:
            half, brain = (1.0, 2.0 ** (15 - minifloat_bias(book))), (2.0 ** (127 - minifloat_bias(book)), 1.0)
        else:
            return ["UNIT: tl.constexpr = 1.0"]
        return ["if DEC == tl.float16:", f"    LIFT: tl.constexpr = {half[0]!r}", f"    UNIT: tl.constexpr = {half[1]!r}",
                "else:", f"    LIFT: tl.constexpr = {brain[0]!r}", f"    UNIT: tl.constexpr = {brain[1]!r}"]  # fmt: skip

    def elements(self, tag: str = "") -> tuple[list[str], list[list[str]]]:
        """Lines that decode words ``q_{plane}_{r}{tag}`` to elements, and the element names by slot and byte."""
        linear, book = linear_gen(self.spec), minifloat_gen(self.spec)
        if linear is not None:
            lines = list(self._linear(linear, tag))
        elif book is not None:
            lines = list(self._minifloat(book, tag))
        else:
            lines = list(self._generic(tag))
        return lines, [[f"e{s}{j}{tag}" for j in range(4)] for s in range(self.slots)]

    def _linear(self, linear: Linear, tag: str) -> Iterator[str]:
        yield from self.biased(tag)
        if len(linear.weights) == 1:
            plane, _ = linear.weights[0]
            for r in range(self.words_of(plane)):
                yield from lanes(f"a{r}{tag}", f"q_{plane.name}_{r}{tag}", 0)
        else:
            for s in range(self.slots):
                yield f"u{s}{tag} = {self.quad(linear, s, tag)}"
                yield from lanes(f"a{s}{tag}", f"u{s}{tag}", 0)
        for s in range(self.slots):
            source, shift, mask = self._where(linear, s)
            for j in range(4):
                bits = f"(a{source}{tag}{j} & {mask << shift}).to(DEC, bitcast=True)"
                yield f"e{s}{j}{tag} = {bits} * (LIFT / {2**shift}) + ({linear.offset * linear.factor!r} / UNIT)"

    def _where(self, linear: Linear, s: int) -> tuple[int, int, int]:
        """(lane set, lowest bit, mask) that hold the summed code of slot ``s``."""
        if len(linear.weights) > 1:
            return s, 0, LARGEST_LANE
        plane = linear.weights[0][0]
        return s * plane.bits // 8, s * plane.bits % 8, 2**plane.bits - 1

    def biased(self, tag: str) -> Iterator[str]:
        """i8 words with 128 added to every byte, so that lanes are unsigned."""
        for plane, r in self.words:
            if plane.dtype == "i8":
                name = f"q_{plane.name}_{r}{tag}"
                yield f"{name} = {name} ^ {signed(0x80808080)}"

    def quad(self, linear: Linear, s: int, tag: str) -> str:
        """The four summed codes of slot ``s`` as the bytes of an int32."""
        terms = []
        for plane, weight in linear.weights:
            at, bits = s * plane.bits, plane.bits
            word = f"q_{plane.name}_{at // 8}{tag}"
            if bits < 8:
                shifted = f"({word} >> {at % 8})" if at % 8 else word
                word = f"({shifted} & {signed((2**bits - 1) * 0x01010101)})"
            terms.append(word if weight == 1 else f"{word} * {weight}")
        return " + ".join(terms)

    def _minifloat(self, book: Codebook, tag: str) -> Iterator[str]:
        """Sign and magnitude put where a 16-bit float has them, two weights at a time: bytes 0 and 2, then 1 and 3."""
        assert book.minifloat is not None
        plane = self.spec.codes[0]
        for name, mantissa in (("tl.float16", 10), ("tl.bfloat16", 7)):
            yield f"{'if' if mantissa == 10 else 'elif'} DEC == {name}:"
            low = mantissa - book.minifloat[1]
            magnitude = pair((2 ** (plane.bits - 1) - 1) << low)
            for s in range(self.slots):
                word, bit = f"q_{plane.name}_{s * plane.bits // 8}{tag}", s * plane.bits % 8
                for odd in range(2):
                    sign = f"({shifted(word, 16 - plane.bits - bit - 8 * odd)} & {pair(0x8000)})"
                    size = f"({shifted(word, low - bit - 8 * odd)} & {magnitude})"
                    yield f"    z{s}{odd}{tag} = {sign} | {size}"
        for s in range(self.slots):
            for j in range(4):
                half = f"z{s}{j % 2}{tag}" if j < 2 else f"(z{s}{j % 2}{tag} >> 16)"
                yield f"e{s}{j}{tag} = {half}.to(tl.int16).to(DEC, bitcast=True) * LIFT"

    def _generic(self, tag: str) -> Iterator[str]:
        for s in range(self.slots):
            for j in range(4):
                names = {}
                for plane in self.spec.codes:
                    at = s * plane.bits
                    code, word = f"c_{plane.name}{s}{j}{tag}", f"q_{plane.name}_{at // 8}{tag}"
                    if plane.dtype == "i8":
                        yield f"{code} = ({word} << {24 - 8 * j}) >> 24"
                    else:
                        yield f"{code} = ({word} >> {8 * j + at % 8}) & {2**plane.bits - 1}"
                    names[plane.name] = code
                yield f"e{s}{j}{tag} = ({self.expression(self.form.gen, names, code=True)}).to(DEC)"

    def expression(self, expr: sympy.Expr, names: dict[str, str], code: bool = False) -> str:
        """``expr`` in float32 over Triton tensors ``names``; codes are int32 tensors and are widened."""
        if expr.is_Number:
            return repr(float(expr))
        if expr.is_Symbol:
            return f"{names[expr.name]}.to(tl.float32)"
        if expr.is_Add or expr.is_Mul:
            sign = " + " if expr.is_Add else " * "
            return "(" + sign.join(self.expression(a, names, code) for a in expr.args) + ")"
        if expr.is_Pow and expr.exp.is_Integer and expr.exp > 0:
            return "(" + " * ".join([self.expression(expr.base, names, code)] * int(expr.exp)) + ")"
        book = next((b for b in self.spec.codebooks if b.name == expr.func.__name__), None)
        if book is None or not expr.args[0].is_Symbol or len(book.values) > 16:
            raise FormatError(f"format {self.spec.name!r}: no Triton kernel for {expr}; it can have sums, products, powers and "
                              "codebooks of at most 16 values, or of a minifloat (sign, exponent, mantissa)")  # fmt: skip
        return select(names[expr.args[0].name], book.values)

    def scaled(self, expr: sympy.Expr, names: dict[str, str]) -> str:
        """A hoisted factor (``coeff`` or ``offset``) over scale planes, in float32."""
        return self.expression(expr, names)

    def span(self, expr: sympy.Expr) -> list[Plane]:
        """Scale planes that ``expr`` reads, in spec order."""
        used = {s.name for s in expr.free_symbols}
        return [p for p in self.spec.scales if p.name in used]


def lanes(name: str, word: str, at: int) -> Iterator[str]:
    """Lines that cut ``word`` into int16 tensors ``{name}0…3``, byte j with its lowest bit at bit ``at``; other bits are junk.

    Bytes 0, 1 come from the low half of two shifted words and 2, 3 from their high half: two registers become two pairs.
    """
    for j, shift in ((0, at), (1, at - 8)):
        yield f"{name}w{j} = {shifted(word, shift)}"
    for j in range(4):
        half = f"{name}w{j % 2}" if j < 2 else f"({name}w{j % 2} >> 16)"
        yield f"{name}{j} = {half}.to(tl.int16)"


def select(code: str, values: tuple[float, ...], base: int = 0) -> str:
    """A tree of selects on the bits of ``code``: ``values[code]`` in float32 with no memory access."""
    if len(values) == 1:
        return repr(float(values[0]) if math.isfinite(values[0]) else 0.0)  # a code that stands for no value
    half = len(values) // 2
    low, high = select(code, values[:half], base), select(code, values[half:], base)
    picked = f"tl.where(({code} & {half}) != 0, {high}, {low})"
    return f"{picked}.to(tl.float32)" if half == 1 else picked


def shifted(word: str, left: int) -> str:
    return f"({word} << {left})" if left > 0 else f"({word} >> {-left})" if left else word


def pair(half: int) -> int:
    """A 16-bit pattern in both halves of an int32 literal."""
    return signed(half * 0x00010001)


def signed(word: int) -> int:
    """A 32-bit pattern as the int32 that Triton's literals need."""
    return word - 2**32 if word >= 2**31 else word


def joined(names: list[str]) -> str:
    """``tl.join`` of 2^m tensors: m dims are added at the end, the lowest index bit first."""
    if len(names) == 1:
        return names[0]
    half = len(names) // 2
    return f"tl.join({joined(names[:half])}, {joined(names[half:])})"
