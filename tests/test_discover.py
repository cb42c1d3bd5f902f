"""Discovery over graphs made for one question each."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graphs import only, roles, traced
from torch import nn

from qcompile.passes.discover import discover
from qcompile.plan import ROLES


class Block(nn.Module):
    """One attention with a cache that is written in place, and a gated MLP, under unusual names."""

    def __init__(self, write: str = "index_copy", broken: bool = False, usual: bool = False) -> None:
        super().__init__()
        names = (
            ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
            if usual
            else list("abcdefg")
        )
        self.names, self.write, self.broken = names, write, broken
        for name in names:
            self.add_module(name, nn.Linear(16, 16, bias=False))
        self.register_buffer("kept", torch.zeros(2, 1, 2, 8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b, c, d, e, f, g = (getattr(self, n) for n in self.names)
        q, k, v = (p(x).view(1, -1, 2, 8).transpose(1, 2) for p in (a, b, c))
        keys, values = self.kept[0], self.kept[1]
        at = torch.arange(x.shape[1])
        if self.write == "index_copy":
            keys.index_copy_(2, at, k)
            values.index_copy_(2, at, v)
        elif self.write == "setitem":
            keys[:, :, at] = k
            values[:, :, at] = v
        else:
            keys[:, :, : x.shape[1]].copy_(k)
            values[:, :, : x.shape[1]].copy_(v)
        if self.broken:
            torch._dynamo.graph_break()
        y = F.scaled_dot_product_attention(q, keys, values)
        if self.broken:
            torch._dynamo.graph_break()
        x = x + d(y.transpose(1, 2).reshape(1, -1, 16))
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x + g(F.silu(e(x)) * f(x))


ROLES_OF_BLOCK = dict(zip("abcdefg", ({r} for r in ROLES[:7]), strict=True))


@pytest.mark.parametrize("write", ["index_copy", "setitem", "copy"])
def test_projections_are_seen_through_cache_writes(write: str) -> None:
    assert roles(only(Block(write), torch.zeros(1, 3, 16))) == ROLES_OF_BLOCK


@pytest.mark.parametrize("usual", [True, False])
def test_graph_breaks_leave_names_only_where_the_edge_is_cut(usual: bool) -> None:
    graphs = traced(Block(broken=True, usual=usual).eval(), torch.zeros(1, 3, 16))
    assert len(graphs) == 3
    found = {s.name: set(s.roles) for sites in graphs for s in sites if s.is_linear}
    if usual:
        assert found == {r.split(".")[1]: {r} for r in ROLES[:7]}
    else:
        assert found == {n: (set() if n in "abcd" else r) for n, r in ROLES_OF_BLOCK.items()}


class Matmuls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(8, 16)) for _ in range(8))
        self.turned = nn.ParameterList(nn.Parameter(torch.zeros(16, 8)) for _ in range(4))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        w, t = self.weights, self.turned
        return [
            x @ w[0].T,
            torch.matmul(x, w[1].t()),
            x @ w[2].mT,
            x @ w[3].transpose(0, 1),
            x @ w[4].permute(1, 0),
            x[0].mm(w[5].transpose(-1, -2)),
            F.linear(x, w[6].detach()),
            x.matmul(other=w[7].T),
            x @ t[0],
            torch.matmul(x, t[1]),
            F.linear(x, t[2].t()),
            torch.addmm(x[0, 0, 0], x[0], t[3]),
        ]


def test_transposes_of_a_parameter_are_folded() -> None:
    sites = only(Matmuls(), torch.zeros(1, 3, 16))
    assert len(sites) == 12
    for site in sites.values():
        assert site.shape == (8, 16) and site.unsupported is None and site.is_linear
        assert site.transposed == site.name.startswith("turned"), site


class Odd(nn.Module):
    """Weights that cannot be packed, each in its own way."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {
            "cast": (8, 16),
            "sliced": (8, 16),
            "summed": (8, 16),
            "left": (4, 3),
            "cube": (2, 16, 8),
            "scaled": (16, 8),
            "both": (16, 16),
            "einsummed": (8, 16),
        }
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))
        self.conv = nn.Conv1d(3, 3, 3)
        self.table = nn.Embedding(7, 16, max_norm=1.0)
        self.mha, self.crossed = (nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(2))
        self.longer = nn.MultiheadAttention(16, 2, batch_first=True, add_bias_kv=True)
        self.experts = nn.Parameter(torch.zeros(2, 16, 8))

    def forward(self, x: torch.Tensor, i: torch.Tensor) -> list[torch.Tensor]:
        return [
            F.linear(x, self.cast.to(torch.float64).to(x.dtype)),
            F.linear(x, self.sliced[:4]),
            F.linear(x, self.summed),
            self.summed.sum(),
            self.left @ x[0],
            x[None] @ self.cube,
            torch.addmm(x[0, 0, :8], x[0], self.scaled, alpha=2),
            F.linear(x, self.both),
            x @ self.both,
            torch.einsum("bsk,nk->bsn", x, self.einsummed),
            self.conv(x),
            self.table(i),
            self.mha(x, x, x)[0],
            self.crossed(x, x + 1, x + 1)[0],
            self.longer(x, x, x)[0],
            torch.baddbmm(x.new_zeros(1), x.expand(2, -1, -1), self.experts),
            F.linear(x, x[0]),
            x @ x.mT,
        ]


def test_weights_that_cannot_be_packed_say_why() -> None:
    (sites,) = traced(Odd().eval(), torch.zeros(1, 3, 16), torch.zeros(1, 2, dtype=torch.long))
    reasons = {(s.name, s.operator): s.unsupported or "" for s in sites}
    expected = {
        ("cast", "linear"): "not by the weight",
        ("sliced", "linear"): "(getitem of the weight)",
        ("summed", "linear"): "also used by",
        ("summed", "other"): "sum",
        ("left", "matmul"): "elsewhere than as its right factor",
        ("cube", "matmul"): "3 dimensions",
        ("scaled", "addmm"): "alpha=2",
        ("both", "linear"): "as it is and transposed",
        ("both", "matmul"): "as it is and transposed",
        ("einsummed", "matmul"): "einsum",
        ("conv", "other"): "conv1d",
        ("table", "embedding"): "max_norm",
        ("mha.in_proj_weight", "linear"): "",
        ("mha.out_proj", "linear"): "",
        ("crossed.in_proj_weight", "linear"): "different inputs by slices",
        ("crossed.out_proj", "linear"): "",
        ("longer.in_proj_weight", "linear"): "adds rows",
        ("longer.out_proj", "linear"): "adds rows",
        ("longer.bias_k", "other"): "multi_head_attention_forward",
        ("longer.bias_v", "other"): "multi_head_attention_forward",
        ("experts", "matmul"): "baddbmm",
    }
    for key, words in expected.items():
        assert words in reasons.pop(key), key
    for name in ("mha", "crossed", "longer"):
        assert "multi_head_attention_forward has no kernel" in reasons.pop((name, "attention"))
    operators = {operator: words for (_, operator), words in reasons.items()}
    assert len(reasons) == 2 and operators["matmul"] == "both factors are activations"
    assert "not a parameter" in operators["linear"]


def test_attributes_that_are_returned_or_unused_say_so() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.given = nn.Linear(16, 8), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return F.linear(x, self.used.weight), F.linear(x, self.given.weight), self.given.weight

    model = Model()
    gm = torch.fx.symbolic_trace(model)
    with gm.graph.inserting_before():
        gm.graph.get_attr("used.weight", torch.Tensor)
    sites = discover(gm, [torch.zeros(2, 16)], lambda t: None)
    reasons = {(s.name, s.operator): s.unsupported for s in sites}
    assert reasons["used", "linear"] is None
    assert reasons["used", "other"] == "nothing in this graph uses the weight"
    assert reasons["given", "other"] == "the weight is an output of the graph"
    assert "also used by output" in (reasons["given", "linear"] or "")


class Lookalikes(nn.Module):
    """Structures that resemble attention and MLPs: a router's softmax, a scan's projections, a pooler and a
    classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(16, 16), nn.Linear(16, 16)
        self.router, self.expert = nn.Linear(16, 16), nn.Linear(16, 16)
        self.pooler, self.classifier = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.out_proj(self.in_proj(x).cumsum(1))
        x = x + self.router(x).softmax(-1) * self.expert(x)
        return self.classifier(torch.tanh(self.pooler(x[:, 0])))


def test_lookalikes_have_no_roles() -> None:
    sites = only(Lookalikes(), torch.zeros(1, 3, 16))
    assert roles(sites) == {} and {s.operator for s in sites.values()} == {"linear"}


def test_a_layer_called_again_is_one_site_and_two_tied_layers_are_two() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.one, self.two = (nn.Linear(16, 16, bias=False) for _ in range(3))
            self.two.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                x = torch.sin(self.shared(x))
            return self.two(torch.cos(self.one(x)))

    sites = only(Model(), torch.zeros(2, 16))
    assert {n for n, _ in sites} == {"shared", "one", "two"}
    assert (
        sites["one", "linear"].storage == sites["two", "linear"].storage != sites["shared", "linear"].storage
    )


def test_two_layer_mlp() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    assert roles(only(model, torch.zeros(2, 8))) == {
        "0": {"mlp.gate_proj", "mlp.up_proj"},
        "2": {"mlp.down_proj"},
    }


def test_dynamic_dimensions_are_minus_one() -> None:
    class Attend(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    (site,) = only(Attend(), torch.zeros(3, 2, 5, 8), dynamic=True).values()
    assert site.shape == (-1, -1, -1, -1) and site.operator == "attention" and site.nbytes == 0


@pytest.mark.parametrize("lifted", [True, False])
def test_exported_programs(lifted: bool) -> None:
    """Parameters as placeholders of the exported graph, and as attributes of its module."""
    model = Block("index_copy").eval()
    with torch.no_grad():
        program = torch.export.export(model, (torch.zeros(1, 3, 16),))
    if lifted:
        gm = program.graph_module
        state = {**dict(program.named_parameters()), **dict(program.named_buffers())}
        targets = {s.arg.name: s.target for s in program.graph_signature.input_specs if s.target is not None}
        examples = [
            state.get(targets.get(n.name, ""), n.meta.get("val"))
            for n in gm.graph.nodes
            if n.op == "placeholder"
        ]
    else:
        gm, examples = program.module(), [torch.zeros(1, 3, 16)]
        state = dict(gm.named_parameters())
    names = {id(t): n for n, t in state.items() if isinstance(t, nn.Parameter)}
    sites = discover(gm, examples, lambda t: names.get(id(t)))
    assert {s.name: set(s.roles) for s in sites if s.is_linear} == ROLES_OF_BLOCK
    assert all(s.parameter == f"{s.name}.weight" and s.unsupported is None for s in sites if s.is_linear)
