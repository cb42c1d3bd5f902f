"""Scale planes as C++: members of ``struct Format`` that load sixteen scales, and expressions over them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import sympy

from ..errors import FormatError
from ..formats.spec import ROW, Codebook, FormatSpec, Part, Plane
from .cpp_expr import LanePrinter, float_literal
from .cpp_facts import half_factor
from .cpp_table import Tables

FLOAT_TYPES = {"f32": "float", "f16": "Half", "bf16": "Bfloat"}


def element_type(part: Part) -> str:
    """C++ type of a stored tensor's elements."""
    if part.plane.is_code:
        return "int32_t"
    return "uint8_t" if part.plane.is_integer else FLOAT_TYPES[part.plane.dtype]


def tile_start(part: Part) -> str:
    """Elements before tile ``t`` of a tensor of rows of ``k`` weights."""
    lanes = 16 if part.plane.rows == 1 else 1
    each = part.plane.per * part.entries
    return f"t * {lanes}" if part.plane.per == ROW else f"t * ((k + {each - 1}) / {each}) * {lanes}"


def scale_loads(spec: FormatSpec) -> Iterator[str]:
    """For each scale plane ``vf`` (integers ``vi``) ``scale_{name}(a, k)``: its values for the weights from k on."""
    for plane in spec.scales:
        kind = "vi" if plane.is_integer else "vf"
        yield f"QC_INLINE {kind} scale_{plane.name}(const Planes& a, int64_t k) {{ return {_load(plane)}; }}"


def _load(plane: Plane) -> str:
    lanes = 16 if plane.rows == 1 else 1
    spread = "load_lanes" if lanes == 16 else "load_one"
    if not plane.is_integer or plane.bits == 8:
        at = "" if plane.per == ROW else f" + k / {plane.per} * {lanes}"
        pointer = f"(const int8_t*)a.{plane.name}" if plane.dtype == "i8" else f"a.{plane.name}"
        return f"{spread}({pointer}{at})"
    found = []
    for part in plane.parts:
        byte = f"{spread}(a.{part.name} + k / {plane.per * part.entries} * {lanes})"
        bits = f"shift_right({byte}, {part.bits} * (int)(k / {plane.per} % {part.entries})) & {2**part.bits - 1}"
        found.append(f"(({bits}) << {part.shift})" if part.shift else f"({bits})")
    return " | ".join(found)


def factor(spec: FormatSpec, expr: sympy.Expr, tables: Tables) -> str:
    """coeff or offset of the weights from ``k`` on as a ``vf`` expression over planes ``a``."""
    planes = {p.name: p for p in spec.scales}
    loads = {name: f"scale_{name}(a, k)" for name in planes}
    names = {name: f"to_float({loads[name]})" if planes[name].is_integer else loads[name] for name in planes}
    calls = {b.name: lambda name, book=b: _call(book, loads[name], tables) for b in spec.codebooks}
    return LanePrinter(names, calls).lanes(expr)


def _call(book: Codebook, code: str, tables: Tables) -> str:
    """``book`` of sixteen codes in 32-bit lanes: by arithmetic on bits, from a register, or from memory."""
    if book.minifloat == (8, 0):
        return f"e8m0({code})"
    if (scale := half_factor(book)) is not None and book.minifloat is not None:
        return minifloat(book, f"half_of({code}, {book.minifloat[1]})", scale, lambda c: f"equals({code}, {c})")
    if len(book.values) <= 16:
        return f"lookup({tables.floats(book.name, book.values, 16)}, {code})"
    if len(book.values) > 256:
        raise FormatError(f"codebook {book.name} has {len(book.values)} values; planes have at most 8 bits")
    return f"gather({tables.floats(book.name, book.values)}, {code})"


def minifloat(book: Codebook, half: str, scale: float, is_code) -> str:  # type: ignore[no-untyped-def]
    """The value of a minifloat from the ``half`` of its bits; patterns that are no numbers are put in by ``is_code``."""
    value = f"({half} * {float_literal(scale)})"
    assert book.minifloat is not None
    for code, wanted in enumerate(book.values):
        if not math.isfinite(wanted) and book.minifloat[0] < 5:
            value = f"select({is_code(code)}, splat({float_literal(wanted)}), {value})"
    return value
