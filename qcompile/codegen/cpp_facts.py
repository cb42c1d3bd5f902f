"""What a kernel printer may use about the values of a format's codes."""

from __future__ import annotations

import math

import sympy
import torch

from ..formats.algebra import Affine, affine, codebook_of_gen, gen_table
from ..formats.spec import Codebook, FormatSpec


def with_folded_factor(spec: FormatSpec) -> tuple[Affine, torch.Tensor]:
    """The affine form, and float64 ``gen`` by code pattern, with a factor moved from ``gen`` into ``coeff``: the power of two
    between an 8-bit minifloat and the half of the same bits, or what makes a table's values exact in bf16; other formats as
    they are."""
    form, table = affine(spec), gen_table(spec)
    book = codebook_of_gen(spec)
    if book is None:
        return form, table
    factor = half_factor(book)
    if factor is None and not exact_in_bf16(table):
        factor = _factor_to_bf16(table)
        if factor is not None:
            return Affine(form.coeff * sympy.Float(factor, 17), form.gen, form.offset, form.period), _near_bf16(table / factor)
    if factor is None:
        return form, table
    return Affine(form.coeff * sympy.Rational(factor), form.gen, form.offset, form.period), table / factor


def half_factor(book: Codebook) -> float | None:
    """2^d such that every finite value is 2^d times the half whose exponent and mantissa fields it has; else None."""
    if book.minifloat is None or sum(book.minifloat) != 7 or not 2 <= book.minifloat[0] <= 5:
        return None
    mantissa = book.minifloat[1]
    codes = torch.arange(256, dtype=torch.int32)
    halves = (
        ((codes & 0x80) << 8 | (codes & 0x7F) << (10 - mantissa)).to(torch.int16).view(torch.float16).to(torch.float64)
    )
    values = torch.tensor(book.values, dtype=torch.float64)
    finite = torch.isfinite(values)
    factor = float(values[1] / halves[1])
    same = torch.equal(values[finite], halves[finite] * factor)
    return factor if same and math.frexp(factor)[0] == 0.5 else None


def _near_bf16(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.bfloat16).to(torch.float64)


def _factor_to_bf16(values: torch.Tensor) -> float | None:
    """f such that values / f are bf16 numbers within float32's rounding, the largest an integer of eight bits; else None."""
    largest = float(values.abs().max())
    if not 0 < largest < math.inf:
        return None
    for integer in range(128, 256):
        scaled = values * (integer / largest)
        if ((_near_bf16(scaled) - scaled).abs() <= 2.0**-23 * scaled.abs()).all():
            return largest / integer
    return None


def exact_in_bf16(values: torch.Tensor) -> bool:
    finite = values[torch.isfinite(values)]
    normal = bool(((finite == 0) | (finite.abs() >= 2.0**-126)).all())
    return normal and torch.equal(finite.to(torch.bfloat16).to(torch.float64), finite)
