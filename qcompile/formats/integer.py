"""Integer formats: symmetric, asymmetric, and with integer zero points as GPTQ and AWQ store them."""

from __future__ import annotations

from .spec import ROW, FormatSpec, Plane, symbols

q, scale, zero = symbols("q scale zero")


def int8(group: int = ROW) -> FormatSpec:
    """Symmetric int8: ``scale * q``, q in −128…127; one float32 scale per row, or one bfloat16 scale per group."""
    planes = (Plane("scale", "f32" if group == ROW else "bf16", group), Plane("q", "i8"))
    return FormatSpec("int8" if group == ROW else f"int8_g{group}", planes, value=scale * q)


def asymmetric(bits: int, group: int) -> FormatSpec:
    """``scale * (q − 2^(bits−1)) + zero`` with bfloat16 scale and zero per group (bits + 32/group bits a weight)."""
    planes = (Plane("scale", "bf16", group), Plane("zero", "bf16", group), Plane("q", f"u{bits}"))
    return FormatSpec(f"int{bits}_g{group}", planes, value=scale * (q - 2 ** (bits - 1)) + zero)


def symmetric(bits: int, group: int) -> FormatSpec:
    """``scale * (q − 2^(bits−1))`` with a bfloat16 scale per group (bits + 16/group bits a weight)."""
    planes = (Plane("scale", "bf16", group), Plane("q", f"u{bits}"))
    return FormatSpec(f"int{bits}_sym_g{group}", planes, value=scale * (q - 2 ** (bits - 1)))


def zero_point(bits: int, group: int, permuted: bool = False) -> FormatSpec:
    """``scale * (q − zero)`` with a float16 scale and an integer zero point per group: what GPTQ and AWQ checkpoints hold
    (Frantar et al. 2023, Lin et al. 2024). ``permuted``: columns in GPTQ's activation order."""
    planes = (Plane("scale", "f16", group), Plane("zero", f"u{bits}", group), Plane("q", f"u{bits}"))
    name = f"int{bits}_zp_g{group}{'_order' if permuted else ''}"
    return FormatSpec(name, planes, value=scale * (q - zero), permuted=permuted)


GROUPS = (32, 64, 128)
FORMATS = (
    int8(), *map(int8, GROUPS),
    *(make(4, group) for make in (asymmetric, symmetric) for group in GROUPS),
    *(make(bits, 64) for bits in (2, 3, 5, 6) for make in (asymmetric, symmetric)),
    *(zero_point(bits, 128, permuted) for bits in (2, 3, 4, 8) for permuted in (False, True)),
)  # fmt: skip
FAMILIES = (
    (r"int8_g(?P<group>\d+)", lambda group: int8(group)),
    (r"int(?P<bits>[2-6])_g(?P<group>\d+)", asymmetric),
    (r"int(?P<bits>[2-6])_sym_g(?P<group>\d+)", symmetric),
    (r"int(?P<bits>[2348])_zp_g(?P<group>\d+)", zero_point),
    (r"int(?P<bits>[2348])_zp_g(?P<group>\d+)_order", lambda bits, group: zero_point(bits, group, permuted=True)),
)
"""Names with numbers in them, and what makes the format that such a name means."""
