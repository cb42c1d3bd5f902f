"""Formats that the Triton test programs run on: representatives of the registered ones, and private ones."""

from __future__ import annotations

import os
import re

import sympy
import torch

from qcompile.formats import ALL, BUILT_IN, REGISTRY, ROW, Codebook, FormatSpec, Plane, Scheme, symbols
from qcompile.formats.algebra import gen_table
from qcompile.formats.float import E4M3, E8M0
from qcompile.formats.scheme import activations_of

NORMAL_16 = Codebook(
    "NORMAL16",
    (-1.0, -0.69140625, -0.52734375, -0.39453125, -0.28515625, -0.185546875, -0.0908203125, 0.0,
     0.0795898438, 0.161132812, 0.24609375, 0.337890625, 0.44140625, 0.5625, 0.72265625, 1.0),
)  # fmt: skip
"""A table of 16 values like the quantiles of a normal distribution, symmetric nowhere."""

CUBES = Codebook("CUBES", tuple(float((c - 13) ** 3) for c in range(32)))
STEPS = Codebook("STEPS", (-3.0, -1.0, 1.0, 4.0))
E2M3 = Codebook(
    "E2M3", tuple(s * (2.0**max(e, 1) * ((e > 0) + m / 8)) / 2 for s in (1, -1) for e in range(4) for m in range(8)),
    minifloat=(2, 3),
)  # fmt: skip

q, scale, top, zero, d, sc = symbols("q scale top zero d sc")


def random_entries(spec: FormatSpec, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Random plane entries: kernels are compared with the decoded weight, so they need not stand for ``weight``.

    Codes stand for values; scales that are codes of floats stay near 1.
    """
    n, k = weight.shape
    entries, where = {}, weight.device
    finite = torch.isfinite(gen_table(spec)).nonzero().flatten().to(torch.uint8).to(where)
    called = {f.args[0].name for f in spec.value.atoms(sympy.Function)}
    for p in spec.planes:
        shape = (n, k) if p.is_code else spec.entry_shape(p, n, k)
        if p.is_code:
            entries[p.name] = finite[torch.randint(0, len(finite), shape, device=where)].view(p.entry_dtype)
        elif p.is_integer:
            low, high = (118, 128) if p.name in called else (0, 2**p.bits)
            entries[p.name] = torch.randint(low, high, shape, dtype=torch.uint8, device=where).view(p.entry_dtype)
        else:
            entries[p.name] = (torch.rand(shape, device=where) + 0.5).to(p.entry_dtype)
    return entries


def private(name: str, planes: tuple[Plane, ...], value, codebooks: tuple[Codebook, ...] = ()) -> FormatSpec:  # type: ignore[no-untyped-def]
    return FormatSpec(name, planes, value=value, codebooks=codebooks, quantizer=random_entries)


PRIVATE = (
    private("table4_g64", (Plane("scale", "f32", 64), Plane("q", "u4")), scale * NORMAL_16(q), (NORMAL_16,)),
    private("two_level", (Plane("top", "f32", 256), Plane("scale", "f16", 32), Plane("q", "u4")), top * scale * (q - 8)),
    private("six_bits", (Plane("top", "f16", ROW), Plane("scale", "f16", 16), Plane("q", "u6")), top * scale * (q - 32)),
    private("ternary", (Plane("d", "f16", 256), Plane("q", "u2")), d * (q - 1)),
    private("row_zero", (Plane("scale", "f32", ROW), Plane("zero", "f32", ROW), Plane("q", "u8")), scale * (q - 128) + zero),
    private("seven_odd", (Plane("scale", "bf16", 96), Plane("q", "u7")), scale * (q - 64)),
    private("five_g24", (Plane("scale", "f16", 24), Plane("zero", "u5", 24), Plane("q", "u5")), scale * (q - zero)),
    private("four_g48", (Plane("scale", "f16", 48), Plane("zero", "bf16", 96), Plane("q", "u4")), scale * q + zero),
    private("one_bit", (Plane("scale", "f16", 32, 16), Plane("q", "u1")), scale * (2 * q - 1)),
    private("cubes", (Plane("scale", "f16", 128), Plane("q", "u5")), scale * CUBES(q), (CUBES,)),
    private("steps", (Plane("top", "f32", ROW, ALL), Plane("sc", "u3", 16), Plane("q", "u2")), top * (sc + 1) * STEPS(q),
            (STEPS,)),
    private("fp6", (Plane("sc", "u8", 32), Plane("q", "u6")), E8M0(sc) * E2M3(q), (E8M0, E2M3)),
    private("blocks", (Plane("sc", "u8", 64, 32), Plane("q", "u8")), E8M0(sc) * E4M3(q), (E8M0, E4M3)),
    private("row_byte", (Plane("d", "f32", ROW, ALL), Plane("sc", "u8", ROW), Plane("q", "u3")), d * sc * (q - 4)),
)  # fmt: skip
"""What no registered format has: periods that are no power of two, tables of other sizes, integers per row, 1 and 7 bits."""


def kind(spec: FormatSpec) -> tuple[object, ...]:
    """What formats share whose kernels differ only in group sizes."""
    scales = tuple((p.dtype, p.rows, p.per == ROW, min(p.per, 32)) for p in spec.scales)
    return spec.code.dtype, scales, tuple(b.name for b in spec.codebooks), str(spec.value)


def representatives() -> list[FormatSpec]:
    """The first format of each kind, with the largest group of 32 to 128 where one name has several, and int4 in each."""
    found: dict[tuple[object, ...], FormatSpec] = {}
    for spec in BUILT_IN:
        if not spec.permuted and (kind(spec) not in found or spec.name.endswith("g128")):
            found[kind(spec)] = spec
    return [*found.values(), *(REGISTRY[f"int4_g{group}"] for group in (32, 64))]


def formats() -> list[FormatSpec]:
    return [*representatives(), *PRIVATE]


def schemes() -> list[Scheme]:
    """Every format without quantized activations, and with those it can be multiplied by; ``QCOMPILE_TEST_SCHEMES``, a
    regular expression over labels, leaves some out."""
    found = [Scheme(spec) for spec in formats()]
    found += [Scheme(spec, activations) for spec in formats() for activations in activations_of(spec)]
    return [s for s in found if re.search(os.environ.get("QCOMPILE_TEST_SCHEMES", "."), s.label)]
