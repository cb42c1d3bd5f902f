"""8-bit floating-point formats (OCP 8-bit Floating Point Specification, revision 1.0)."""

from __future__ import annotations

import math

import torch

from .spec import ROW, Codebook, FormatSpec, Plane, symbols

q, scale = symbols("q scale")


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


E4M3 = Codebook("E4M3", _values(4, 3, infinities=False), minifloat=(4, 3), cast=torch.float8_e4m3fn)
E5M2 = Codebook("E5M2", _values(5, 2, infinities=True), minifloat=(5, 2), cast=torch.float8_e5m2)


def fp8(book: Codebook, name: str) -> FormatSpec:
    """``scale * float8(q)`` with one float32 scale per row; largest value 448 (e4m3) or 57344 (e5m2)."""
    return FormatSpec(name, (Plane("scale", "f32", ROW), Plane("q", "u8")), value=scale * book(q), codebooks=(book,))


FORMATS = (fp8(E4M3, "fp8_e4m3"), fp8(E5M2, "fp8_e5m2"))
