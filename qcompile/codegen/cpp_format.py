"""A format as C++: the ``struct Format`` that the skeletons in ``include/`` are templates over."""

from __future__ import annotations

import math

import sympy

from ..errors import FormatError
from ..formats.algebra import affine, codebook_of_gen, gen_table, integer_gen, linear_gen
from ..formats.scheme import Scheme
from ..formats.spec import FormatSpec
from .cpp_expr import float_literal
from .cpp_facts import exact_in_bf16, half_factor, with_folded_factor
from .cpp_scale import element_type, factor, minifloat, scale_loads, tile_start
from .cpp_table import Tables

LONGEST_SPAN = 512
"""Weights after which partial sums are scaled even if the format's scales last longer (bounds the panel's depth)."""


def format_struct(scheme: Scheme) -> str:
    """C++ text of ``struct Format`` with its tables. Raises :class:`FormatError` for what cannot be printed."""
    return _Struct(scheme).text()


class _Struct:
    def __init__(self, scheme: Scheme) -> None:
        self.scheme, self.spec, self.tables = scheme, scheme.format, Tables()
        spec: FormatSpec = self.spec
        self.form, self.gen = with_folded_factor(spec)
        self.linear, self.book = linear_gen(spec), codebook_of_gen(spec)
        self.half = half_factor(self.book) if self.book is not None else None
        self.span = spec.period if spec.period <= LONGEST_SPAN else math.gcd(spec.period, LONGEST_SPAN)
        if self.span % 4:
            raise FormatError(
                f"format {spec.name!r}: scales last for {spec.period} weights; C++ kernels need a multiple of 4"
            )
        self.block = math.gcd(16, self.span)

    def text(self) -> str:
        body = [
            *self._constants(), *self._planes(), *self._words(), *self._code(), *scale_loads(self.spec),
            *self._factors(), *self._gen(), *self._pair(), *self._quad(),
        ]  # fmt: skip
        struct = "\n".join(line if line.startswith("#") else f"  {line}" for line in body)
        tables = "\n".join(self.tables.lines)
        return f"namespace {{\n\n{tables}\n\nstruct Format {{\n{struct}\n}};\n\n}}  // namespace\n"

    # Constants and memory ------------------------------------------------------------------------------------------

    def _constants(self) -> list[str]:
        activations = {None: "AS_GIVEN", "int8": "INT8", "fp8": "FP8"}[self.scheme.activations]
        return [
            f"// {self.spec.name}: value = {self.spec.value}",
            f"// = coeff * gen + offset; coeff = {self.form.coeff}; gen = {self.form.gen}; offset = {self.form.offset}",
            f"static constexpr int64_t SPAN = {self.span};  // weights of a row that share coeff and offset; 0: all",
            f"static constexpr int BLOCK = {self.block};  // weights decoded together",
            f"static constexpr bool OFFSET = {_cpp(self.form.offset != 0)};",
            f"static constexpr int32_t GEN_MIN = {self._bytes()[0]};  // gen of byte 0 in quad()",
            f"static constexpr bool BF16_EXACT = {_cpp(exact_in_bf16(self.gen))};",
            f"static constexpr int ACTIVATIONS = {activations};",
            f"static constexpr int TURNS = {self._turns()};  // that rows of x take at most at a tile, which each decodes anew",
        ]

    def _turns(self) -> int:
        """How often a tile may be decoded before a panel is faster, which is decoded once, but written and read again (measured
        on Zen 5, turns of 16 rows, 17 to 128 rows). What counts is how seldom scales change, and how little decoding is."""
        code = self.spec.code
        seldom, often = self.span == 0 or self.span >= 64, 0 < self.span < 32
        bytewise = self.linear is not None and code.bits == 8 and not often
        if self.scheme.activations == "int8":
            return 4 if seldom or bytewise else 1 if often else 2
        looked_up = len(code.parts) == 1 and code.bits <= 4
        return 4 if bytewise or (seldom and looked_up) else 2 if seldom else 1

    def _planes(self) -> list[str]:
        members = " ".join(f"const {element_type(p)}* {p.name};" for p in self.spec.parts)
        given = ", ".join(f"(const {element_type(p)}*)planes[{i}]" for i, p in enumerate(self.spec.parts))
        starts = ", ".join(f"a.{p.name} + {tile_start(p)}" for p in self.spec.parts)
        return [
            f"struct Planes {{ {members} }};",
            f"QC_INLINE Planes of(const void* const* planes) {{ return {{{given}}}; }}",
            f"QC_INLINE Planes tile(const Planes& a, int64_t t, int64_t k) {{ return {{{starts}}}; }}",
        ]

    def _words(self) -> list[str]:
        """Loads of one block; a word that holds more codes than a block is shifted so that the block comes first."""
        members, loads, ahead = [], [], []
        for p in self.spec.code.parts:
            per_word = p.entries
            address = f"a.{p.name} + k / {per_word} * 16"
            count = max(1, self.block // per_word)
            members.append(f"vi {p.name}[{count}];")
            words = [f"load({address}" + (f" + {16 * i})" if i else ")") for i in range(count)]
            if per_word > self.block:
                words = [f"shift_right({words[0]}, {p.bits} * (int)(k % {per_word} / 4))"]
            loads.append(f"{{{', '.join(words)}}}")
            for i in range(count):
                ahead.append(f"__builtin_prefetch((const char*)({address}) + BYTES + {64 * i});")
        return [
            f"struct Words {{ {' '.join(members)} }};",
            f"QC_INLINE Words words(const Planes& a, int64_t k) {{ return {{{', '.join(loads)}}}; }}",
            "template <int BYTES>",
            f"QC_INLINE void prefetch(const Planes& a, int64_t k) {{ {' '.join(ahead)} }}",
        ]

    # Codes -----------------------------------------------------------------------------------------------------------

    def _code(self) -> list[str]:
        """Of weight i: ``code`` as an int32 lane, ``index`` the same with junk above its bits. Of weights i … i + 3 as bytes:
        ``bytes``, and ``four`` with junk above their bits."""
        plane = self.spec.code
        single = len(plane.parts) == 1
        lanes, junk, fours, masked = [], [], [], []
        for p in plane.parts:
            word, mask, up = f"w.{p.name}[i / {p.entries}]", 2**p.bits - 1, f" << {p.shift}" if p.shift else ""
            junk.append(f"shift_right({word}, 8 * (i % 4) + {p.bits} * (i % {p.entries} / 4))")
            lanes.append(f"(({junk[-1]} & {mask}){up})")
            fours.append(word if p.bits == 8 else f"shift_right({word}, {p.bits} * (i % {p.entries} / 4))")
            masked.append(f"(({fours[-1]} & (int32_t){int.from_bytes(bytes([mask] * 4), 'little', signed=True)}){up})")
        code, whole = " | ".join(lanes), " | ".join(masked)
        if plane.dtype == "i8":
            code = f"(w.{plane.name}[i / 4] << (24 - 8 * (i % 4))) >> 24"
        found = {"code": code, "index": junk[0] if single else code, "bytes": whole, "four": fours[0] if single else whole}
        return [f"QC_INLINE vi {name}(const Words& w, int i) {{ return {text}; }}" for name, text in found.items()]

    # Scales ----------------------------------------------------------------------------------------------------------

    def _factors(self) -> list[str]:
        """coeff and offset as the products want them, and ``exact_coeff``, which goes with ``exact_gen``."""
        integers = integer_gen(self.spec) if self.scheme.activations == "int8" else None
        unit = integers[0] if integers is not None else 1.0
        coeff = self.form.coeff * sympy.Rational(unit)
        found = {"coeff": coeff, "offset": self.form.offset, "exact_coeff": affine(self.spec).coeff}
        return [f"QC_INLINE vf {name}(const Planes& a, int64_t k) {{ return {factor(self.spec, expr, self.tables)}; }}"
                for name, expr in found.items()]  # fmt: skip

    # Generators ------------------------------------------------------------------------------------------------------

    def _gen(self) -> list[str]:
        """gen of weight i: a register table, integer arithmetic, the half of a minifloat, or a table in memory."""
        values = self.gen.tolist()
        signature = "QC_INLINE vf {}(const Words& w, int i) {{ return {}; }}"
        exact = None
        if self.linear is not None:
            step, base = self.linear
            text = f"to_float(code(w, i){_plus(int(base))})" if step == 1 and base == int(base) else (
                f"(to_float(code(w, i)) * {float_literal(step)} + {float_literal(base)})")  # fmt: skip
        elif self.half is not None and self.book is not None and self.book.minifloat is not None:
            mantissa = self.book.minifloat[1]
            mask = 0x8000 | 0x7F << (10 - mantissa)
            text = f"half_lanes(((w.{self.spec.code.name}[i / 4] << (24 - 8 * (i % 4))) >> {14 + mantissa}) & {mask})"
            exact = minifloat(self.book, "gen(w, i)", self.half, lambda c: f"equals(code(w, i), {c})")
        else:
            text = f"gather({self.tables.floats('GEN', values)}, code(w, i))"
        lines = [signature.format("gen", text)]
        if self.spec.code.bits <= 4:
            table = self.tables.floats("GEN", values, 16)
            found = signature.format("gen", f"lookup({table}, index(w, i))")
            if self.linear is None and self.half is None:
                true = self.tables.floats("EXACT_GEN", gen_table(self.spec).tolist(), 16)
                exact = f"lookup({true}, index(w, i))"
            lines = ["#if QC_REGISTER_TABLES", found, "#else", *lines, "#endif"] if self.linear is not None else [found]
        return [*lines, signature.format("exact_gen", exact or "gen(w, i)")]

    def _pair(self) -> list[str]:
        """bf16 of weights i and i + 1 in one lane."""
        bits, values = self.spec.code.bits, self.gen.tolist()
        if bits <= 5:
            body = f"lookup_pair({self.tables.bf16('GEN', values, 32)}, four(w, i - i % 4), i % 4)"
        elif bits == 6:
            body = f"lookup_pair_64({self.tables.bf16('GEN', values, 64)}, four(w, i - i % 4), i % 4)"
        else:
            body = f"pair_{'exact' if exact_in_bf16(self.gen) else 'rounded'}(gen(w, i), gen(w, i + 1))"
        return ["#if QC_BF16", f"QC_INLINE vi pair(const Words& w, int i) {{ return {body}; }}", "#endif"]

    def _quad(self) -> list[str]:
        if self.scheme.activations != "int8":
            return []
        return [f"QC_INLINE vi quad(const Words& w, int i) {{ return {self._bytes()[1]}; }}"]

    def _bytes(self) -> tuple[int, str]:
        """(least gen in units, C++ of gen − least for weights i … i + 3 as unsigned bytes) under int8 activations."""
        integers = integer_gen(self.spec)
        if self.scheme.activations != "int8" or integers is None:
            return 0, ""
        values = integers[1]
        least = min(values)
        if self.linear is not None and self.spec.code.dtype == "i8":
            return least, "four(w, i) ^ (int32_t)0x80808080"
        if self.linear is not None:
            step = values[1] - values[0]
            return least, "bytes(w, i)" if step == 1 else f"bytes(w, i) * {step}"
        table = self.tables.bytes("GEN", [v - least for v in values], 16)
        return least, f"{'lookup_bytes' if self.spec.code.bits <= 4 else 'gather_bytes'}({table}, bytes(w, i))"


def _plus(number: int) -> str:
    return "" if number == 0 else f" + {number}" if number > 0 else f" - {-number}"


def _cpp(flag: bool) -> str:
    return "true" if flag else "false"


