"""What a kernel printer may use about the values of a format's codes."""

from __future__ import annotations

import itertools
import math

import sympy
import torch

from ..formats.algebra import Affine, affine, torch_function
from ..formats.spec import Codebook, FormatSpec

ENUMERABLE_BITS = 16
"""Code bits of a weight up to which all combinations are listed."""


def with_folded_factor(spec: FormatSpec) -> Affine:
    """The affine form with the power of two between a minifloat and the half of the same bits moved into ``coeff``.

    Only for ``gen = number * book(code)``; ``gen`` then stands for the half.
    """
    form = affine(spec)
    number, rest = form.gen.as_coeff_Mul()
    book = next((b for b in spec.codebooks if rest.is_Function and rest.func.__name__ == b.name), None)
    factor = half_factor(book) if book is not None and _bits_of_call(spec, rest) == 8 else None
    if factor is None:
        return form
    return Affine(form.coeff * sympy.Rational(factor) * number, rest, form.offset, form.period)


def _bits_of_call(spec: FormatSpec, call: sympy.Expr) -> int:
    name = next(iter(call.free_symbols)).name
    return next(p.bits for p in spec.codes if p.name == name)


def half_factor(book: Codebook) -> float | None:
    """2^d such that every finite value is 2^d times the half whose exponent and mantissa fields it has; else None."""
    if book.minifloat is None or len(book.values) != 256 or not 2 <= book.minifloat[0] <= 5:
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


def gen_values(spec: FormatSpec, form: Affine) -> torch.Tensor | None:
    """float64 values of ``gen`` over all combinations of codes, the last plane's fastest; None beyond 16 code bits."""
    if sum(p.bits for p in spec.codes) > ENUMERABLE_BITS:
        return None
    ranges = [range(2**p.bits) for p in spec.codes]
    grid = torch.tensor(list(itertools.product(*ranges)), dtype=torch.uint8)
    columns = [grid[:, i].view(torch.int8) if p.dtype == "i8" else grid[:, i] for i, p in enumerate(spec.codes)]
    original = affine(spec)
    gen = torch_function(spec, original.gen, tuple(p.name for p in spec.codes))(*columns).to(torch.float64)
    return gen * float(original.coeff / form.coeff)


def exact_in_bf16(values: torch.Tensor) -> bool:
    finite = values[torch.isfinite(values)]
    normal = bool(((finite == 0) | (finite.abs() >= 2.0**-126)).all())
    return normal and torch.equal(finite.to(torch.bfloat16).to(torch.float64), finite)
