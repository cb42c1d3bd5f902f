"""What was measured of every layer in every candidate, and the best choices within a limit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from ..errors import BudgetError
from ..formats import Scheme
from .budget import BITS, BYTES, SECONDS, TICKS, Budget, amount_of, shown
from .candidates import FLOAT, Layer
from .knapsack import Solution, smallest, solve

POINTS = 24
"""Budgets of a front, spaced geometrically."""


@dataclass(frozen=True)
class Candidate:
    """A ``scheme`` (None: float) for one layer: stored bytes, the ``loss`` when this layer alone has it, and seconds of one token
    through it (None: not asked for)."""

    scheme: Scheme | None
    nbytes: int
    loss: float
    seconds: float | None = None

    @property
    def label(self) -> str:
        return FLOAT if self.scheme is None else self.scheme.label


@dataclass(frozen=True)
class Point:
    """The best choice within one budget: its cost as an ``amount`` of the budget's unit, bytes of all parameters, bits per weight
    of the decided layers, and the sum of the layers' losses."""

    amount: float
    nbytes: int
    bits: float
    predicted: float


@dataclass(frozen=True)
class Table:
    """``candidates`` of each of the ``layers``; ``other_bytes`` are those of all other parameters; ``measure`` says what losses
    are."""

    layers: tuple[Layer, ...]
    candidates: tuple[tuple[Candidate, ...], ...]
    other_bytes: int
    measure: str

    @property
    def weights(self) -> int:
        return sum(layer.weights for layer in self.layers)

    def costs(self, unit: str) -> list[list[int]]:
        """Bytes of every candidate, or picoseconds. Raises :class:`~qcompile.errors.BudgetError` where no times were taken."""
        if unit != SECONDS:
            return [[c.nbytes for c in row] for row in self.candidates]
        if any(c.seconds is None for row in self.candidates for c in row):
            raise BudgetError("a budget of seconds, but this search took no times; search again with it: losses are kept")
        return [[round((c.seconds or 0.0) * TICKS) for c in row] for row in self.candidates]

    def best(self, budget: Budget) -> Solution:
        """Raises :class:`~qcompile.errors.BudgetError` with the smallest budget that can be met."""
        costs = self.costs(budget.unit)
        found = solve(costs, self.losses, budget.limit(self.weights, self.other_bytes))
        if found is not None:
            return found
        least = amount_of(budget.unit, smallest(costs), self.weights, self.other_bytes)
        other = f", {self.other_bytes:,} bytes of them in parameters that stay as they are" if budget.unit == BYTES else ""
        raise BudgetError(f"budget {budget} cannot be met: the smallest choice for all {len(self.layers)} layers takes "
                          f"{_above(budget.unit, least)}{other}; raise the budget, or allow smaller formats")  # fmt: skip

    @property
    def losses(self) -> list[list[float]]:
        return [[c.loss for c in row] for row in self.candidates]

    def point(self, solution: Solution, unit: str) -> Point:
        nbytes = sum(row[i].nbytes for row, i in zip(self.candidates, solution.chosen, strict=True))
        amount = amount_of(unit, solution.cost, self.weights, self.other_bytes)
        return Point(float(amount), nbytes + self.other_bytes, 8 * nbytes / self.weights, solution.loss)

    def front(self, unit: str) -> tuple[Point, ...]:
        """Best choices for :data:`POINTS` budgets from the smallest to that of the largest packed candidates, and for none that
        binds: loss falls as cost rises."""
        costs, losses = self.costs(unit), self.losses
        low, most = smallest(costs), sum(map(max, costs))
        packed = [[c for c, candidate in zip(row, own, strict=True) if candidate.scheme is not None]
                  for row, own in zip(costs, self.candidates, strict=True)]  # fmt: skip
        high = max(low, sum(max(own, default=min(row)) for own, row in zip(packed, costs, strict=True)))
        ratio = (high / low) ** (1 / (POINTS - 1)) if low else 1.0
        limits = [low, *(math.floor(low * ratio**i) for i in range(1, POINTS - 1)), high, most]
        points: list[Point] = []
        for limit in sorted({max(low, limit) for limit in limits}):
            found = solve(costs, losses, limit)
            assert found is not None
            if not points or found.loss < points[-1].predicted:
                points.append(self.point(found, unit))
        return tuple(points)

    def uniform(self) -> dict[str, Point]:
        """Every format that all layers have, used for all of them, by label."""
        rows = [{c.label: c for c in row} for row in self.candidates]
        common = [label for label in rows[0] if all(label in row for row in rows)]
        found = {}
        for label in common:
            nbytes = sum(row[label].nbytes for row in rows)
            bits = 8 * nbytes / self.weights
            found[label] = Point(bits, nbytes + self.other_bytes, bits, sum(row[label].loss for row in rows))
        return found


def _above(unit: str, amount: Fraction) -> str:
    """Rounded up to what, written as a budget, can be met."""
    if unit == BITS:
        return f"{math.ceil(amount * 1000) / 1000} bits per weight"
    return shown(unit, amount) if unit == BYTES else f"{math.ceil(amount * 10**6) / 1000} ms"
