"""What a search found."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..policy import Policy
from .budget import Budget
from .folding import policy_of
from .knapsack import Solution
from .table import Point, Table


@dataclass(frozen=True)
class Choice:
    """One layer as a rule names it, its format's label or "float", stored bytes, bits per weight, and the loss it adds alone."""

    layer: str
    format: str
    nbytes: int
    bits: float
    loss: float


@dataclass(frozen=True)
class Search:
    """The choice of formats with the least sum of losses within a ``budget``.

    ``choices``: every layer, in the model's order; ``policy``: the same as rules, to compile with; ``point``: its cost, bytes of
    all parameters, bits per weight of these layers, and the predicted loss, which is the sum of losses that were measured one
    layer at a time. ``measured``: the loss of all choices together (None: not measured). ``gap``: how far the sum can be above
    the optimum, relatively; 0 where the solver proved it. ``front``: the best for a ladder of budgets. ``table``: all that was
    measured.
    """

    budget: Budget
    choices: tuple[Choice, ...]
    policy: Policy
    point: Point
    measured: float | None
    gap: float
    front: tuple[Point, ...]
    table: Table

    @staticmethod
    def of(table: Table, budget: Budget, solution: Solution, front: tuple[Point, ...], measured: float | None) -> Search:
        chosen = [row[i] for row, i in zip(table.candidates, solution.chosen, strict=True)]
        sites = [layer.site for layer in table.layers]
        choices = tuple(Choice(layer.site.name, c.label, c.nbytes, 8 * c.nbytes / layer.weights, c.loss)
                        for layer, c in zip(table.layers, chosen, strict=True))  # fmt: skip
        policy = policy_of(list(zip(sites, (c.scheme for c in chosen), strict=True)), f"search ({budget})")
        return Search(budget, choices, policy, table.point(solution, budget.unit), measured, solution.gap, front, table)

    def at(self, budget: object) -> Search:
        """The best choice within another budget by what was measured already; its total is not measured.

        Raises :class:`~qcompile.errors.BudgetError`.
        """
        wanted = Budget.parse(budget)
        front = self.front if wanted.unit == self.budget.unit else self.table.front(wanted.unit)
        return Search.of(self.table, wanted, self.table.best(wanted), front, None)

    @property
    def measure(self) -> str:
        return self.table.measure

    def as_dict(self) -> dict[str, Any]:
        """JSON types; ``policy`` is what :meth:`qcompile.Policy.from_json` reads."""
        rows = zip(self.table.layers, self.table.candidates, strict=True)
        return {
            "budget": {"unit": self.budget.unit, "amount": float(self.budget.amount)},
            "measure": self.measure,
            "chosen": {**asdict(self.point), "measured": self.measured, "gap": self.gap},
            "choices": [asdict(c) for c in self.choices],
            "policy": self.policy.as_dict(),
            "front": [asdict(p) for p in self.front],
            "uniform": {label: asdict(p) for label, p in self.table.uniform().items()},
            "sensitivities": {
                layer.site.name: {c.label: {"nbytes": c.nbytes, "loss": c.loss} for c in row} for layer, row in rows
            },
        }

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=1)

    def save(self, path: str | Path) -> Path:
        """Writes :meth:`to_json`; returns the file's path."""
        made = Path(path)
        made.write_text(self.to_json() + "\n", encoding="utf-8")
        return made

    def plot(self, path: str | Path) -> Path:
        """Draws front, uniform formats and the choice into ``path`` (.png, .svg, .pdf); returns it. Raises ImportError without
        matplotlib."""
        from .plot import draw

        return draw(self, Path(path))

    def __str__(self) -> str:
        from ..report.search_table import text

        return text(self)
