"""Every matrix of every architecture is quantized or says why; decoders compute nearly all of their linear layers packed.

Every run looks at two thirds of the zoo, ``QCOMPILE_TEST_EVERYTHING=1`` at all of it. The shares are printed after the tests.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from zoo import ANIMALS, TOKENS, VOCABULARY, WIDTH

import qcompile
from qcompile.plan import Plan, Record

CHOSEN = [n for n, a in ANIMALS.items() if a.in_ci or "QCOMPILE_TEST_EVERYTHING" in os.environ]
UNREACHED = {"embeddings.mask_token"}
"""Parameters that the call does not use."""

UNPACKED = {f"backbone.layers.{i}.mixer.dt_proj" for i in range(2)}
"""Linear modules of which a model uses the weight otherwise than as a linear layer does: Mamba multiplies by it from the left."""

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "one_thread")


def plan_of(name: str) -> tuple[torch.nn.Module, Plan]:
    model = ANIMALS[name].make().eval()
    return model, qcompile.explain(model, **ANIMALS[name].inputs(), policy="int8").plan


@pytest.mark.parametrize("name", CHOSEN)
def test_every_matrix_is_quantized_or_says_why(name: str, record_property: Callable[[str, object], None]) -> None:
    model, plan = plan_of(name)
    said: dict[str | None, list[Record]] = defaultdict(list)
    for record in plan:
        assert (record.decision.scheme is None) == bool(record.decision.reason), record
        said[record.decision.site.parameter].append(record)
    matrices = {n for n, p in model.named_parameters() if p.dim() >= 2}
    assert matrices and matrices <= set(said)
    unreached = {n for n in matrices if any("no graph used" in (r.decision.reason or "") for r in said[n])}
    assert unreached <= UNREACHED
    linears = {f"{n}.weight" for n, m in model.named_modules() if type(m) is torch.nn.Linear} & matrices
    meant = [r for n in linears for r in said[n] if r.decision.site.is_linear]
    assert len(meant) >= len(linears) and all(r.decision.scheme or r.decision.site.unsupported for r in meant)
    assert {d.site.name for r in meant if (d := r.decision).scheme is None} <= UNPACKED
    totals = plan.totals()
    record_property("zoo", f"{name:<28}{ANIMALS[name].kind:<20}{totals.flops_share:7.2%} of {totals.flops / 1e6:9.2f} MFLOP")
    if ANIMALS[name].kind in ("decoder", "mixture of experts"):
        assert totals.flops_share >= 0.99


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "bert", "t5", "swin"])
def test_flops_are_those_that_pytorch_counts(name: str) -> None:
    model, plan = plan_of(name)
    with FlopCounterMode(display=False) as counter:
        model(**ANIMALS[name].inputs())
    counted = counter.get_flop_counts()["Global"]
    assert plan.totals().flops == sum(counted.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))


def test_experts_count_as_linear_layers() -> None:
    """Two of four experts for each token; routers stay as they are."""
    _, plan = plan_of("mixtral")
    experts = [r.decision for r in plan if "experts" in r.decision.site.name]
    assert [d.site.shape for d in experts] == [(4, 2 * 96, WIDTH), (4, WIDTH, 96)] * 2 and all(d.scheme for d in experts)
    assert sum(d.site.flops for d in experts) == 2 * 2 * TOKENS * 2 * (3 * 96) * WIDTH
    routers = [r.decision for r in plan if "router" in r.decision.site.roles]
    assert [d.site.name for d in routers] == [f"model.layers.{i}.mlp.gate" for i in range(2)]
    assert all(d.scheme is None and d.rule == "preset int8 (router)" for d in routers)
    (head,) = (r.decision for r in plan if r.decision.site.name == "lm_head")
    assert head.site.flops == 2 * TOKENS * WIDTH * VOCABULARY


def test_sites_know_their_lines() -> None:
    _, plan = plan_of("llama")
    lines = {r.decision.site.name: r.decision.site.source for r in plan}
    path, line = lines["model.layers.1.mlp.down_proj"].rsplit(":", 1)
    with open(path) as file:
        assert "self.down_proj(" in file.read().splitlines()[int(line) - 1]
