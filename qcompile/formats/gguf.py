"""GGUF's block formats, as ggml defines them (ggml-common.h): same values, own storage."""

from __future__ import annotations

from .spec import Codebook, FormatSpec, Plane, symbols

q, d, m, dmin, sc, mn = symbols("q d m dmin sc mn")

IQ4 = Codebook("IQ4", tuple(map(float, (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))))
"""ggml's ``kvalues_iq4nl``."""


def simple(name: str, bits: int, dtype: str = "") -> FormatSpec:
    """32 weights with a float16 scale: ``d * (q − 2^(bits−1))`` (Q8_0: signed codes, ``d * q``)."""
    value = d * q if dtype == "i8" else d * (q - 2 ** (bits - 1))
    return FormatSpec(name, (Plane("d", "f16", 32), Plane("q", dtype or f"u{bits}")), value=value)


def with_minimum(name: str, bits: int) -> FormatSpec:
    """32 weights with float16 scale and minimum: ``d * q + m``."""
    return FormatSpec(name, (Plane("d", "f16", 32), Plane("m", "f16", 32), Plane("q", f"u{bits}")), value=d * q + m)


def k_quant(name: str, bits: int, group: int, scale_bits: int) -> FormatSpec:
    """Superblocks of 256: ``d * sc * q − dmin * mn`` with integer scales and minima for each group."""
    planes = (Plane("d", "f16", 256), Plane("dmin", "f16", 256), Plane("sc", f"u{scale_bits}", group),
              Plane("mn", f"u{scale_bits}", group), Plane("q", f"u{bits}"))  # fmt: skip
    return FormatSpec(name, planes, value=d * sc * q - dmin * mn)


def signed_k_quant(name: str, scale: Plane, code: Plane) -> FormatSpec:
    """Superblocks of 256: ``d * scale * (q − half)`` with signed integer scales for each group."""
    factor = sc if scale.dtype == "i8" else sc - 2 ** (scale.bits - 1)
    return FormatSpec(name, (Plane("d", "f16", 256), scale, code), value=d * factor * (q - 2 ** (code.bits - 1)))


FORMATS = (
    simple("Q4_0", 4), with_minimum("Q4_1", 4), simple("Q5_0", 5), with_minimum("Q5_1", 5), simple("Q8_0", 8, "i8"),
    k_quant("Q2_K", 2, 16, 4),
    signed_k_quant("Q3_K", Plane("sc", "u6", 16), Plane("q", "u3")),
    k_quant("Q4_K", 4, 32, 6),
    k_quant("Q5_K", 5, 32, 6),
    signed_k_quant("Q6_K", Plane("sc", "i8", 16), Plane("q", "u6")),
    FormatSpec("IQ4_NL", (Plane("d", "f16", 32), Plane("q", "u4")), d * IQ4(q), (IQ4,), shrinks=(1.07, 1.0, 0.95, 0.9)),
    FormatSpec("IQ4_XS", (Plane("d", "f16", 256), Plane("sc", "u6", 32), Plane("q", "u4")), d * (sc - 32) * IQ4(q), (IQ4,),
               shrinks=(1.07, 1.0, 0.95, 0.9)),
)  # fmt: skip
