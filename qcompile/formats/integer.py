"""Integer formats: int8 per channel and per group, int4 symmetric and asymmetric."""

from __future__ import annotations

from .spec import ROW, FormatSpec, Plane, symbols

q, scale, zero = symbols("q scale zero")


def int8(group: int = ROW) -> FormatSpec:
    """Symmetric int8: ``scale * q``, q in −128…127; one float32 scale per row, or one bfloat16 scale per group."""
    planes = (Plane("scale", "f32" if group == ROW else "bf16", group), Plane("q", "i8"))
    return FormatSpec("int8" if group == ROW else f"int8_g{group}", planes, value=scale * q)


def int4(group: int) -> FormatSpec:
    """Asymmetric int4: ``scale * (q − 8) + zero`` with bfloat16 scale and zero per group (4 + 32/group bits)."""
    planes = (Plane("scale", "bf16", group), Plane("zero", "bf16", group), Plane("q", "u4"))
    return FormatSpec(f"int4_g{group}", planes, value=scale * (q - 8) + zero)


def int4_sym(group: int) -> FormatSpec:
    """Symmetric int4: ``scale * (q − 8)`` with a bfloat16 scale per group (4 + 16/group bits)."""
    planes = (Plane("scale", "bf16", group), Plane("q", "u4"))
    return FormatSpec(f"int4_sym_g{group}", planes, value=scale * (q - 8))


FORMATS = (
    int8(), int8(32), int8(64), int8(128),
    int4(32), int4(64), int4(128),
    int4_sym(32), int4_sym(64), int4_sym(128),
)  # fmt: skip
