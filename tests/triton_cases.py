"""Formats that the Triton test programs run on: every registered one, and private ones for shapes not registered yet."""

from __future__ import annotations

import torch

from qcompile.formats import REGISTRY, ROW, Codebook, FormatSpec, Plane, Scheme, affine, symbols

NORMAL_16 = Codebook(
    "NORMAL16",
    (-1.0, -0.69140625, -0.52734375, -0.39453125, -0.28515625, -0.185546875, -0.0908203125, 0.0,
     0.0795898438, 0.161132812, 0.24609375, 0.337890625, 0.44140625, 0.5625, 0.72265625, 1.0),
)  # fmt: skip
"""A table of 16 values like the quantiles of a normal distribution, symmetric nowhere."""

_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = Codebook("E2M1", (*_HALF, *(-v for v in _HALF)), minifloat=(2, 1))

q, low, high, scale, top, zero = symbols("q low high scale top zero")


def random_entries(spec: FormatSpec, groups: torch.Tensor) -> dict[str, torch.Tensor]:
    """Random plane entries: kernels are compared with the decoded weight, so they need not stand for ``groups``."""
    rows, cols = groups.shape[0], groups.shape[1] * groups.shape[2]
    entries = {}
    for p in spec.planes:
        if p.is_code:
            entries[p.name] = torch.randint(0, 2**p.bits, (rows, cols)).to(torch.int8 if p.dtype == "i8" else torch.uint8)
        else:
            entries[p.name] = torch.rand(rows, 1 if p.per == ROW else cols // p.per) + 0.5
    return entries


def private(name: str, planes: tuple[Plane, ...], value, codebooks: tuple[Codebook, ...] = ()) -> FormatSpec:  # type: ignore[no-untyped-def]
    return FormatSpec(name, planes, value=value, codebooks=codebooks, quantizer=random_entries)


PRIVATE = (
    private("table4_g64", (Plane("scale", "f32", 64), Plane("q", "u4")), scale * NORMAL_16(q), (NORMAL_16,)),
    private("two_level", (Plane("top", "f32", 256), Plane("scale", "f16", 32), Plane("q", "u4")), top * scale * (q - 8)),
    private("six_bits", (Plane("top", "f16", ROW), Plane("scale", "f16", 16), Plane("low", "u4"), Plane("high", "u2")),
            top * scale * (low + 16 * high - 32)),
    private("two_bits", (Plane("scale", "f16", 64), Plane("zero", "f16", 64), Plane("q", "u2")), scale * q + zero),
    private("row_zero", (Plane("scale", "f32", ROW), Plane("zero", "f32", ROW), Plane("q", "u8")), scale * (q - 128) + zero),
    private("float4_g32", (Plane("scale", "bf16", 32), Plane("q", "u4")), scale * E2M1(q), (E2M1,)),
)  # fmt: skip


def formats() -> list[FormatSpec]:
    return [*REGISTRY.values(), *PRIVATE]


def schemes() -> list[Scheme]:
    """Every format without quantized activations, and with them every format that 8-bit matrix units can take."""
    found = [Scheme(spec) for spec in formats()]
    for spec in formats():
        if affine(spec).integer and (spec.period == ROW or spec.period >= 32):
            found.append(Scheme(spec, "int8"))
        elif any(b.minifloat in ((4, 3), (5, 2)) for b in spec.codebooks):
            found.append(Scheme(spec, "fp8"))
    return found
