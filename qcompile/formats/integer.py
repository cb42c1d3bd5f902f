"""Integer formats: symmetric, asymmetric, and with integer zero points as GPTQ and AWQ store them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

from .spec import ROW, FormatSpec, Plane, symbols

q, factor, zero = symbols("q scale zero")


def int8(group: int = ROW, scale: str = "bf16") -> FormatSpec:
    """Symmetric int8: ``scale * q``, q in −128…127; one float32 scale per row, or one of dtype ``scale`` per group."""
    planes = (Plane("scale", "f32" if group == ROW else scale, group), Plane("q", "i8"))
    return FormatSpec("int8" if group == ROW else f"int8{_tail(scale, 'bf16')}_g{group}", planes, value=factor * q)


def asymmetric(bits: int, group: int) -> FormatSpec:
    """``scale * (q − 2^(bits−1)) + zero`` with bfloat16 scale and zero per group (bits + 32/group bits a weight)."""
    planes = (Plane("scale", "bf16", group), Plane("zero", "bf16", group), Plane("q", f"u{bits}"))
    return FormatSpec(f"int{bits}_g{group}", planes, value=factor * (q - 2 ** (bits - 1)) + zero)


def ranged(bits: int, group: int) -> FormatSpec:
    """:func:`asymmetric` with scales that follow from the range of a group at once: without a search, which may choose otherwise
    after a step of training, they change as little as the weights do."""
    made = asymmetric(bits, group)
    return dataclasses.replace(made, name=f"int{bits}_range_g{group}", shrinks=())


def symmetric(bits: int, group: int, scale: str = "bf16", permuted: bool = False) -> FormatSpec:
    """``scale * (q − 2^(bits−1))`` with one scale per group (bits + 16/group bits a weight). ``permuted``: columns in
    GPTQ's activation order."""
    planes = (Plane("scale", scale, group), Plane("q", f"u{bits}"))
    name = f"int{bits}_sym{_tail(scale, 'bf16')}_g{group}{'_order' if permuted else ''}"
    return FormatSpec(name, planes, value=factor * (q - 2 ** (bits - 1)), permuted=permuted)


def zero_point(bits: int, group: int, permuted: bool = False, scale: str = "f16", wide: bool = False) -> FormatSpec:
    """``scale * (q − zero)`` with one scale and an integer zero point per group: what GPTQ and AWQ checkpoints hold
    (Frantar et al. 2023, Lin et al. 2024). ``permuted``: columns in GPTQ's activation order. ``wide``: zero points have a
    bit more, as GPTQ's first layout can say 2^bits."""
    planes = (Plane("scale", scale, group), Plane("zero", f"u{bits + wide}", group), Plane("q", f"u{bits}"))
    name = f"int{bits}_zp{'w' if wide else ''}{_tail(scale, 'f16')}_g{group}{'_order' if permuted else ''}"
    return FormatSpec(name, planes, value=factor * (q - zero), permuted=permuted)


def _tail(scale: str, usual: str) -> str:
    return "" if scale == usual else f"_{scale}"


GROUPS = (32, 64, 128)
FORMATS = (
    int8(), *map(int8, GROUPS),
    *(make(4, group) for make in (asymmetric, symmetric) for group in GROUPS),
    *(make(bits, 64) for bits in (2, 3, 5, 6) for make in (asymmetric, symmetric)),
    *(zero_point(bits, 128, permuted) for bits in (2, 3, 4, 8) for permuted in (False, True)),
)  # fmt: skip
SCALES = ("bf16", "f16", "f32")
FAMILIES: tuple[tuple[str, Callable[..., FormatSpec]], ...] = (
    *((rf"int8{_tail(dtype, 'bf16')}_g(?P<group>\d+)", partial(int8, scale=dtype)) for dtype in SCALES),
    (r"int(?P<bits>[2-6])_g(?P<group>\d+)", asymmetric),
    (r"int(?P<bits>[2-6])_range_g(?P<group>\d+)", ranged),
    *((rf"int(?P<bits>[2-7])_sym{_tail(dtype, 'bf16')}_g(?P<group>\d+){order}",
       partial(symmetric, scale=dtype, permuted=bool(order))) for dtype in SCALES for order in ("", "_order")),
    *((rf"int(?P<bits>[2-{'7' if wide else '8'}])_zp{wide}{_tail(dtype, 'f16')}_g(?P<group>\d+){order}",
       partial(zero_point, scale=dtype, permuted=bool(order), wide=bool(wide)))
      for dtype in SCALES for wide in ("", "w") for order in ("", "_order")),
)  # fmt: skip
"""Names with numbers in them, and what makes the format that such a name means."""
