"""Discovery over Dynamo's graphs of small models of real architectures, and over graphs made for one question each."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from qcompile.passes.discover import discover
from qcompile.plan import ROLES, Site
from torch import nn

ATTENTION = ROLES[:4]
DENSE = dict.fromkeys(["vocab_size"], 96) | dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64
)
DECODER = DENSE | dict(num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
GPT2 = dict(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
OPT = dict(vocab_size=96, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
           max_position_embeddings=64, word_embed_proj_dim=32)  # fmt: skip
T5 = dict(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
VIT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8,
           num_labels=40)  # fmt: skip

ZOO: dict[str, tuple[str, dict[str, object], int, int, int]] = {
    "llama": ("LlamaForCausalLM", DECODER, 2, 1, 1),
    "qwen3": ("Qwen3ForCausalLM", DECODER | {"head_dim": 8}, 2, 1, 1),
    "gemma2": ("Gemma2ForCausalLM", DECODER | {"head_dim": 8}, 2, 1, 1),
    "phi3": ("Phi3ForCausalLM", DECODER, 2, 1, 1),
    "gpt2": ("GPT2LMHeadModel", GPT2, 2, 1, 1),
    "opt": ("OPTForCausalLM", OPT, 2, 1, 1),
    "gpt_neox": ("GPTNeoXForCausalLM", DENSE, 2, 1, 1),
    "bert": ("BertForMaskedLM", DENSE, 2, 1, 1),
    "vit": ("ViTForImageClassification", VIT, 2, 0, 0),
    "t5": ("T5ForConditionalGeneration", T5, 3, 2, 1),
    "t5_gated": ("T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu"}, 3, 2, 1),
}
"""Class, config, and how many attentions, token embeddings and language-model heads it has."""


def traced(model: nn.Module, *args: object, dynamic: bool | None = None, **kwargs: object) -> list[list[Site]]:
    """Sites of every graph that Dynamo makes of one call."""
    names = {id(p): n for n, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
    found: list[list[Site]] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[object]) -> Callable[..., object]:
        before = str(gm.graph)
        found.append(discover(gm, example_inputs, lambda t: names.get(id(t))))
        assert str(gm.graph) == before
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=dynamic)(*args, **kwargs)
    return found


def only(model: nn.Module, *args: object, **kwargs: object) -> dict[tuple[str, str], Site]:
    """Sites of the one graph of a call, by name and operator; no two have the same."""
    (sites,) = traced(model.eval(), *args, **kwargs)
    assert len({s.key for s in sites}) == len(sites)
    return {s.key: s for s in sites}


def build(name: str, attention: str = "sdpa") -> nn.Module:
    import transformers

    class_name, config, *_ = ZOO[name]
    made = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = made(made.config_class(**config, attn_implementation=attention))
    return model.eval()


def inputs(name: str) -> dict[str, torch.Tensor]:
    ids = torch.arange(6).reshape(1, 6) + 5
    if name == "vit":
        return {"pixel_values": torch.zeros(1, 3, 16, 16)}
    return {"input_ids": ids, "decoder_input_ids": ids} if name.startswith("t5") else {"input_ids": ids}


@functools.lru_cache(maxsize=None)
def zoo(name: str) -> dict[tuple[str, str], Site]:
    return only(build(name), **inputs(name))


def roles(sites: dict[tuple[str, str], Site]) -> dict[str, set[str]]:
    return {s.name: set(s.roles) for s in sites.values() if s.roles}


@pytest.mark.parametrize("name", ZOO)
def test_every_attention_and_mlp_has_all_its_roles(name: str) -> None:
    """A role for each attention and each MLP, no more and no less, whether layers are fused or not."""
    sites = zoo(name)
    _, _, attentions, embeddings, heads = ZOO[name]
    mlps = 2 if name.startswith("t5") else attentions
    counted = Counter(role for site in sites.values() for role in site.roles)
    expected = [attentions] * 4 + [mlps] * 3 + [embeddings, heads]
    assert counted == {role: n for role, n in zip(ROLES, expected, strict=True) if n}
    assert sum(s.operator == "attention" for s in sites.values()) == attentions
    assert all(s.unsupported is None for s in sites.values() if s.is_linear)


@pytest.mark.parametrize("name", ZOO)
def test_every_matrix_is_reported(name: str) -> None:
    model, sites = build(name), zoo(name)
    reported = {s.parameter for s in sites.values()}
    matrices = {n: p for n, p in model.named_parameters() if p.dim() >= 2}
    assert set(matrices) <= reported
    for site in sites.values():
        if site.is_linear and site.parameter in matrices:
            shape = tuple(matrices[site.parameter].shape)
            assert site.shape == (shape[::-1] if site.transposed else shape)


def test_llama_roles_are_exact() -> None:
    layer = {f"self_attn.{x}_proj": {f"attention.{x}_proj"} for x in "qkvo"}
    layer |= {f"mlp.{x}_proj": {f"mlp.{x}_proj"} for x in ("gate", "up", "down")}
    expected = {f"model.layers.{i}.{n}": r for i in range(2) for n, r in layer.items()}
    assert roles(zoo("llama")) == expected | {"model.embed_tokens": {"embed_tokens"}, "lm_head": {"lm_head"}}
    attention = zoo("llama")["model.layers.1.self_attn", "attention"]
    assert attention.shape == (1, 4, 6, 8) and attention.weight is None


def test_gpt2_is_transposed_fused_and_tied() -> None:
    sites, found = zoo("gpt2"), roles(zoo("gpt2"))
    block = "transformer.h.0"
    assert found[f"{block}.attn.c_attn"] == set(ATTENTION[:3])
    assert found[f"{block}.attn.c_proj"] == {"attention.o_proj"}
    assert found[f"{block}.mlp.c_fc"] == {"mlp.gate_proj", "mlp.up_proj"}
    assert found[f"{block}.mlp.c_proj"] == {"mlp.down_proj"}
    assert "transformer.wpe" not in found
    fused = sites[f"{block}.attn.c_attn", "addmm"]
    assert fused.shape == (96, 32) and fused.transposed
    head, table = sites["lm_head", "linear"], sites["transformer.wte", "embedding"]
    assert head.weight == table.weight and head.storage == table.storage and not head.transposed


def test_phi3_fuses_qkv_and_gate_up() -> None:
    found = roles(zoo("phi3"))
    assert found["model.layers.1.self_attn.qkv_proj"] == set(ATTENTION[:3])
    assert found["model.layers.1.mlp.gate_up_proj"] == {"mlp.gate_proj", "mlp.up_proj"}


def test_bert_roles_without_usual_names() -> None:
    found = roles(zoo("bert"))
    layer = "bert.encoder.layer.1"
    assert found[f"{layer}.attention.output.dense"] == {"attention.o_proj"}
    assert found[f"{layer}.intermediate.dense"] == {"mlp.gate_proj", "mlp.up_proj"}
    assert found[f"{layer}.output.dense"] == {"mlp.down_proj"}
    assert "cls.predictions.transform.dense" not in found
    assert found["cls.predictions.decoder"] == {"lm_head"}


def test_gated_gelu_written_out_tells_gate_from_up() -> None:
    found = roles(zoo("t5_gated"))
    assert found["encoder.block.0.layer.1.DenseReluDense.wi_0"] == {"mlp.gate_proj"}
    assert found["encoder.block.0.layer.1.DenseReluDense.wi_1"] == {"mlp.up_proj"}
    assert found["decoder.block.0.layer.1.EncDecAttention.k"] == {"attention.k_proj"}


@pytest.mark.parametrize("name", ["gemma2", "t5"])
def test_attention_written_out_has_the_same_roles(name: str) -> None:
    eager = only(build(name, attention="eager"), **inputs(name))
    assert roles(eager) == roles(zoo(name))
    assert {k for k in eager if k[1] == "attention"} == {k for k in zoo(name) if k[1] == "attention"}


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_positions_and_types_given_as_inputs_are_no_tokens(name: str) -> None:
    given = inputs(name) | {"position_ids": torch.arange(6)[None], "token_type_ids": torch.zeros(1, 6, dtype=torch.long)}
    assert roles(only(build(name), **given)) == roles(zoo(name))


class Block(nn.Module):
    """One attention with a cache that is written in place, and a gated MLP, under unusual names."""

    def __init__(self, write: str = "index_copy", broken: bool = False, usual: bool = False) -> None:
        super().__init__()
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"] if usual else list("abcdefg")
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
        return [x @ w[0].T, torch.matmul(x, w[1].t()), x @ w[2].mT, x @ w[3].transpose(0, 1), x @ w[4].permute(1, 0),
                x[0].mm(w[5].transpose(-1, -2)), F.linear(x, w[6].detach()), x.matmul(other=w[7].T),
                x @ t[0], torch.matmul(x, t[1]), F.linear(x, t[2].t()), torch.addmm(x[0, 0, 0], x[0], t[3])]  # fmt: skip


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
        shapes = dict(cast=(8, 16), sliced=(8, 16), summed=(8, 16), left=(4, 3), cube=(2, 16, 8), scaled=(16, 8), both=(16, 16),
                      einsummed=(8, 16), returned=(8, 16))  # fmt: skip
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))
        self.conv = nn.Conv1d(3, 3, 3)
        self.table = nn.Embedding(7, 16, max_norm=1.0)
        self.mha = nn.MultiheadAttention(16, 2, batch_first=True)
        self.experts = nn.Parameter(torch.zeros(2, 16, 8))

    def forward(self, x: torch.Tensor, i: torch.Tensor) -> list[torch.Tensor]:
        return [F.linear(x, self.cast.to(torch.float64).to(x.dtype)), F.linear(x, self.sliced[:4]), F.linear(x, self.summed),
                self.summed.sum(), self.left @ x[0], x @ self.cube, torch.addmm(x[0, 0, :8], x[0], self.scaled, alpha=2),
                F.linear(x, self.both), x @ self.both, torch.einsum("bsk,nk->bsn", x, self.einsummed), self.conv(x), self.table(i),
                self.mha(x, x, x)[0], torch.bmm(x.expand(2, -1, -1), self.experts), self.returned, F.linear(x, self.returned),
                F.linear(x, x[0]), x @ x.mT]  # fmt: skip


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
        ("mha.in_proj_weight", "matmul"): "multi_head_attention_forward",
        ("mha.out_proj", "matmul"): "multi_head_attention_forward",
        ("experts", "matmul"): "bmm",
        ("returned", "linear"): "also used by output",
        ("returned", "other"): "output of the graph",
    }
    for key, words in expected.items():
        assert words in reasons.pop(key), key
    assert reasons.pop(("mha", "attention")) == ""
    operators = {operator: words for (_, operator), words in reasons.items()}
    assert len(reasons) == 2 and operators["matmul"] == "both factors are activations"
    assert "not a parameter" in operators["linear"]


class Lookalikes(nn.Module):
    """Structures that resemble attention and MLPs: a router's softmax, a scan's projections, a pooler and a classifier."""

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
    assert sites["one", "linear"].storage == sites["two", "linear"].storage != sites["shared", "linear"].storage


def test_two_layer_mlp() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    assert roles(only(model, torch.zeros(2, 8))) == {"0": {"mlp.gate_proj", "mlp.up_proj"}, "2": {"mlp.down_proj"}}


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
    program = torch.export.export(model, (torch.zeros(1, 3, 16),))
    if lifted:
        gm = program.graph_module
        state = {**dict(program.named_parameters()), **dict(program.named_buffers())}
        targets = {s.arg.name: s.target for s in program.graph_signature.input_specs if s.target is not None}
        examples = [state.get(targets.get(n.name, ""), n.meta.get("val")) for n in gm.graph.nodes if n.op == "placeholder"]
    else:
        gm, examples = program.module(), [torch.zeros(1, 3, 16)]
        state = dict(gm.named_parameters())
    names = {id(t): n for n, t in state.items() if isinstance(t, nn.Parameter)}
    sites = discover(gm, examples, lambda t: names.get(id(t)))
    assert {s.name: set(s.roles) for s in sites if s.is_linear} == ROLES_OF_BLOCK
    assert all(s.parameter == f"{s.name}.weight" and s.unsupported is None for s in sites if s.is_linear)
