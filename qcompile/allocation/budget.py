"""Budgets: what a user writes, and the limit that it is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from ..errors import BudgetError

BYTES, BITS, SECONDS = "bytes", "bits per weight", "seconds"

_UNITS = {
    "B": (BYTES, Fraction(1)),
    **{f"{p}B": (BYTES, Fraction(1000) ** i) for i, p in enumerate("kMGT", 1)},
    **{f"{p}iB": (BYTES, Fraction(1024) ** i) for i, p in enumerate("KMGT", 1)},
    **{name: (BITS, Fraction(1)) for name in ("bit", "bits", "bits per weight")},
    "s": (SECONDS, Fraction(1)),
    "ms": (SECONDS, Fraction(1, 1000)),
    "µs": (SECONDS, Fraction(1, 10**6)),
    "us": (SECONDS, Fraction(1, 10**6)),
}
_WORDS = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-zµ ]+?)\s*")
TICKS = 10**12
"""Time is counted in picoseconds, so that every cost is a whole number."""


@dataclass(frozen=True)
class Budget:
    """``amount`` of a ``unit``. Bytes are of all parameters of the model; bits are those per weight of the layers that the
    search decides, scales and padding included; seconds are those of one token through these layers."""

    unit: str
    amount: Fraction

    @staticmethod
    def parse(value: object) -> Budget:
        """``2_100_000_000`` or ``"2.1 GB"``, ``"4.25 bits"``, ``"1.2 ms"``. Raises :class:`~qcompile.errors.BudgetError`."""
        if isinstance(value, Budget):
            return value
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return Budget(BYTES, Fraction(value))
        match = _WORDS.fullmatch(value) if isinstance(value, str) else None
        if match is None or match[2] not in _UNITS or not Fraction(match[1]):
            raise BudgetError(f"budget {value!r} ({type(value).__name__}): expected a positive whole number of bytes, or a text "
                              f"such as '2.1 GB', '4.25 bits' or '1.2 ms'; units are {', '.join(_UNITS)}")  # fmt: skip
        unit, factor = _UNITS[match[2]]
        return Budget(unit, Fraction(match[1]) * factor)

    def __str__(self) -> str:
        return shown(self.unit, self.amount)

    def limit(self, weights: int, other_bytes: int) -> int:
        """What the costs of the decided layers may add up to: bytes, or picoseconds. ``weights`` of these layers in all;
        ``other_bytes``: of all other parameters."""
        if self.unit == SECONDS:
            return int(self.amount * TICKS)
        return int(self.amount * weights / 8) if self.unit == BITS else int(self.amount) - other_bytes


def amount_of(unit: str, cost: int, weights: int, other_bytes: int) -> Fraction:
    """The smallest budget in ``unit`` whose :meth:`Budget.limit` is ``cost``."""
    if unit == SECONDS:
        return Fraction(cost, TICKS)
    return Fraction(8 * cost, weights) if unit == BITS else Fraction(cost + other_bytes)


def shown(unit: str, amount: Fraction | float) -> str:
    """``"4.250 bits per weight"``, ``"2,100,000,000 bytes"``, ``"1.200 ms"``."""
    if unit == SECONDS:
        return f"{float(amount) * 1e3:,.4g} ms"
    return f"{float(amount):.4g} {unit}" if unit == BITS else f"{float(amount):,.0f} {unit}"
