"""sympy expressions as C++ over the sixteen-lane vectors of ``include/simd.h``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import sympy
from sympy.printing.codeprinter import CodePrinter

from ..errors import FormatError


def float_literal(value: float) -> str:
    """``value`` as a C++ float constant that reads back exactly when it is a float32."""
    if value != value:
        return "NAN"
    if value in (float("inf"), float("-inf")):
        return "INFINITY" if value > 0 else "-INFINITY"
    return f"{value!r}f"


class LanePrinter(CodePrinter):
    """Prints ``+ - * /``, whole powers and calls; symbols and calls are replaced by what ``names`` and ``calls`` give.

    Terms and factors keep the order in which sympy prints Python, so float results agree bit for bit with the
    reference. ``integer=True`` prints numbers as int32 and refuses fractions. Raises :class:`FormatError` for anything
    that vectors cannot compute.
    """

    language = "C++"
    printmethod = "_qcompile_lanes"
    reserved_words: set[str] = set()

    def __init__(
        self, names: Mapping[str, str], calls: Mapping[str, Callable[[str], str]] | None = None, integer: bool = False
    ) -> None:
        super().__init__({"order": None, "allow_unknown_functions": True})
        self._names = names
        self._calls = calls or {}
        self._integer = integer

    def lanes(self, expr: sympy.Expr) -> str:
        """C++ text of type vf (vi with ``integer=True``)."""
        text = str(self._print(expr))
        return f"splat({text})" if expr.is_number else text

    def _print_Symbol(self, expr: sympy.Symbol) -> str:
        return self._names[expr.name]

    def _print_Integer(self, expr: sympy.Integer) -> str:
        return str(int(expr)) if self._integer else float_literal(float(int(expr)))

    def _print_Rational(self, expr: sympy.Rational) -> str:
        return self._fraction(expr)

    def _print_Float(self, expr: sympy.Float) -> str:
        return self._fraction(expr)

    def _fraction(self, expr: sympy.Expr) -> str:
        if self._integer:
            raise FormatError(f"{expr} cannot be printed in integer arithmetic")
        return float_literal(float(expr))

    def _print_Pow(self, expr: sympy.Pow) -> str:
        base, exponent = expr.args
        if not (exponent.is_Integer and 1 < abs(int(exponent)) <= 4) and exponent != -1:
            raise FormatError(f"C++ kernels have no {expr}; use sums, products and whole powers up to 4")
        power = " * ".join([f"({self._print(base)})"] * abs(int(exponent)))
        return f"({power})" if int(exponent) > 0 else f"(1.0f / ({power}))"

    def _print_Function(self, expr: sympy.Function) -> str:
        name = expr.func.__name__
        if name not in self._calls or not expr.args[0].is_Symbol:
            raise FormatError(f"C++ kernels cannot print {expr}; codebooks take one code plane")
        return self._calls[name](expr.args[0].name)
