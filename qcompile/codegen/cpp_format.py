"""A format as C++: the ``struct Format`` that the skeletons in ``include/`` are templates over."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import sympy
import torch

from ..errors import FormatError
from ..formats.algebra import Affine
from ..formats.scheme import Scheme
from ..formats.spec import ROW, Codebook, FormatSpec, Plane
from .cpp_expr import LanePrinter, float_literal
from .cpp_facts import exact_in_bf16, gen_values, half_factor, with_folded_factor

LONGEST_SPAN = 512
"""Weights after which partial sums are scaled even if the format's scales last longer (bounds the panel's depth)."""

SCALE_TYPES = {"f32": "float", "f16": "Half", "bf16": "Bfloat"}


def format_struct(scheme: Scheme) -> str:
    """C++ text of ``struct Format`` with its tables. Raises :class:`FormatError` for what cannot be printed."""
    return _Struct(scheme).text()


@dataclass
class _Struct:
    scheme: Scheme
    tables: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.spec: FormatSpec = self.scheme.format
        self.form: Affine = with_folded_factor(self.spec)
        # Scales of periods that do not nest change at the multiples of either, so the span is their common divisor.
        period = math.gcd(*(p.per for p in self.spec.scales if p.per != ROW))
        self.span = period if period <= LONGEST_SPAN else math.gcd(period, LONGEST_SPAN)
        if self.span % 4:
            raise FormatError(
                f"format {self.spec.name!r}: scales last for {period} weights; C++ kernels need a multiple of 4"
            )
        self.block = math.gcd(16, self.span)
        self.gen = gen_values(self.spec, self.form)

    def text(self) -> str:
        exact = self.gen is not None and exact_in_bf16(self.gen)
        body = [
            *self._constants(exact), *self._planes(), *self._words(), *self._codes(),
            *self._scales(), *self._gen(), *self._pair(exact), *self._quad(), self._value(),
        ]  # fmt: skip
        struct = "\n".join(line if line.startswith("#") else f"  {line}" for line in body)
        tables = "\n".join(self.tables)
        return f"namespace {{\n\n{tables}\n\nstruct Format {{\n{struct}\n}};\n\n}}  // namespace\n"

    # Constants and memory ------------------------------------------------------------------------------------------

    def _constants(self, exact: bool) -> list[str]:
        activations = {None: "AS_GIVEN", "int8": "INT8", "fp8": "FP8"}[self.scheme.activations]
        gen_min = self._quad_form()[0] if self.scheme.activations == "int8" else 0
        return [
            f"// {self.spec.name}: value = {self.spec.value}",
            f"// = coeff * gen + offset; coeff = {self.form.coeff}; gen = {self.form.gen}; offset = {self.form.offset}",
            f"static constexpr int64_t SPAN = {self.span};  // weights of a row that share coeff and offset; 0: all",
            f"static constexpr int BLOCK = {self.block};  // weights decoded together",
            f"static constexpr bool OFFSET = {_cpp(self.form.offset != 0)};",
            f"static constexpr int32_t GEN_MIN = {gen_min};  // gen of byte 0 in quad()",
            f"static constexpr bool BF16_EXACT = {_cpp(exact)};",
            f"static constexpr int ACTIVATIONS = {activations};",
        ]

    def _planes(self) -> list[str]:
        members = " ".join(f"const {SCALE_TYPES.get(p.dtype, 'int32_t')}* {p.name};" for p in self.spec.planes)
        starts = ", ".join(f"a.{p.name} + {_tile_start(p)}" for p in self.spec.planes)
        return [
            f"struct Planes {{ {members} }};",
            f"QC_INLINE Planes tile(const Planes& a, int64_t t, int64_t k) {{ return {{{starts}}}; }}",
        ]

    def _words(self) -> list[str]:
        """Loads of one block; a word that holds more codes than a block is shifted so that the block comes first."""
        members, loads, ahead = [], [], []
        for p in self.spec.codes:
            per_word = 32 // p.bits
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

    def _codes(self) -> list[str]:
        """For each plane: the code of weight i as an int32 lane, the lane before masking, and four codes as bytes."""
        lines = []
        for p in self.spec.codes:
            per_word, mask = 32 // p.bits, 2**p.bits - 1
            word, bit = f"w.{p.name}[i / {per_word}]", f"8 * (i % 4) + {p.bits} * (i % {per_word} / 4)"
            signed = f"({word} << (24 - 8 * (i % 4))) >> 24"
            code = signed if p.dtype == "i8" else f"shift_right({word}, {bit}) & {mask}"
            bytes_mask = int.from_bytes(bytes([mask] * 4), "little", signed=True)
            four = word if p.bits == 8 else f"shift_right({word}, {p.bits} * (i % {per_word} / 4))"
            lines += [
                f"QC_INLINE vi {p.name}_code(const Words& w, int i) {{ return {code}; }}",
                f"QC_INLINE vi {p.name}_lane(const Words& w, int i) {{ return shift_right({word}, {bit}); }}",
                f"QC_INLINE vi {p.name}_four(const Words& w, int i) {{ return {four}; }}",
                f"QC_INLINE vi {p.name}_bytes(const Words& w, int i) {{ return {p.name}_four(w, i) & (int32_t){bytes_mask}; }}",
            ]
        return lines

    def _scales(self) -> list[str]:
        printer = LanePrinter({p.name: _load_scale(p) for p in self.spec.scales})
        lines = []
        for name, expr in (("coeff", self.form.coeff), ("offset", self.form.offset)):
            lines.append(f"QC_INLINE vf {name}(const Planes& a, int64_t k) {{ return {printer.lanes(expr)}; }}")
        return lines

    # Generators ----------------------------------------------------------------------------------------------------

    @property
    def _small(self) -> Plane | None:
        """The only code plane, if a register table can hold all of its values."""
        codes = self.spec.codes
        return codes[0] if len(codes) == 1 and codes[0].bits <= 4 else None

    def _gen(self) -> list[str]:
        """gen of weight i: a register table, integer arithmetic, or the expression in floats."""
        signature = "QC_INLINE vf gen(const Words& w, int i)"
        if self.form.integer:
            names = {p.name: f"{p.name}_code(w, i)" for p in self.spec.codes}
            computed = f"to_float({LanePrinter(names, integer=True).lanes(self.form.gen)})"
        else:
            computed = self._float_printer({}, raw=True).lanes(self.form.gen)
        if (plane := self._small) is None:
            return [f"{signature} {{ return {computed}; }}"]
        table = self._table("GEN", _cycle(self._gen_list(), 16))
        found = f"{signature} {{ return lookup({table}, {plane.name}_lane(w, i)); }}"
        return ["#if QC_REGISTER_TABLES", found, "#else", f"{signature} {{ return {computed}; }}", "#endif"]

    def _pair(self, exact: bool) -> list[str]:
        """bf16 of weights i and i + 1 in one lane."""
        signature = "QC_INLINE vi pair(const Words& w, int i)"
        if (plane := self._small) is not None:
            values = torch.tensor(_cycle(self._gen_list(), 32)).to(torch.bfloat16).view(torch.int16)
            table = ", ".join(f"0x{v & 0xFFFF:04x}" for v in values.tolist())
            self.tables.append(f"alignas(64) constexpr uint16_t PAIRS[32] = {{{table}}};  // bf16 bits of gen")
            body = f"lookup_pair(PAIRS, {plane.name}_four(w, i), i % 4)"
        else:
            body = f"pair_{'exact' if exact else 'rounded'}(gen(w, i), gen(w, i + 1))"
        return ["#if QC_BF16", f"{signature} {{ return {body}; }}", "#endif"]

    def _quad(self) -> list[str]:
        if self.scheme.activations != "int8":
            return []
        return [f"QC_INLINE vi quad(const Words& w, int i) {{ return {self._quad_form()[1]}; }}"]

    def _quad_form(self) -> tuple[int, str]:
        """(least gen, C++ of gen − least for weights i … i + 3 as unsigned bytes)."""
        if self.gen is None:
            raise FormatError(f"format {self.spec.name!r}: too many code bits for activations='int8'")
        least, most = int(self.gen.min()), int(self.gen.max())
        shifted = sympy.expand(self.form.gen - least)
        terms = sympy.Poly(shifted, *(sympy.Symbol(p.name, real=True) for p in self.spec.codes))
        plane = self.spec.codes[0]
        if len(self.spec.codes) == 1 and plane.dtype == "i8" and sympy.expand(shifted - 128).is_Symbol:
            return least, f"{plane.name}_four(w, i) ^ (int32_t)0x80808080"
        linear = (
            terms.total_degree() == 1 and all(c > 0 for c in terms.coeffs()) and terms.eval((0,) * len(terms.gens)) == 0
        )
        if linear and most - least <= 255 and all(p.dtype != "i8" for p in self.spec.codes):
            names = {p.name: f"{p.name}_bytes(w, i)" for p in self.spec.codes}
            return least, LanePrinter(names, integer=True).lanes(shifted)
        if self._small is not None and most - least <= 255:
            values = ", ".join(str(int(v) - least) for v in _cycle(self._gen_list(), 16))
            text = f"alignas(16) constexpr uint8_t BYTES[16] = {{{values}}};  // gen - GEN_MIN"
            if text not in self.tables:
                self.tables.append(text)
            return least, f"lookup_bytes(BYTES, {plane.name}_bytes(w, i))"
        raise FormatError(
            f"format {self.spec.name!r}: gen = {self.form.gen} does not fit unsigned bytes; use activations=None"
        )

    def _value(self) -> str:
        """The format's own expression, in the reference's order of operations; weight i of the block at k."""
        names = {p.name: _load_scale(p, "(k + i)") for p in self.spec.scales}
        expr = self._float_printer(names, raw=False).lanes(self.spec.value)
        return f"QC_INLINE vf value(const Planes& a, const Words& w, int64_t k, int i) {{ return {expr}; }}"

    def _float_printer(self, names: dict[str, str], raw: bool) -> LanePrinter:
        planes = {p.name: p for p in self.spec.codes}
        codes = {name: f"to_float({name}_code(w, i))" for name in planes}
        calls = {b.name: lambda name, book=b: self._call(book, planes[name], raw) for b in self.spec.codebooks}
        return LanePrinter({**names, **codes}, calls)

    def _call(self, book: Codebook, plane: Plane, raw: bool) -> str:
        """``book(plane)``: a register table, the bits of a half, or memory. ``raw`` leaves out a minifloat's factor."""
        if plane.bits <= 4:
            table = self._table(book.name, _cycle(list(book.values), 16))
            return f"lookup({table}, {plane.name}_lane(w, i))"
        factor = half_factor(book)
        if factor is None or book.minifloat is None:
            table = self._table(book.name, list(book.values))
            return f"gather({table}, {plane.name}_lane(w, i) & 255)"
        mantissa = book.minifloat[1]
        mask = 0x8000 | 0x7F << (10 - mantissa)
        half = f"half_lanes(((w.{plane.name}[i / 4] << (24 - 8 * (i % 4))) >> {14 + mantissa}) & {mask})"
        if raw:
            return half
        wrong = [c for c, v in enumerate(book.values) if not math.isfinite(v) and book.minifloat[0] < 5]
        value = f"({half} * {float_literal(factor)})"
        for c in wrong:
            value = (
                f"select(equals({plane.name}_lane(w, i) & 255, {c}), splat({float_literal(book.values[c])}), {value})"
            )
        return value

    def _table(self, name: str, values: list[float]) -> str:
        text = ", ".join(float_literal(_float32(v)) for v in values)
        line = f"alignas(64) const float TABLE_{name}[{len(values)}] = {{{text}}};"
        if line not in self.tables:
            self.tables.append(line)
        return f"TABLE_{name}"

    def _gen_list(self) -> list[float]:
        assert self.gen is not None  # one plane of at most four bits is always enumerable
        return self.gen.tolist()


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def _cycle(values: list[float], length: int) -> list[float]:
    """``values`` repeated, so that index bits beyond the code's own do not matter."""
    return (values * (length // len(values)))[:length]


def _tile_start(plane: Plane) -> str:
    if plane.is_code:
        return f"t * (k / {32 // plane.bits}) * 16"
    return "t * 16" if plane.per == ROW else f"t * (k / {plane.per}) * 16"


def _load_scale(plane: Plane, k: str = "k") -> str:
    return f"load_float(a.{plane.name})" if plane.per == ROW else f"load_float(a.{plane.name} + {k} / {plane.per} * 16)"


def _cpp(flag: bool) -> str:
    return "true" if flag else "false"
