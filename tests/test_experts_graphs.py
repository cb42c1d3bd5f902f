"""How graphs multiply by experts: found, packed, compiled, saved and calibrated."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from graphs import only, roles, traced
from torch import nn
from torch._dynamo.utils import counters

import qcompile
from qcompile.plan import ROLES
from qcompile.tensor import QuantizedTensor

E = 4

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "one_thread")


class Mixture(nn.Module):
    """Experts as models write them: a router, a gated MLP of ``up`` and ``down``; [E, N, K], or [E, K, N] if ``turned``."""

    def __init__(self, way: str, turned: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way, self.turned = way, turned
        self.gate = nn.Linear(64, E, bias=False)
        shapes = [(E, 192, 64), (E, 64, 96)]
        dtype = torch.bfloat16 if way == "grouped" else torch.float32  # PyTorch compiles grouped products of no other
        self.gate_up_proj, self.down_proj = (
            nn.Parameter(torch.randn(e, *((k, n) if turned else (n, k))).mul(k**-0.5).to(dtype)) for e, n, k in shapes
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores, ids = self.gate(x).softmax(-1).topk(2)
        flat, tokens = ids.flatten(), torch.arange(len(x)).repeat_interleave(2)
        if self.way in ("all", "loop", "einsum"):
            mixed = torch.zeros(len(x), E).scatter(1, ids, scores)
            every = self._mlp(x.expand(E, *x.shape) if self.way == "all" else x, None)
            return torch.einsum("te,etk->tk", mixed, every)
        order = flat.argsort()
        chosen = order if self.way == "grouped" else slice(None)
        groups = (flat == torch.arange(E).unsqueeze(1)).sum(1).cumsum(0).int() if self.way == "grouped" else flat
        y = self._mlp(x[tokens[chosen]], groups) * scores.flatten()[chosen].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, tokens[chosen], y)

    def _mlp(self, x: torch.Tensor, groups: torch.Tensor | None) -> torch.Tensor:
        gate, up = self._product(x, self.gate_up_proj, groups).chunk(2, -1)
        return self._product(F.silu(gate) * up, self.down_proj, groups)

    def _product(self, x: torch.Tensor, w: torch.Tensor, groups: torch.Tensor | None) -> torch.Tensor:
        if self.way == "loop":
            each = list(x) if x.dim() == 3 else [x] * E
            return torch.stack([x @ w[i] if self.turned else F.linear(x, w[i]) for i, x in enumerate(each)])
        if self.way == "einsum":
            return torch.einsum("tk,ekn->etn" if x.dim() == 2 else "etk,ekn->etn", x, w if self.turned else w.mT)
        if groups is None:
            return torch.bmm(x, w if self.turned else w.transpose(1, 2))
        if self.way == "grouped":
            return torch._grouped_mm(x.to(w.dtype), w if self.turned else w.transpose(-2, -1), offs=groups).float()
        if self.turned:
            return torch.bmm(x.unsqueeze(1), w[groups]).squeeze(1)
        return torch.bmm(w[groups], x.unsqueeze(-1)).squeeze(-1)


WAYS = [(way, turned) for way in ("grouped", "chosen", "all", "loop", "einsum") for turned in (False, True)]


@pytest.mark.parametrize("way,turned", WAYS)
def test_experts_are_found_however_they_are_multiplied(way: str, turned: bool) -> None:
    sites = only(Mixture(way, turned), torch.randn(5, 64))
    up, down, gate = (sites[key] for key in (("gate_up_proj", "matmul"), ("down_proj", "matmul"), ("gate", "linear")))
    assert (up.shape, down.shape) == ((E, 192, 64), (E, 64, 96)) and up.transposed == down.transposed == turned
    assert up.unsupported is None and down.unsupported is None
    rows = 5 * (2 if way in ("grouped", "chosen") else E)
    assert (up.flops, down.flops) == (2 * rows * 192 * 64, 2 * rows * 64 * 96)
    assert set(gate.roles) == {"router"}
    if way != "loop":
        assert roles(sites) == {"gate_up_proj": set(ROLES[4:6]), "down_proj": {ROLES[6]}, "gate": {"router"}}


CASES = [(way, turned, policy) for way, turned in WAYS for policy in ("int4", "int8_dynamic")]
CASES += [(way, turned, policy) for way, turned in WAYS[:4] for policy in ("int8", "nf4", "Q4_K")]
"""The ways differ in their graphs, which two schemes show."""


@pytest.mark.parametrize("way,turned,policy", CASES)
def test_compiled_and_eager_experts_are_those_of_the_decoded_weights(way: str, turned: bool, policy: str) -> None:
    model = Mixture(way, turned).eval()
    decoded = copy.deepcopy(model)
    compiled = torch.compile(model, backend="qcompile", options={"policy": policy, "strict": True})
    prompt, token = torch.randn(9, 64), torch.randn(1, 64)
    results = [compiled(prompt), compiled(token)]
    packed = {n: p for n, p in model.named_parameters() if isinstance(p, QuantizedTensor)}
    assert set(packed) == {"gate_up_proj", "down_proj"}
    for name, weight in packed.items():
        decoded.get_parameter(name).copy_(weight.dequantize())
    results += [model(prompt), model(token)]
    for result, x in zip(results, [prompt, token] * 2, strict=True):
        limit = 3e-2 if policy == "int8_dynamic" else 1e-2 if way == "grouped" else 1e-5
        assert (result - decoded(x)).norm() <= limit * decoded(x).norm()


def test_one_graph_serves_any_number_of_tokens() -> None:
    model = Mixture("chosen").eval()
    compiled = torch.compile(model, backend="qcompile", options={"policy": "int8"}, dynamic=True)
    counters.clear()
    for tokens in (5, 9, 33, 2):
        x = torch.randn(tokens, 64)
        assert torch.allclose(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize("way", ["grouped", "chosen", "all", "loop", "einsum"])
def test_packed_experts_are_exported(way: str) -> None:
    model, x = Mixture(way).eval(), torch.randn(5, 64)
    qcompile.quantize_(model, x, policy="int4")
    program = torch.export.export(model, (x,), strict=False)
    called = [str(n.target) for n in program.graph.nodes if "qcompile" in str(n.target)]
    assert called == (["qcompile.linear.default"] * 2 * E if way == "loop" else ["qcompile.grouped_linear.default"] * 2)
    assert torch.equal(program.module()(x), model(x))


def test_a_rule_may_name_the_router() -> None:
    plan = qcompile.explain(Mixture("grouped"), torch.randn(5, 64), policy={"role:router": "int8", "*": "int4"}).plan
    assert {r.decision.site.name: r.decision.scheme and r.decision.scheme.label for r in plan} == {
        "gate": "int8", "gate_up_proj": "int4_g128", "down_proj": "int4_g128"
    }  # fmt: skip


class Odd(nn.Module):
    """Experts that are also used otherwise, each in its own way."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("summed", "both", "halved", "wide", "sliced"):
            setattr(self, name, nn.Parameter(torch.randn(E, 64, 64)))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        every, ids = x.expand(E, *x.shape), torch.tensor([0, 1])
        return [
            torch.bmm(every, self.summed),
            self.summed.sum(),
            torch.bmm(every, self.both),
            torch.bmm(every, self.both.mT),
            torch.bmm(every, self.halved),
            F.linear(x, self.halved[0] / 2),
            torch.bmm(every, self.wide),
            x[None, None] @ self.wide,
            torch.bmm(every[:2], self.sliced[ids]),
            self.sliced[:, ids],
        ]


def test_experts_that_cannot_be_packed_say_why() -> None:
    (sites,) = traced(Odd().eval(), torch.randn(3, 64))
    reasons: dict[str, str] = {}
    for site in sites:
        if site.weight is not None:
            reasons[site.name] = reasons.get(site.name, "") + (site.unsupported or "packed")
    assert "sum (sum_1) takes no packed experts" in reasons["summed"]
    assert reasons["both"] == "the weight is used both as it is and transposed"
    assert "takes no packed expert" in reasons["halved"] and "div" in reasons["halved"]
    assert "matmul" in reasons["wide"] and "takes no packed experts" in reasons["wide"]
    assert "getitem" in reasons["sliced"] and "takes no packed experts" in reasons["sliced"]


def test_experts_are_saved_and_loaded(tmp_path: Path) -> None:
    model, x = Mixture("chosen", turned=True).eval(), torch.randn(3, 64)
    qcompile.quantize_(model, x, policy="Q4_K")
    wanted = model(x)
    file = qcompile.save(model, tmp_path / "model.safetensors")
    loaded = qcompile.load(file, Mixture("chosen", turned=True).eval())
    assert isinstance(loaded.gate_up_proj, QuantizedTensor) and torch.equal(loaded(x), wanted)


def test_calibration_rounds_experts_to_nearest_and_says_so() -> None:
    model, x = Mixture("grouped").eval(), torch.randn(16, 64)
    found = qcompile.calibrate(model, [x], policy="int4")
    assert "few of the experts" in found.weights["down_proj"].note and found.weights["down_proj"].packed is None
    torch.compile(model, backend="qcompile", options={"policy": found})(x)
    assert isinstance(model.down_proj, QuantizedTensor)
