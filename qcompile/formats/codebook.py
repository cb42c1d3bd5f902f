"""4-bit formats whose codes index a table: NF4 and FP4 as in bitsandbytes."""

from __future__ import annotations

from .spec import Codebook, FormatSpec, Plane, symbols

q, a, absmax, d = symbols("q a absmax d")

NF4 = Codebook("NF4", (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
))  # fmt: skip
"""Quantiles of a normal distribution with an exact zero (Dettmers et al., "QLoRA", 2023, appendix E), in float32."""

_FP4 = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25)
FP4 = Codebook("FP4", (*_FP4, *(-v for v in _FP4)))
"""bitsandbytes' FP4: sign, two bits of exponent, one of mantissa, over 12, in float32."""


def table4(name: str, book: Codebook, group: int) -> FormatSpec:
    """``absmax * book(q)`` with one float32 absolute maximum per group (4 + 32/group bits a weight)."""
    return FormatSpec(name, (Plane("absmax", "f32", group), Plane("q", "u4")), value=absmax * book(q), codebooks=(book,),
                      shrinks=())


NF4_DQ = FormatSpec(
    "nf4_dq", (Plane("d", "f32", 1024, 16), Plane("a", "u8", 64), Plane("q", "u4")), value=d * a * NF4(q),
    codebooks=(NF4,), shrinks=(),
)  # fmt: skip
"""NF4 with double quantization: the absolute maxima of 256 groups (16 rows × 1024 weights) in 8 bits each, 4.127 bits."""

FORMATS = (table4("nf4", NF4, 64), table4("fp4", FP4, 64), NF4_DQ)
FAMILIES = (
    (r"nf4_g(?P<group>\d+)", lambda group: table4(f"nf4_g{group}", NF4, group)),
    (r"fp4_g(?P<group>\d+)", lambda group: table4(f"fp4_g{group}", FP4, group)),
)
"""Names with numbers in them, and what makes the format that such a name means."""
