"""The parts of a search: budgets, the exact choice, rules from choices, the candidates of a layer."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction
from typing import Any

import pytest

from qcompile.allocation.budget import BITS, BYTES, SECONDS, Budget
from qcompile.allocation.candidates import Layer, schemes_of
from qcompile.allocation.folding import policy_of
from qcompile.allocation.knapsack import smallest, solve
from qcompile.errors import BudgetError, PolicyError
from qcompile.formats import Scheme, get
from qcompile.plan import Site
from qcompile.policy import Policy


@pytest.mark.parametrize("text,unit,amount", [
    (2_100_000_000, BYTES, 2_100_000_000), ("2.1 GB", BYTES, 2_100_000_000), ("3MiB", BYTES, 3 << 20),
    ("4.25 bits", BITS, Fraction(17, 4)), (" .5 bits per weight", BITS, Fraction(1, 2)),
    ("1.2 ms", SECONDS, Fraction(12, 10_000)), ("7 µs", SECONDS, Fraction(7, 10**6)),
])  # fmt: skip
def test_budgets_are_read(text: Any, unit: str, amount: int | Fraction) -> None:
    assert Budget.parse(text) == Budget(unit, Fraction(amount))


@pytest.mark.parametrize("value", ["", "many", "4.25", "4 apples", "-3 GB", "0 bits", 0, -5, 2.5, True, None, "1e3 bits"])
def test_other_budgets_are_refused_with_the_units(value: Any) -> None:
    with pytest.raises(BudgetError, match="expected a positive whole number of bytes.*'4.25 bits'.*KiB"):
        Budget.parse(value)


def test_the_knapsack_is_solved_exactly() -> None:
    draw = random.Random(0)
    for _ in range(60):
        groups, size = draw.randint(1, 5), draw.randint(1, 4)
        costs = [[draw.randint(0, 50) for _ in range(size)] for _ in range(groups)]
        losses = [[draw.choice([0.0, 1e-9, draw.random()]) for _ in range(size)] for _ in range(groups)]
        limit = draw.randint(0, 50 * groups)
        found = solve(costs, losses, limit)
        every = [(sum(losses[g][i] for g, i in enumerate(picks)), sum(costs[g][i] for g, i in enumerate(picks)))
                 for picks in itertools.product(range(size), repeat=groups)]  # fmt: skip
        feasible = [loss for loss, cost in every if cost <= limit]
        assert (found is None) == (not feasible)
        if found is not None:
            assert found.cost <= limit and found.loss == pytest.approx(min(feasible), rel=1e-8, abs=1e-12)
            assert found.cost == sum(costs[g][i] for g, i in enumerate(found.chosen))


def test_a_model_of_hundreds_of_layers_is_solved_within_its_limit() -> None:
    draw = random.Random(1)
    costs, losses = [], []
    for _ in range(225):
        weights, hard = draw.choice([16, 4, 58]) * 2**20, draw.lognormvariate(-8, 1.5)
        costs.append([int(weights * b / 8) for b in (2.5, 3.4375, 4.25, 4.5, 5.5, 6.5, 8, 16)])
        losses.append([hard * 4 ** (2.5 - b) * draw.uniform(0.8, 1.2) for b in (2.5, 3.4375, 4.25, 4.5, 5.5, 6.5, 8)] + [0.0])
    limit = smallest(costs) * 17 // 10
    found = solve(costs, losses, limit)
    assert found is not None and 0.999 * limit < found.cost <= limit and found.gap < 1e-3


def sites(*names: str) -> list[Site]:
    roles = {name: frozenset({"lm_head"} if name.endswith("head") else ()) for name in names}
    return [Site(name, "linear", roles[name], shape=(8, 8), weight="w") for name in names]


def scheme(name: str | None) -> Scheme | None:
    return None if name is None else Scheme(get(name))


def test_equal_blocks_fold_into_a_pattern_after_the_exceptions() -> None:
    names = [f"model.layers.{i}.mlp.up" for i in range(12)]
    chosen = [(s, scheme("int8" if s.name.endswith("layers.1.mlp.up") else "int4_g64")) for s in sites(*names, "head")]
    policy = policy_of(chosen, "search")
    assert [r.pattern for r in policy.rules if "layers" in r.pattern] == ["model.layers.1.mlp.up", "model.layers.*.mlp.up"]
    assert len(policy.rules) == 3 and Policy.from_json(policy.to_json()) == policy


@pytest.mark.parametrize("names", [
    ("0", "blocks.0", "blocks.1", "deep.blocks.0"),  # a name is matched where it ends another's
    ("head", "deep.head", "h.0.head", "h.1.head", "lm_head"),  # and a name can be a role's
    ("l.0.a", "l.1.a", "l.2.a", "l.3.a", "l.0.b.0.a", "l.1.b.0.a"),  # "*" spans dots
    ("x[0]", "x[1]", "x*"),
])  # fmt: skip
def test_every_layer_gets_its_own_format_whatever_it_is_called(names: tuple[str, ...]) -> None:
    options = [scheme(n) for n in ("int4_g64", "int8", None)]
    for combination in itertools.product(options, repeat=len(names)):
        chosen = list(zip(sites(*names), combination, strict=True))
        rules = policy_of(chosen, "search").rules
        for site, wanted in chosen:
            assert next(r for r in rules if r.matches(site)).scheme == wanted


def test_layers_of_one_name_cannot_be_told_apart() -> None:
    a, b = sites("same", "same")
    with pytest.raises(PolicyError, match="no rules tell 'same' apart"):
        policy_of([(a, scheme("int8")), (b, scheme("int4_g64"))], "search")


def test_the_default_ladder_leaves_out_what_a_better_format_stores_in_no_more_bytes() -> None:
    def labels(width: int) -> list[str]:
        layer = Layer("weight", Site("layer", "linear", shape=(width, width), weight="w"), 4 * width * width)
        schemes = schemes_of(None, layer)
        assert [layer.nbytes(s) for s in schemes] == sorted({layer.nbytes(s) for s in schemes})
        return ["float" if s is None else s.format.name for s in schemes]

    assert labels(4096) == ["int2_g64", "Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "int6_g64", "Q6_K", "int8", "float"]
    assert "int3_g64" in labels(64) and "int5_g64" in labels(64)  # K-quants pad short rows
