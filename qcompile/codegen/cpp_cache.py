"""Quantizers of a KV cache as C++: what ``include/cache.h`` asks of a format whose scales follow from a group's range."""

from __future__ import annotations

import torch

from ..formats.algebra import codebook_of_gen, gen_table, linear_gen
from ..formats.codes import borders_of
from ..formats.ranges import range_planes
from ..formats.spec import ROW, FormatSpec, Part, Plane
from .cpp_expr import float_literal


def cache_struct(spec: FormatSpec) -> str:
    """C++ text of ``struct Cache``: ``Format`` and its quantizer. Raises :class:`FormatError` as :func:`range_planes`."""
    scale, zero = range_planes(spec)
    table, linear = gen_table(spec), linear_gen(spec)
    limits, patterns = borders_of(tuple(table.tolist()), linear is not None or any(b.minifloat for b in spec.codebooks))
    finite = table[torch.isfinite(table)]
    step, base = linear if linear is not None else (1.0, 0.0)
    book = codebook_of_gen(spec)
    shape = book.minifloat if book is not None and book.minifloat is not None and sum(book.minifloat) == 7 else None
    bias = 2 ** (shape[0] - 1) - 1 if shape is not None else 0
    half = 1 << (len(patterns) - 1).bit_length() - 1
    kind = "NO_ZERO" if zero is None else "ZERO_POINT" if zero.is_integer else "ADDED"
    body = [
        f"static constexpr int64_t GROUP = {0 if scale.per == ROW else scale.per};  // weights of a row with one scale; 0: all",
        f"static constexpr int COUNT = {len(patterns)}, HALF = {half}, ZERO = {kind};",
        f"static constexpr bool EVEN_STEPS = {'true' if linear is not None else 'false'};",
        f"static constexpr float STEP = {float_literal(step)}, BASE = {float_literal(float(finite.min()) if linear else base)};",
        f"static constexpr float LEAST = {float_literal(float(finite.min()))}, MOST = {float_literal(float(finite.max()))};",
        f"static constexpr int MANTISSA = {shape[1] if shape is not None else 0}, BIAS = {bias};  // of a float; 0: it is none",
        f"static constexpr float SMALLEST = {float_literal(2.0 ** (1 - bias))};  // normal number of it",
        f"static constexpr float BORDERS[] = {{{', '.join(float_literal(b) for b in limits.tolist())}}};",
        f"static constexpr uint8_t PATTERNS[] = {{{', '.join(map(str, patterns.tolist()))}}};",
        _store_float("store_scale", scale),
        *([] if zero is None else [_store_zero(zero) if zero.is_integer else _store_float("store_zero", zero)]),
        _store_codes(spec),
    ]
    return "\n".join(["namespace {", "struct Cache : Format {", *(f"  {line}" for line in body), "};", "}  // namespace"])


def _signature(name: str) -> str:
    return f"QC_INLINE float {name}(const Planes& a, int64_t k, int lane, float value)"


def _at(part: Part) -> str:
    plane = part.plane
    return "lane" if plane.per == ROW else f"k / {plane.per * part.entries} * 16 + lane"


def _store_float(name: str, plane: Plane) -> str:
    """Stores a float entry and gives what will be read."""
    kind = {"f32": "float", "f16": "Half", "bf16": "Bfloat"}[plane.dtype]
    return f"{_signature(name)} {{ return stored_float(({kind}*)a.{plane.name} + {_at(plane.parts[0])}, value); }}"


def _store_zero(plane: Plane) -> str:
    """Stores the nearest zero point of the plane's range; entries of less than a byte share it with their neighbours."""
    lines = [f"const int zero = value > 0.0f ? value < {2**plane.bits - 1} ? (int)nearbyintf(value) : {2**plane.bits - 1} : 0;"]
    for part in plane.parts:
        shift = f"{part.bits} * (int)(k / {plane.per} % {part.entries})"
        lines.append(f"{{ uint8_t& byte = ((uint8_t*)a.{part.name})[{_at(part)}]; const int shift = {shift}; "
                     f"byte = (uint8_t)((byte & ~({2**part.bits - 1} << shift)) | "
                     f"((zero >> {part.shift} & {2**part.bits - 1}) << shift)); }}")  # fmt: skip
    return f"{_signature('store_zero')} {{ {' '.join(lines)} return (float)zero; }}"


def _store_codes(spec: FormatSpec) -> str:
    """Stores the codes of a row; layout: :mod:`qcompile.formats.layout`."""
    loops = []
    for part in spec.code.parts:
        code = f"codes[w * {part.entries} + i] >> {part.shift} & {2**part.bits - 1}"
        loops.append(f"for (int64_t w = 0; w < padded / {part.entries}; ++w) {{ uint32_t word = 0; "
                     f"for (int i = 0; i < {part.entries}; ++i) "
                     f"word |= (uint32_t)({code}) << (8 * (i % 4) + {part.bits} * (i / 4)); "
                     f"((uint32_t*)a.{part.name})[w * 16 + lane] = word; }}")  # fmt: skip
    signature = "QC_INLINE void store_codes(const Planes& a, const uint8_t* codes, int64_t padded, int lane)"
    return f"{signature} {{ {' '.join(loops)} }}"
