"""Einstein sums of two factors that are products by a stack of matrices: what their equations say."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Terms:
    """Letters of a product by experts: ``x`` and ``out`` as written, of which ``expert`` names matrices of the weight,
    ``into`` the sum and ``onto`` the results. ``turned``: the weight is written [expert, onto, into]."""

    x: str
    out: str
    expert: str
    into: str
    onto: str
    turned: bool

    @property
    def rows(self) -> str:
        """Letters of x that number its rows."""
        return "".join(c for c in self.x if c not in (self.expert, self.into))


def terms(equation: object, weight: int) -> Terms | None:
    """Those of ``equation`` with two factors, of which number ``weight`` (0 or 1) is the stack, experts first; None if it is no
    product by experts: each is one of the result's letters, and one letter is summed over."""
    if not isinstance(equation, str) or equation.count(",") != 1 or "->" not in equation or "." in equation:
        return None
    left, _, out = equation.replace(" ", "").partition("->")
    factors = left.split(",")
    w, x = factors[weight], factors[1 - weight]
    if len(w) != 3 or any(len(set(letters)) < len(letters) for letters in (w, x, out)):
        return None
    into = set(w[1:]) & set(x)
    onto = set(w[1:]) - into
    if len(into) != 1 or w[0] not in out or set(out) != (set(x) | set(w)) - into:
        return None
    return Terms(x, out, w[0], into.pop(), onto.pop(), turned=w[2] in x)
