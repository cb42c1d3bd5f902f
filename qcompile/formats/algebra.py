"""What sympy knows about a format: its affine form, the values of its codes, and the levels of its scales."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import sympy
import torch

from ..errors import FormatError
from .spec import Codebook, FormatSpec, Plane


@dataclass(frozen=True)
class Affine:
    """``value = coeff * gen + offset`` with ``coeff`` and ``offset`` constant over ``period`` weights of a row.

    ``coeff`` and ``offset`` are expressions over scale planes, ``gen`` over the code plane. So
    Σ x·value = coeff · Σ x·gen + offset · Σ x over a period, and a kernel multiplies by scales once per period.
    """

    coeff: sympy.Expr
    gen: sympy.Expr
    offset: sympy.Expr
    period: int


@functools.cache
def affine(spec: FormatSpec) -> Affine:
    """The affine form of ``spec.value``. Raises :class:`FormatError` when the codes do not enter as one factor."""
    code = _symbol(spec.value, spec.code.name)
    generators = sorted((f for f in spec.value.atoms(sympy.Function) if code in f.free_symbols), key=str)
    mixed = [f for f in generators if f.free_symbols != {code}]
    try:
        poly = sympy.Poly(spec.value, *generators, *([] if generators else [code]))
    except sympy.PolynomialError:
        mixed = [spec.value]
    if mixed or any(code in c.free_symbols for c in poly.coeffs()):
        raise FormatError(f"format {spec.name!r}: {mixed[0] if mixed else spec.value} mixes codes and scales inside one "
                          "function or power; write the value as coeff * gen(codes) + offset")  # fmt: skip
    terms = {monomial: sympy.factor(c) for monomial, c in poly.terms()}
    constant = terms.pop((0,) * len(poly.gens), sympy.S.Zero)
    coeff = _common(spec, list(terms.values()))
    gen = sympy.Add(*(sympy.simplify(c / coeff) * sympy.Mul(*(g**e for g, e in zip(poly.gens, m, strict=True)))
                      for m, c in terms.items()))  # fmt: skip
    shift, offset = _split_constant(constant, coeff)
    return Affine(coeff, gen + shift, offset, spec.period)


def _symbol(expr: sympy.Expr, name: str) -> sympy.Symbol:
    return next(s for s in expr.free_symbols if s.name == name)


def _common(spec: FormatSpec, fixed: list[sympy.Expr]) -> sympy.Expr:
    """The scale factor that all code terms share up to a number, without its own numeric factor."""
    coeff = fixed[0].as_coeff_Mul()[1]
    for other in fixed[1:]:
        if not sympy.simplify(other / coeff).is_number:
            raise FormatError(
                f"format {spec.name!r}: codes are scaled by both {coeff} and {other}; one factor is needed"
            )
    return coeff


def _split_constant(constant: sympy.Expr, coeff: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """``constant = shift * coeff + offset`` with the number ``shift`` taken out as far as whole terms go."""
    if (whole := sympy.simplify(constant / coeff)).is_number:
        return whole, sympy.S.Zero
    shift = offset = sympy.S.Zero
    for term in sympy.Add.make_args(sympy.expand(constant)):
        ratio = sympy.simplify(term / coeff)
        if ratio.is_number:
            shift += ratio
        else:
            offset += term
    return shift, offset


# The values of codes -------------------------------------------------------------------------------------------------


@functools.cache
def gen_table(spec: FormatSpec) -> torch.Tensor:
    """float64 ``[2**bits]``: ``gen`` of every code pattern (i8: pattern 255 is −1)."""
    patterns = torch.arange(2**spec.code.bits, dtype=torch.uint8).view(spec.code.entry_dtype)
    return torch_function(spec, affine(spec).gen, (spec.code.name,))(patterns).to(torch.float64)


@functools.cache
def linear_gen(spec: FormatSpec) -> tuple[float, float] | None:
    """(step, base) with ``gen = step * code + base`` for every code (signed for i8) and step > 0; else None."""
    table = gen_table(spec)
    if spec.code.dtype == "i8":
        table = table.roll(128)
    steps = table.diff()
    if not torch.isfinite(table).all() or not (steps == steps[0]).all() or steps[0] <= 0:
        return None
    return float(steps[0]), float(table[128] if spec.code.dtype == "i8" else table[0])


@functools.cache
def integer_gen(spec: FormatSpec) -> tuple[float, tuple[int, ...]] | None:
    """(unit, integers by code pattern) with ``gen = unit * integer``, unit a power of two and all integers within one byte's
    range (greatest − least ≤ 255): then an integer dot product is exact. Else None."""
    table = gen_table(spec)
    if not torch.isfinite(table).all():
        return None
    for power in range(8, -9, -1):
        scaled = table / 2.0**power
        if torch.equal(scaled.round(), scaled):
            return (2.0**power, tuple(scaled.long().tolist())) if scaled.max() - scaled.min() <= 255 else None
    return None


def codebook_of_gen(spec: FormatSpec) -> Codebook | None:
    """The codebook, when ``gen`` is exactly one lookup in it."""
    gen = affine(spec).gen
    return next((b for b in spec.codebooks if gen.is_Function and gen.func.__name__ == b.name), None)


# The levels of scales ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Level:
    """One factor of a scale: a plane, the value of each of its patterns (None: a float plane, which is its own value), and
    the codebook that the values are, if they are just that."""

    plane: Plane
    table: torch.Tensor | None
    book: Codebook | None = None


@dataclass(frozen=True)
class Product:
    """``number`` times a product of one function of each of several planes, coarsest plane first."""

    number: float
    levels: tuple[Level, ...]


@functools.cache
def levels_of(spec: FormatSpec, expr: sympy.Expr) -> Product:
    """``expr`` (coeff or offset) as a product over planes. Raises :class:`FormatError` when it is none."""
    number, rest = sympy.factor(expr).as_coeff_Mul()
    planes = {p.name: p for p in spec.scales}
    levels = []
    for factor in sympy.Mul.make_args(rest) if rest != 1 else ():
        names = sorted(s.name for s in factor.free_symbols)
        plane = planes[names[0]]
        if len(names) != 1 or (not plane.is_integer and not factor.is_Symbol):
            raise FormatError(f"format {spec.name!r}: {expr} is no product of float planes and functions of integer planes, so "
                              "no quantizer can be derived; give quantizer=")  # fmt: skip
        book = next((b for b in spec.codebooks if factor.is_Function and factor.func.__name__ == b.name), None)
        levels.append(Level(plane, plane_table(spec, factor, plane) if plane.is_integer else None, book))
    levels.sort(key=lambda level: _reach(level.plane), reverse=True)
    return Product(float(number), tuple(levels))


@functools.cache
def zero_points(spec: FormatSpec) -> torch.Tensor | None:
    """float64 ``[2**bits]``: what offset / coeff can be, if it is a function of one integer plane alone that has an entry for
    every group (``scale * (q − zero)``); else None."""
    form = affine(spec)
    ratio = sympy.simplify(form.offset / form.coeff)
    found = [p for p in spec.scales if p.name in {s.name for s in ratio.free_symbols}]
    if len(found) != 1 or not found[0].is_integer or found[0].per != spec.period or found[0].rows != 1:
        return None
    return plane_table(spec, ratio, found[0])


def plane_table(spec: FormatSpec, expr: sympy.Expr, plane: Plane) -> torch.Tensor:
    """float64 ``[2**bits]``: ``expr``, a function of the integer ``plane`` alone, for each of its patterns."""
    patterns = torch.arange(2**plane.bits, dtype=torch.uint8).view(plane.entry_dtype)
    return torch_function(spec, expr, (plane.name,))(patterns).to(torch.float64)


def _reach(plane: Plane) -> float:
    """Weights that share an entry, for sorting."""
    return (plane.per or 2.0**40) * (plane.rows or 2.0**40)


@functools.cache
def torch_function(spec: FormatSpec, expr: sympy.Expr, names: tuple[str, ...]) -> Callable[..., torch.Tensor]:
    """``expr`` as a PyTorch function of tensors named ``names``: the printer of the reference.

    Integer tensors are widened to float32 first; a codebook indexes its table by the pattern.
    """
    tables = {c.name: functools.partial(_lookup, torch.tensor(c.values, dtype=torch.float32)) for c in spec.codebooks}
    called = {next(iter(f.free_symbols)).name for f in expr.atoms(sympy.Function)}
    by_name = {s.name: s for s in expr.free_symbols}
    arguments = [by_name.get(n, sympy.Symbol(n, real=True)) for n in names]
    function = sympy.lambdify(arguments, expr, modules=[tables])

    def evaluate(*tensors: torch.Tensor) -> torch.Tensor:
        wide = [t if n in called else t.to(torch.float32) for n, t in zip(names, tensors, strict=True)]
        return torch.as_tensor(function(*wide), dtype=torch.float32)

    return evaluate


def _lookup(table: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    return table.to(code.device)[code.view(torch.uint8).long()]


def finite_range(table: torch.Tensor) -> tuple[float, float]:
    """(least, greatest) of the finite values."""
    finite = table[torch.isfinite(table)]
    return float(finite.min()), float(finite.max())

