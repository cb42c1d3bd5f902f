"""One candidate for each site, of least total loss, within a limit on the total cost: the multiple-choice knapsack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

GAP = 1e-9
"""Relative distance to the bound at which a solution counts as the optimum."""
FINE = 1e6
"""What both sums are scaled to, because HiGHS has absolute tolerances of 1e-6."""
PATIENCE = 60.0
"""Seconds after which the best solution so far is taken, with the gap that is left."""


@dataclass(frozen=True)
class Solution:
    """The index of each group's candidate, the sums, and how far ``loss`` can be above the optimum, relatively."""

    chosen: tuple[int, ...]
    cost: int
    loss: float
    gap: float


def smallest(costs: Sequence[Sequence[int]]) -> int:
    """The least total cost."""
    return sum(map(min, costs))


def solve(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], limit: int) -> Solution | None:
    """min Σ_i losses[i][c_i] subject to Σ_i costs[i][c_i] ≤ ``limit``, over one candidate c_i of each group i; None where no
    choice fits.

    As a mixed-integer program, x_ic ∈ {0, 1}, Σ_c x_ic = 1, solved by branch and bound (HiGHS through
    :func:`scipy.optimize.milp`). The solver computes in floating point: sums are recomputed in whole numbers, and a solution
    that is above the limit by the solver's tolerance is solved again under a limit lower by as much.
    """
    if smallest(costs) > limit:
        return None
    kept = [_undominated(c, v) for c, v in zip(costs, losses, strict=True)]
    tried = limit
    while True:
        picks, gap = _milp(costs, losses, kept, tried)
        cost = sum(c[i] for c, i in zip(costs, picks, strict=True))
        if cost <= limit:
            return Solution(tuple(picks), cost, sum(v[i] for v, i in zip(losses, picks, strict=True)), gap)
        tried = max(smallest(costs), tried - (cost - limit))


def _undominated(costs: Sequence[int], losses: Sequence[float]) -> list[int]:
    """Candidates that no other beats in both cost and loss, by rising cost; the first of equals."""
    found: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], losses[i])):
        if not found or losses[i] < losses[found[-1]]:
            found.append(i)
    return found


def _milp(
    costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], kept: Sequence[Sequence[int]], limit: int
) -> tuple[list[int], float]:
    """The candidates chosen and the relative gap. Costs count from the smallest choice."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    items = [(group, i) for group, indices in enumerate(kept) for i in indices]
    extra = np.array([costs[g][i] - min(costs[g]) for g, i in items], dtype=float)
    loss = np.array([losses[g][i] for g, i in items])
    room = limit - smallest(costs)
    fits = extra <= room
    worst = sum(max(losses[g][i] for i in indices) for g, indices in enumerate(kept))
    one_each = csr_array((np.ones(len(items)), ([g for g, _ in items], range(len(items)))), (len(kept), len(items)))
    unit = max(room, 1) / FINE
    found = milp(loss * (FINE / worst if worst else 1.0), integrality=np.ones(len(items)), bounds=Bounds(0, fits.astype(float)),
                 constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint((extra / unit)[None], -np.inf, room / unit)],
                 options={"mip_rel_gap": GAP, "time_limit": PATIENCE})  # fmt: skip
    if found.x is None:
        raise RuntimeError(f"scipy.optimize.milp found nothing within {PATIENCE:.0f} s for {len(kept)} layers and {len(items)} "
                           f"candidates: {found.message}")  # fmt: skip
    picks: list[int] = []
    for group in range(len(kept)):
        own = [(x, i) for x, (g, i) in zip(found.x, items, strict=True) if g == group]
        picks.append(max(own)[1])
    return picks, float(found.mip_gap)
