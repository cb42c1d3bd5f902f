"""What sympy knows about a format: its affine form, the values of its codes, and what may be hoisted."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import sympy
import torch

from ..errors import FormatError
from .spec import FormatSpec


@dataclass(frozen=True)
class Affine:
    """``value = coeff * gen + offset`` with ``coeff`` and ``offset`` constant over ``period`` weights of a row.

    ``coeff`` and ``offset`` are expressions over scale planes, ``gen`` over code planes and codebooks. So
    Σ x·value = coeff · Σ x·gen + offset · Σ x over a period, and a kernel multiplies by scales once per period.
    """

    coeff: sympy.Expr
    gen: sympy.Expr
    offset: sympy.Expr
    period: int

    @property
    def integer(self) -> bool:
        """Whether ``gen`` is an integer polynomial of the codes, so that an integer dot product is exact."""
        return not self.gen.atoms(sympy.Function) and all(c.is_Integer for c in sympy.Poly(self.gen).coeffs())


@functools.cache
def affine(spec: FormatSpec) -> Affine:
    """The affine form of ``spec.value``. Raises :class:`FormatError` when the codes do not enter as one factor."""
    codes = {p.name for p in spec.codes}
    parts: list[tuple[sympy.Expr, sympy.Expr]] = []
    constants: list[sympy.Expr] = []
    for term in sympy.Add.make_args(sympy.expand(spec.value)):
        factors = sympy.Mul.make_args(term)
        dependent = [f for f in factors if {s.name for s in f.free_symbols} & codes]
        if any({s.name for s in f.free_symbols} - codes for f in dependent):
            raise FormatError(f"format {spec.name!r}: {term} mixes codes and scales inside one function or power; "
                              "write the value as coeff * gen(codes) + offset")  # fmt: skip
        fixed = sympy.Mul(*(f for f in factors if f not in dependent))
        if dependent:
            parts.append((fixed, sympy.Mul(*dependent)))
        else:
            constants.append(fixed)
    coeff = _common(spec, [fixed for fixed, _ in parts])
    gen = sympy.Add(*(sympy.simplify(fixed / coeff) * dependent for fixed, dependent in parts))
    offset = sympy.S.Zero
    for constant in constants:
        ratio = sympy.simplify(constant / coeff)
        if ratio.is_number:
            gen += ratio
        else:
            offset += constant
    return Affine(coeff, gen, offset, spec.period)


def _common(spec: FormatSpec, fixed: list[sympy.Expr]) -> sympy.Expr:
    """The scale factor that all code terms share up to a number, without its own numeric factor."""
    coeff = fixed[0].as_coeff_Mul()[1]
    for other in fixed[1:]:
        if not sympy.simplify(other / coeff).is_number:
            raise FormatError(
                f"format {spec.name!r}: codes are scaled by both {coeff} and {other}; one factor is needed"
            )
    return coeff


@functools.cache
def gen_table(spec: FormatSpec) -> torch.Tensor:
    """float64 ``[2**bits]``: ``gen`` of every code pattern of a format with one code plane (i8: pattern 255 is −1).

    Raises :class:`FormatError` for a format with several code planes.
    """
    if len(spec.codes) != 1:
        raise FormatError(f"format {spec.name!r} has {len(spec.codes)} code planes; a table needs exactly one")
    plane = spec.codes[0]
    patterns = torch.arange(2**plane.bits, dtype=torch.uint8)
    codes = patterns.view(torch.int8) if plane.dtype == "i8" else patterns
    gen = torch_function(spec, affine(spec).gen, (plane.name,))(codes)
    return gen.to(torch.float64)


def torch_function(spec: FormatSpec, expr: sympy.Expr, names: tuple[str, ...]):  # type: ignore[no-untyped-def]
    """``expr`` as a PyTorch function of tensors named ``names``: the printer of the reference.

    Integer tensors are widened to float32 first; a codebook indexes its table by the code pattern.
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
