"""Prints how codes become numbers in Triton kernels; the skeletons of the other files are blind to formats.

Weights are decoded from the words of :mod:`qcompile.formats.layout`. A *group* is the 4·S weights of the coarsest word
(S slots), so weight k = 4·S·g + 4·s + j is byte j, slot s of group g. A skeleton loads word tensors
``[BT, BG, 16]`` (tiles of 16 rows, groups, lanes) and asks for the element tensors of every (s, j), in ``DEC``:

- integer codes and minifloats: 16-bit *lanes* are cut out of the words with 32-bit shifts, so that two weights share one
  register; the masked bits are taken as a subnormal number, u·2^-24 in float16 (u·2^-133 in bfloat16, linear up to 255
  because the first normal binade has the same spacing), and one fused multiply-add turns that into gen / UNIT, exactly;
- any other function of the code is a table, looked up by byte permutes (:mod:`.triton_table`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..errors import FormatError
from ..formats.algebra import Affine, affine, codebook_of_gen, gen_table, linear_gen
from ..formats.spec import ROW, Codebook, FormatSpec, Part
from . import triton_table as table
from .triton_scale import is_minifloat, minifloat_bias
from .triton_words import pair, shifted, signed

FP16_LIFT, FP16_UNIT = 2.0**15, 2.0**9
BF16_LIFT, BF16_UNIT = 2.0**127, 2.0**6
LONGEST_GRANULE = 256


@dataclass(frozen=True)
class Linear:
    """``gen = step · (u + offset)`` for the code u in 0…255 (i8 codes are taken as code + 128)."""

    step: float
    offset: float


@functools.cache
def lane_gen(spec: FormatSpec) -> Linear | None:
    """The linear form of ``gen`` when bfloat16 (and so float16) holds every u + offset exactly."""
    if (found := linear_gen(spec)) is None:
        return None
    step, base = found
    offset = base / step - (128 if spec.code.dtype == "i8" else 0)
    values = torch.arange(2**spec.code.bits, dtype=torch.float64) + offset
    return Linear(step, offset) if torch.equal(values.to(torch.bfloat16).double(), values) else None


@functools.cache
def minifloat_gen(spec: FormatSpec) -> Codebook | None:
    """The codebook when ``gen`` is one lookup in a signed minifloat that fits a half of float16 and of bfloat16."""
    book = codebook_of_gen(spec)
    if book is None or book.minifloat is None or not is_minifloat(book):
        return None
    exponent, mantissa = book.minifloat
    return book if exponent <= 5 and mantissa <= 7 and 1 + exponent + mantissa == spec.code.bits else None


@dataclass(frozen=True)
class Printer:
    """Prints one format, for GPUs with byte permutes or without (``permutes``).

    ``slots`` is S; ``words`` lists the word tensors of a group as (part, which word).
    """

    spec: FormatSpec
    permutes: bool = True

    @functools.cached_property
    def form(self) -> Affine:
        return affine(self.spec)

    @functools.cached_property
    def slots(self) -> int:
        return max(8 // p.bits for p in self.spec.code.parts)

    @functools.cached_property
    def group(self) -> int:
        """Weights of a group, 4·S."""
        return 4 * self.slots

    @functools.cached_property
    def words(self) -> tuple[tuple[Part, int], ...]:
        return tuple((p, r) for p in self.spec.code.parts for r in range(self.words_of(p)))

    def words_of(self, part: Part) -> int:
        """Words of ``part`` in one group."""
        return self.slots * part.bits // 8

    @functools.cached_property
    def granule(self) -> int:
        """Weights that surely share scales, counted from the start of a row: the largest power of two (up to 256) that
        divides the period; :data:`ROW` if scales are constant over rows."""
        period = self.spec.period
        return ROW if period == ROW else min(period & -period, LONGEST_GRANULE)

    @functools.cached_property
    def cut(self) -> int:
        """Weights of one scale inside a group whose scales differ; :data:`ROW` where whole groups have one."""
        return self.granule if self.granule < self.group else ROW

    @functools.cached_property
    def fused(self) -> bool:
        """Whether products of 16 weights have one scale, as 16-bit matrix units need it."""
        return self.granule == ROW or self.granule >= 16

    @functools.cached_property
    def direct(self) -> bool:
        """Whether decoded weights reach matrix units in registers: the four threads that share a row of the left operand then
        own four groups. Else they pass through shared memory, at about 3 instructions more for each."""
        return self.granule == ROW or min(self.granule, 128) >= 4 * self.group

    @functools.cached_property
    def fused8(self) -> bool:
        """The same for 8-bit units, which sum 32 products."""
        return self.fused and (self.granule == ROW or self.granule >= 32)

    @functools.cached_property
    def exact16(self) -> bool:
        """Whether float16 and bfloat16 hold every value of ``gen`` exactly, up to one power of two."""
        if lane_gen(self.spec) is not None or minifloat_gen(self.spec) is not None:
            return True
        scaled = gen_table(self.spec) / table.unit(self.spec)
        return all(torch.equal(scaled.to(t).double().nan_to_num(), scaled.nan_to_num()) for t in (torch.float16, torch.bfloat16))

    @functools.cached_property
    def wide(self) -> str:
        """The type that kernels without a matrix product decode to: the narrowest that is exact."""
        return "float16" if self.exact16 else "float32"

    @functools.cached_property
    def imports(self) -> bool:
        """Whether the module of this format needs the library of byte permutes."""
        return self.permutes and (linear_gen(self.spec) is None or lane_gen(self.spec) is None)

    def check(self) -> None:
        """Raises :class:`FormatError` when four neighbours may have different scales: they are decoded together."""
        if self.granule != ROW and self.granule < 4:
            raise FormatError(f"format {self.spec.name!r}: scales change every {self.spec.period} weights, but Triton kernels "
                              "decode four neighbours together; use a multiple of 4")  # fmt: skip

    def units(self) -> list[str]:
        """Lines that define constexpr ``UNIT`` (gen = element · UNIT), and ``LIFT`` or the table, from constexpr ``DEC``."""
        book, linear = minifloat_gen(self.spec), lane_gen(self.spec)
        if linear is not None:
            half, brain = (FP16_LIFT, FP16_UNIT * linear.step), (BF16_LIFT, BF16_UNIT * linear.step)
        elif book is not None:
            half, brain = (1.0, 2.0 ** (15 - minifloat_bias(book))), (2.0 ** (127 - minifloat_bias(book)), 1.0)
        else:
            return table.constants(self.spec, self.permutes)
        return ["if DEC == tl.float16:", f"    LIFT: tl.constexpr = {half[0]!r}", f"    UNIT: tl.constexpr = {half[1]!r}",
                "else:", f"    LIFT: tl.constexpr = {brain[0]!r}", f"    UNIT: tl.constexpr = {brain[1]!r}"]  # fmt: skip

    def elements(self, tag: str = "") -> tuple[list[str], list[list[str]]]:
        """Lines that decode words ``q_{part}_{r}{tag}`` to elements, and the element names by slot and byte."""
        linear, book = lane_gen(self.spec), minifloat_gen(self.spec)
        lines = list(self.sources(tag))
        if linear is not None:
            lines += [*self.biased(tag), *self._linear(linear, tag)]
        elif book is not None:
            lines += self._minifloat(book, tag)
        else:
            lines += table.elements(self, tag)
        return lines, [[f"e{s}{j}{tag}" for j in range(4)] for s in range(self.slots)]

    def biased(self, tag: str) -> Iterator[str]:
        """i8 words with 128 added to every byte, so that lanes are unsigned."""
        if self.spec.code.dtype == "i8":
            name = f"q_{self.spec.code.name}_0{tag}"
            yield f"{name} = {name} ^ {signed(0x80808080)}"

    def sources(self, tag: str) -> Iterator[str]:
        """``u{s}{tag}``: the codes of slot s as four bytes, when they are stored in several parts."""
        if len(self.spec.code.parts) > 1:
            for s in range(self.slots):
                yield f"u{s}{tag} = {self.quad(s, tag)}"

    def source(self, s: int, tag: str) -> tuple[str, int]:
        """(word, lowest bit) that hold the four codes of slot ``s``, one in every byte; other bits may be anything."""
        parts = self.spec.code.parts
        if len(parts) > 1:
            return f"u{s}{tag}", 0
        at = s * parts[0].bits
        return f"q_{parts[0].name}_{at // 8}{tag}", at % 8

    def quad(self, s: int, tag: str) -> str:
        """The four codes of slot ``s`` as the bytes of an int32, other bits zero."""
        terms = []
        for part in self.spec.code.parts:
            at, bits = s * part.bits, part.bits
            word = shifted(f"q_{part.name}_{at // 8}{tag}", part.shift - at % 8)
            terms.append(word if bits == 8 else f"({word} & {signed((2**bits - 1) * 0x01010101 << part.shift)})")
        return " | ".join(terms)

    def _linear(self, linear: Linear, tag: str) -> Iterator[str]:
        mask, cut = 2**self.spec.code.bits - 1, set()
        for s in range(self.slots):
            word, bit = self.source(s, tag)
            if word not in cut:
                yield from lanes(f"a_{word}", word)
                cut.add(word)
            for j in range(4):
                bits = f"(a_{word}_{j} & {mask << bit}).to(DEC, bitcast=True)"
                yield f"e{s}{j}{tag} = {bits} * (LIFT / {2**bit}) + ({linear.offset * linear.step!r} / UNIT)"

    def _minifloat(self, book: Codebook, tag: str) -> Iterator[str]:
        """Sign and magnitude put where a 16-bit float has them, two weights at a time: bytes 0 and 2, then 1 and 3."""
        assert book.minifloat is not None
        bits = self.spec.code.bits
        for name, mantissa in (("tl.float16", 10), ("tl.bfloat16", 7)):
            yield f"{'if' if mantissa == 10 else 'elif'} DEC == {name}:"
            low = mantissa - book.minifloat[1]
            magnitude = pair((2 ** (bits - 1) - 1) << low)
            for s in range(self.slots):
                word, bit = self.source(s, tag)
                for odd in range(2):
                    sign = f"({shifted(word, 16 - bits - bit - 8 * odd)} & {pair(0x8000)})"
                    size = f"({shifted(word, low - bit - 8 * odd)} & {magnitude})"
                    yield f"    z{s}{odd}{tag} = {sign} | {size}"
        for s in range(self.slots):
            for j in range(4):
                half = f"z{s}{j % 2}{tag}" if j < 2 else f"(z{s}{j % 2}{tag} >> 16)"
                yield f"e{s}{j}{tag} = {half}.to(tl.int16).to(DEC, bitcast=True) * LIFT"


def lanes(name: str, word: str) -> Iterator[str]:
    """Lines that cut ``word`` into int16 tensors ``{name}_0`` … ``_3``, byte j in the low bits; the high byte is junk.

    Bytes 0, 1 come from the low half of two shifted words and 2, 3 from their high half: two registers become two pairs.
    """
    yield f"{name}w = {shifted(word, -8)}"
    for j in range(4):
        source = word if j % 2 == 0 else f"{name}w"
        yield f"{name}_{j} = {source if j < 2 else f'({source} >> 16)'}.to(tl.int16)"
