"""Which family of formats a format belongs to, told by its declaration: what another layout needs to know of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..formats import ROW, FormatSpec
from ..formats.integer import int8, symmetric, zero_point


@dataclass(frozen=True)
class Integers:
    """weight = scale · (code − zero): ``bits`` of an unsigned code, ``group`` weights for a scale (:data:`ROW`: a row); without
    ``zeros`` the zero point is 2^(bits−1); ``permuted``: columns in activation order."""

    bits: int
    group: int
    zeros: bool
    permuted: bool


def integers(spec: FormatSpec) -> Integers | None:
    """What ``spec`` is if its values are integers with a scale; None otherwise, also for float zero points."""
    for made, family in _candidates(spec):
        if made.fingerprint == spec.fingerprint:
            return family
    return None


def _candidates(spec: FormatSpec) -> Iterator[tuple[FormatSpec, Integers]]:
    scale = next((p for p in spec.scales if p.name == "scale"), None)
    if scale is None or scale.rows != 1:
        return
    bits, group, permuted = spec.code.bits, scale.per, spec.permuted
    if spec.code.dtype == "i8":
        yield int8(group, scale.dtype) if group != ROW else int8(), Integers(8, group, False, False)
    if group == ROW:
        return
    yield symmetric(bits, group, scale.dtype, permuted), Integers(bits, group, False, permuted)
    for wide in (False, True):
        if bits + wide <= 8:
            yield zero_point(bits, group, permuted, scale.dtype, wide), Integers(bits, group, True, permuted)
