"""Floating-point formats: fp8 (OCP 8-bit Floating Point Specification, revision 1.0), MXFP4 and NVFP4.

e3m4 is OCP's e4m3 with a bit moved from the exponent to the mantissa (bias 3, largest value 30, NaN is the last pattern, no
infinities). Under a scale of its own a row needs no more range, and is rounded half as coarsely.
"""

from __future__ import annotations

import math

import torch

from .spec import ALL, ROW, Codebook, FormatSpec, Plane, symbols

q, s, scale, top = symbols("q s scale top")


def _values(exponent: int, mantissa: int, infinities: bool) -> tuple[float, ...]:
    """Values of the 256 patterns of a float of 1 sign, ``exponent`` and ``mantissa`` bits. With ``infinities`` the top
    exponent is infinity and NaN as in IEEE 754; without, only its last pattern is NaN (OCP's e4m3). Plain arithmetic: this
    module may be imported while fake tensors are in force."""
    bias, top = 2 ** (exponent - 1) - 1, 2**exponent - 1
    values = []
    for pattern in range(256):
        sign = -1.0 if pattern >= 128 else 1.0
        power, fraction = (pattern & 127) >> mantissa, pattern & (2**mantissa - 1)
        if power == top and (infinities or fraction == 2**mantissa - 1):
            values.append(math.nan if fraction else sign * math.inf)
        elif power == 0:
            values.append(sign * math.ldexp(fraction, 1 - bias - mantissa))
        else:
            values.append(sign * math.ldexp(2**mantissa + fraction, power - bias - mantissa))
    return tuple(values)


def _unsigned_exponent() -> tuple[float, ...]:
    """Values of e8m0: 2^(c − 127); pattern 255 is NaN."""
    return (*(math.ldexp(1.0, code - 127) for code in range(255)), math.nan)


E4M3 = Codebook("E4M3", _values(4, 3, infinities=False), minifloat=(4, 3), cast=torch.float8_e4m3fn)
E3M4 = Codebook("E3M4", _values(3, 4, infinities=False), minifloat=(3, 4))
E5M2 = Codebook("E5M2", _values(5, 2, infinities=True), minifloat=(5, 2), cast=torch.float8_e5m2)
E8M0 = Codebook("E8M0", _unsigned_exponent(), minifloat=(8, 0))
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = Codebook("E2M1", (*_E2M1, *(-v for v in _E2M1)), minifloat=(2, 1))


def fp8(book: Codebook, name: str, per: int = ROW, rows: int = 1) -> FormatSpec:
    """``scale * float8(q)`` with one float32 scale per row, block or tensor; largest value 30 (e3m4), 448 (e4m3),
    57344 (e5m2)."""
    return FormatSpec(name, (Plane("scale", "f32", per, rows), Plane("q", "u8")), value=scale * book(q), codebooks=(book,))


MXFP4 = FormatSpec(
    "mxfp4", (Plane("s", "u8", 32), Plane("q", "u4")), value=E8M0(s) * E2M1(q), codebooks=(E8M0, E2M1),
    shrinks=(1.41, 1.0, 0.71),
)  # fmt: skip
"""OCP Microscaling Formats (MX) Specification 1.0: e2m1 with an e8m0 scale for 32 weights, 4.25 bits. GGUF's MXFP4 too."""

NVFP4 = FormatSpec(
    "nvfp4", (Plane("top", "f32", ROW, ALL), Plane("s", "u8", 16), Plane("q", "u4")), value=top * E4M3(s) * E2M1(q),
    codebooks=(E4M3, E2M1), shrinks=(1.15, 1.0, 0.85),
)  # fmt: skip
"""e2m1 with an e4m3 scale for 16 weights and one float32 scale for the tensor (NVIDIA, Blackwell), 4.5 bits."""

FORMATS = (
    *(fp8(book, f"fp8_{name}{tail}", per, rows) for book, name in ((E4M3, "e4m3"), (E5M2, "e5m2"))
      for tail, per, rows in (("", ROW, 1), ("_tensor", ROW, ALL), ("_b128", 128, 128))),
    fp8(E3M4, "fp8_e3m4"), MXFP4, NVFP4,
)  # fmt: skip
