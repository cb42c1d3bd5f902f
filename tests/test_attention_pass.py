"""Attention nodes exchanged for kernels in low precision: how it may be written, what is left alone and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import qcompile
from qcompile.errors import StrictError
from qcompile.plan import Record

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
Tensor = torch.Tensor
RULES = {"*.self_attn": "int8", "*": "float"}
T, HEADS, KV, SIZE = 37, 4, 2, 32
SEEN = torch.ones(T, T, dtype=torch.bool).tril()


def repeated(t: Tensor) -> Tensor:
    return t[:, :, None].expand(-1, -1, HEADS // KV, -1, -1).reshape(t.shape[0], HEADS, -1, SIZE)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return torch.matmul(q, repeated(k).transpose(2, 3))


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def masked(mask: Tensor) -> Callable[..., Tensor]:
    return lambda q, k, v: F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=mask.to(q.device), scale=0.2)


def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.softmax(scores(q, k) * SIZE**-0.5 + torch.where(SEEN, 0.0, -torch.inf), dim=-1, dtype=torch.float32)
    return torch.matmul(weights.to(q.dtype), repeated(v))


def divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (scores(q, k) / 4.0).masked_fill(~SEEN, -1e9).softmax(-1)
    return F.dropout(weights, 0.1, training=False) @ repeated(v)


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.tanh(scores(q, k) * SIZE**-0.5 / 3.0) * 3.0
    return torch.where(SEEN, weights, -1e5).softmax(-1) @ repeated(v)


def scaled_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q * SIZE**-0.5, k).softmax(-1) @ repeated(v)


WAYS = {"causal": causal, "bool mask": masked(SEEN), "float mask": masked(torch.randn(1, 1, T, T)), "written out": written,
        "divided": divided, "capped": capped, "scaled queries": scaled_queries}  # fmt: skip


class Block(nn.Module):
    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        width = HEADS * SIZE
        self.q_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.k_proj, self.v_proj = nn.Linear(width, KV * SIZE), nn.Linear(width, KV * SIZE)
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).view(*x.shape[:2], -1, SIZE).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(self.attend(q, k, v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, attend: Callable[..., Tensor], layers: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({"self_attn": Block(attend)}) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["self_attn"](x)
        return x


def records(model: nn.Module, *args: Any, **kwargs: Any) -> list[Record]:
    return [r for r in qcompile.explain(model, *args, **kwargs).plan if r.decision.site.operator == "attention"]


@pytest.mark.parametrize("name", WAYS)
def test_ways_to_write_attention(name: str) -> None:
    model, x = Model(WAYS[name], layers=2).eval(), torch.randn(2, T, HEADS * SIZE)
    expected = model(x)
    compiled = torch.compile(model, backend="qcompile", options={"policy": RULES, "strict": True})
    out = compiled(x)
    assert 0 < (out - expected).norm() <= 0.01 * expected.norm()
    found = records(compiled, x)
    assert [r.kernel for r in found] == ["cpp int8"] * 2 and found[0].decision.rule == "*.self_attn: int8"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_of_any_size_and_length(dtype: torch.dtype) -> None:
    model = Model(causal).to(dtype).eval()
    compiled = torch.compile(model, backend="qcompile", options={"policy": RULES}, dynamic=True)
    for batch, length in ((2, 20), (3, 33), (5, 7), (4, 64)):
        x = torch.randn(batch, length, HEADS * SIZE, dtype=dtype)
        assert (compiled(x) - model(x)).norm() <= 0.02 * model(x).norm()
    assert counters["stats"]["unique_graphs"] == 1


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores(q, k).relu() * 2).softmax(-1) @ repeated(v)


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v), dropout_p=0.1)


def other_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).masked_fill(~SEEN, 0.5).softmax(-1) @ repeated(v)


def one_for_all_tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=torch.ones(T, 1, dtype=torch.bool))


def added_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.add(scores(q, k), torch.where(SEEN, 0.0, -1e9), alpha=2).softmax(-1) @ repeated(v)


def negative_cap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.tanh(scores(q, k)) * -3.0).softmax(-1) @ repeated(v)


def one_batch_of_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k[:1]).softmax(-1) @ repeated(v[:1])


@pytest.mark.parametrize("attend,reason", [
    (one_for_all_tokens, "one for all tokens"), (added_twice, "alpha"), (negative_cap, "capped by -3"),
    (one_batch_of_keys, "differ in their batch"),
    (linear_attention, "relu"), (dropped, "drops attention weights"), (other_fill, "something else than a large negative number"),
])  # fmt: skip
def test_other_computations_are_left_with_a_reason(attend: Callable[..., Tensor], reason: str) -> None:
    model, x = Model(attend).eval(), torch.randn(2, T, HEADS * SIZE)
    (left,) = records(model, x, policy=RULES)
    assert left.kernel is None and left.decision.scheme is None and reason in (left.decision.reason or "")
    with pytest.raises(StrictError, match="self_attn"):
        torch.compile(model, backend="qcompile", options={"policy": RULES, "strict": True})(x)


def test_a_format_that_no_cache_can_hold_says_so() -> None:
    model, x = Model(causal).eval(), torch.randn(2, T, HEADS * SIZE)
    (left,) = records(model, x, policy={"*.self_attn": "Q4_K", "*": "float"})
    assert "follow from one token's range" in (left.decision.reason or "")


def test_training_is_left_alone() -> None:
    model, x = Model(causal).train(), torch.randn(2, T, HEADS * SIZE)
    with torch.enable_grad():
        compiled = torch.compile(model, backend="qcompile", options={"policy": RULES})
        compiled(x).sum().backward()
    assert model.layers[0]["self_attn"].q_proj.weight.grad is not None


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_hugging_face_model(implementation: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=96, attn_implementation=implementation)
    model, ids = LlamaForCausalLM(config).eval(), torch.randint(0, 96, (2, 19))
    expected = model(ids, use_cache=False).logits
    compiled = torch.compile(model, backend="qcompile", options={"policy": {"*.self_attn": "fp8", "*": "float"}, "strict": True})
    out = compiled(ids, use_cache=False).logits
    assert 0 < (out - expected).norm() <= 0.03 * expected.norm()
    found = records(compiled, ids, use_cache=False)
    assert [r.decision.site.name for r in found] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert {r.decision.rule for r in found} == {"*.self_attn: fp8_e3m4"}
