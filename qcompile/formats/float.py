"""8-bit floating-point formats (OCP 8-bit Floating Point Specification, revision 1.0)."""

from __future__ import annotations

import torch

from .spec import ROW, Codebook, FormatSpec, Plane, symbols

q, scale = symbols("q scale")


def _values(dtype: torch.dtype) -> tuple[float, ...]:
    return tuple(torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float32).tolist())


E4M3 = Codebook("E4M3", _values(torch.float8_e4m3fn), minifloat=(4, 3), cast=torch.float8_e4m3fn)
E5M2 = Codebook("E5M2", _values(torch.float8_e5m2), minifloat=(5, 2), cast=torch.float8_e5m2)


def fp8(book: Codebook, name: str) -> FormatSpec:
    """``scale * float8(q)`` with one float32 scale per row; largest value 448 (e4m3) or 57344 (e5m2)."""
    return FormatSpec(name, (Plane("scale", "f32", ROW), Plane("q", "u8")), value=scale * book(q), codebooks=(book,))


FORMATS = (fp8(E4M3, "fp8_e4m3"), fp8(E5M2, "fp8_e5m2"))
