"""Tables of values in registers: looked up by byte permutes, or by bit selects where a GPU has none of them (AMD).

A byte table of 2^b entries lies in 2^b/4 registers. ``prmt`` picks four bytes of two registers by the four low nibbles of
a selector (three bits each), so eight entries take one instruction for four codes; each further bit of the code merges
two results by another permute. A value of w bytes is looked up in w byte tables, and permutes put its bytes together.
16-bit elements are the table divided by a power of two (``UNIT``) and rounded to the operand's type: exact for tables of
small integers, else by at most 2^-9 (bfloat16) or 2^-12 (float16) of a value. Matrix units take those. Float32 elements, four
byte tables, are exact: kernels without a matrix product use them where 16 bits are not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from ..formats.algebra import gen_table
from ..formats.spec import FormatSpec
from .triton_words import pair, signed

if TYPE_CHECKING:
    from .triton_print import Printer

TYPES = (("float32", torch.float32), ("float16", torch.float16), ("bfloat16", torch.bfloat16))
Halves = list[tuple[list[str], tuple[int, int, int, int]]]
"""For each four codes: names of their selectors (of the three low bits, then of each further bit), and their k."""


@functools.cache
def unit(spec: FormatSpec) -> float:
    """The power of two that brings the largest finite value of ``gen`` into [1, 2)."""
    table = gen_table(spec)
    largest = float(table[torch.isfinite(table)].abs().max())
    return 2.0 ** math.floor(math.log2(largest)) if largest > 0 else 1.0


def constants(spec: FormatSpec, permutes: bool) -> list[str]:
    """Lines that define ``UNIT``, and registers ``T{byte}_{i}`` of the byte tables or patterns ``V{code}`` for bit selects."""
    lines = [f"UNIT: tl.constexpr = {unit(spec)!r}"]
    for name, dtype in TYPES:
        values = (gen_table(spec) / unit(spec)).to(dtype)
        integer = torch.int32 if dtype == torch.float32 else torch.int16
        bits = 8 * integer.itemsize
        patterns = [v % 2**bits for v in values.view(integer).tolist()]
        lines.append(f"{'if' if dtype == torch.float32 else 'elif'} DEC == tl.{name}:")
        if not permutes:
            lines += [f"    V{c}: tl.constexpr = {signed(p) if bits == 32 else pair(p)}" for c, p in enumerate(patterns)]
            continue
        for byte in range(integer.itemsize):
            table = registers([(p >> (8 * byte)) & 255 for p in patterns])
            lines += [f"    T{byte}_{i}: tl.constexpr = {r}" for i, r in enumerate(table)]
    return lines


HIDE = "{ .reg .b32 a, b; mov.b32 a, %lanemask_eq; mov.b32 b, %lanemask_lt; and.b32 a, a, b; or.b32 $0, $2, a; }"
"""PTX that gives its second operand back in a way that the assembler cannot see: no lane is below itself."""


def held(name: str, literal: str, like: str) -> str:
    """A line that defines ``name``, a register of a byte table, in the shape of ``like``.

    ``prmt`` takes one literal. Its other table operand would be moved into a register again for every use, did the assembler
    know that it is constant; and if it did not seem to depend on ``like``, Triton would compute it before the loop, in another
    layout, and send the weights through shared memory.
    """
    return f'{name} = tl.inline_asm_elementwise("{HIDE}", "=r,r,r", [{like}, {literal}], dtype=tl.int32, is_pure=True, pack=1)'


def registers(entries: Sequence[int]) -> list[int]:
    """int32 literals that hold a byte table, at least two of them."""
    padded = [*entries, *[0] * (8 - len(entries))]
    return [signed(sum(padded[i + j] << (8 * j) for j in range(4))) for i in range(0, len(padded), 4)]


def elements(printer: Printer, tag: str) -> Iterator[str]:
    """Lines that look up ``e{s}{j}{tag}`` in the tables of :func:`constants`."""
    lines, halves = selectors(printer, tag)
    yield from lines if printer.permutes else ()
    for wide in (True, False):
        yield "if DEC == tl.float32:" if wide else "else:"
        if not printer.permutes:
            yield from ("    " + line for line in _selected(printer, wide, tag))
            continue
        for byte in range(4 if wide else 2):
            for i in range(0, max(2**printer.spec.code.bits // 4, 2), 2):
                yield "    " + held(f"H{byte}_{i}", f"T{byte}_{i}", f"i0{tag}")
        for names, ks in halves:
            yield from ("    " + line for line in _permuted(names, ks, 4 if wide else 2, tag, printer.spec.code.bits))


def selectors(printer: Printer, tag: str) -> tuple[list[str], Halves]:
    """Lines that compute selectors, and their names.

    The nibbles of a word of 4-bit codes are selectors of (k, k + 4, k + 1, k + 5) as they stand; other codes are bytes,
    whose low three bits are put into nibbles first.
    """
    bits = printer.spec.code.bits
    lines, halves = [], []
    if bits == 4:
        word = f"q_{printer.spec.code.name}_0{tag}"
        lines = [f"i0{tag} = {word} & {0x77777777}", f"i1{tag} = i0{tag} >> 16",
                 f"m0{tag} = ({word} >> 1) & {0x44444444} | {0x32103210}", f"m1{tag} = m0{tag} >> 16"]  # fmt: skip
        return lines, [([f"i{h}{tag}", f"m{h}{tag}"], (2 * h, 4 + 2 * h, 1 + 2 * h, 5 + 2 * h)) for h in range(2)]
    for s in range(printer.slots):
        word, bit = printer.source(s, tag)
        names = [f"i{s}{tag}"]
        lines += _nibbles(names[0], f"({word} >> {bit}) & {(2 ** min(bits, 3) - 1) * 0x01010101}")
        for b in range(3, bits):
            names.append(f"m{s}_{b}{tag}")
            lines += _nibbles(names[-1], f"(({word} >> {bit + b}) & {0x01010101}) << 2")
            lines.append(f"{names[-1]} = {names[-1]} | {0x3210}")
        halves.append((names, (4 * s, 4 * s + 1, 4 * s + 2, 4 * s + 3)))
    return lines, halves


def _nibbles(name: str, expression: str) -> list[str]:
    """The low nibbles of four bytes as the low half of a word (the high half is junk)."""
    return [f"{name} = {expression}", f"{name} = {name} | ({name} >> 4)", f"{name} = libdevice.byte_perm({name}, {name}, {0x20})"]


def lookup(table: Sequence[str], names: Sequence[str]) -> str:
    """Four bytes of a byte ``table`` (names or literals of its registers) for the codes of selectors ``names``."""
    low, *bits = names
    found = [f"libdevice.byte_perm({a}, {b}, {low})" for a, b in zip(table[::2], table[1::2], strict=True)]
    for bit in bits:
        found = [f"libdevice.byte_perm({a}, {b}, {bit})" for a, b in zip(found[::2], found[1::2], strict=True)]
    return found[0]


def _permuted(names: list[str], ks: tuple[int, int, int, int], width: int, tag: str, bits: int) -> Iterator[str]:
    """The elements of four codes from ``width`` byte tables: bytes, then pairs of values, then float32."""
    count = max(2**bits // 4, 2)
    for byte in range(width):
        table = [f"{'T' if i % 2 else 'H'}{byte}_{i}" for i in range(count)]
        yield f"r{byte} = {lookup(table, names)}"
    for low in range(0, width, 2):
        for at, (first, second) in enumerate(_pairs(ks)):
            places = sum(v << (4 * i) for i, v in enumerate((first, 4 + first, second, 4 + second)))
            yield f"p{low // 2}{at} = libdevice.byte_perm(r{low}, r{low + 1}, {places})"
    for at, (first, second) in enumerate(_pairs(ks)):
        for k, places, half in ((ks[first], 0x5410, f"p0{at}"), (ks[second], 0x7632, f"(p0{at} >> 16)")):
            if width == 4:
                word = f"libdevice.byte_perm(p0{at}, p1{at}, {places})"
            else:
                word = f"{half}.to(tl.int16)"
            yield f"e{k // 4}{k % 4}{tag} = {word}.to(DEC, bitcast=True)"


def _pairs(ks: tuple[int, int, int, int]) -> list[tuple[int, int]]:
    """Positions in ``ks`` of the two pairs of neighbouring weights."""
    at = {k: i for i, k in enumerate(ks)}
    return [(at[k], at[k + 1]) for k in sorted(ks) if k % 2 == 0]


# Bit selects: masks of all ones where a bit of the code is set, for one value, a pair of 16 bits, or four bytes at once.


def mux(name: str, values: Sequence[str], masks: Sequence[str]) -> Iterator[str]:
    """Lines for ``{name} = values[code]``, where ``masks[b]`` has ones in the lanes in which bit b of the code is set."""
    found = list(values)
    for level, mask in enumerate(masks):
        names = [f"{name}_{level}_{i}" for i in range(len(found) // 2)]
        for target, one, other in zip(names, found[::2], found[1::2], strict=True):
            yield f"{target} = ({mask} & ({one} ^ {other})) ^ {one}"
        found = names
    yield f"{name} = {found[0]}"


def masks(name: str, codes: str, bits: int, lane: int) -> tuple[list[str], list[str]]:
    """Lines that turn ``codes`` in lanes of ``lane`` bits into masks of their bits, and the names of the masks."""
    ones = {8: 0x01010101, 16: 0x00010001, 32: 1}[lane]
    full = signed(2**lane - 1)
    return [f"{name}{b} = (({codes} >> {b}) & {ones}) * {full}" for b in range(bits)], [f"{name}{b}" for b in range(bits)]


def _selected(printer: Printer, wide: bool, tag: str) -> Iterator[str]:
    bits = printer.spec.code.bits
    patterns = [f"V{c}" for c in range(2**bits)]
    for s in range(printer.slots):
        word, bit = printer.source(s, tag)
        for j in range(4 if wide else 2):
            lines, names = masks("b", f"({word} >> {8 * j + bit})", bits, 32 if wide else 16)
            yield from lines
            yield from mux("p", patterns, names)
            if wide:
                yield f"e{s}{j}{tag} = p.to(DEC, bitcast=True)"
                continue
            yield f"e{s}{j}{tag} = p.to(tl.int16).to(DEC, bitcast=True)"
            yield f"e{s}{j + 2}{tag} = (p >> 16).to(tl.int16).to(DEC, bitcast=True)"


def bytes4(printer: Printer, integers: Sequence[int], tag: str) -> Iterator[str]:
    """Lines that look up ``u{s}{tag}``: four int8 values of slot s, in the order of their weights."""
    bits, entries = printer.spec.code.bits, [v % 256 for v in integers]
    if not printer.permutes:
        for s in range(printer.slots):
            word, bit = printer.source(s, tag)
            lines, names = masks("b", f"({word} >> {bit})", bits, 8)
            yield from lines
            yield from mux(f"v{s}{tag}", [str(signed(v * 0x01010101)) for v in entries], names)
        return
    lines, halves = selectors(printer, tag)
    yield from lines
    literals = [str(r) for r in registers(entries)]
    for i in range(0, len(literals), 2):
        yield held(f"H{i}", literals[i], f"i0{tag}")
        literals[i] = f"H{i}"
    for h, (names, _) in enumerate(halves):
        yield f"r{h} = {lookup(literals, names)}"
    for s in range(printer.slots):
        yield f"v{s}{tag} = " + (f"libdevice.byte_perm(r0, r1, {(0x6420, 0x7531)[s]})" if bits == 4 else f"r{s}")
