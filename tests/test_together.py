"""Linear layers that share their input are one call of a kernel, and the results are those of a call for each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_inductor import CALL, OPERATOR, compiled
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.profiler import profile

import qcompile
from qcompile import ops
from qcompile.formats import BUILT_IN, Scheme, get, reference, register_scheme

K = 512
SIZES = (80, 16, 21)
"""N of query, key and value: whole panels and not, whole tiles and not."""
SCHEMES = (("int4_g128", None), ("int8", None), ("int8", "int8"), ("nf4", None), ("Q4_K", None), ("fp8_e4m3", "fp8"))


class Weight:
    """A packed random N×K weight with a bias, and its product."""

    def __init__(self, name: str, n: int, activations: str | None = None, bias: torch.dtype | None = torch.float32) -> None:
        scheme = Scheme(get(name), activations)
        self.key, self.n, self.planes = register_scheme(scheme), n, list(reference.quantize(scheme.format, torch.randn(n, K)))
        self.bias = None if bias is None else torch.randn(n).to(bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return ops.linear(x, self.planes, self.bias, self.key, self.n)


def code_of(function: Callable[..., Any], *inputs: Any) -> tuple[Any, str]:
    """What compiled ``function`` gives, and its code's body."""
    got, (code,) = run_and_get_code(compiled(function), *inputs)
    return got, code[code.index("def call(") : code.index("def get_args")]


def calls_of(seen: profile) -> list[str]:
    """Names of the calls of kernels for linear layers."""
    return [event.name for event in seen.events() if event.name.startswith("qcompile::linear ")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_bit_for_bit_those_of_separate_calls(dtype: torch.dtype, fresh_dynamo: None) -> None:
    torch.manual_seed(0)
    biases = (None, torch.float32, torch.bfloat16)
    groups = [[Weight(name, n, act, bias) for n, bias in zip(SIZES, biases, strict=True)] for name, act in SCHEMES]

    def forward(x: torch.Tensor) -> list[torch.Tensor]:
        inputs = [torch.relu(x) + i for i in range(len(groups))]
        return [weight(x) for x, group in zip(inputs, groups, strict=True) for weight in group]

    run = compiled(forward)
    for rows in (17, 3, 256, 1):
        x = torch.randn(rows, K).to(dtype)
        with profile() as seen:
            got = run(x)
        assert len(calls_of(seen)) == len(SCHEMES)
        for weight, (i, y) in zip((w for group in groups for w in group), enumerate(got), strict=True):
            assert torch.equal(y, weight(torch.relu(x) + i // len(SIZES))), (weight.key, weight.n, rows)
    assert counters["stats"]["unique_graphs"] == 3  # of 17 rows, of any number, of one


def test_every_layer_may_be_all_of_a_threads_work(fresh_dynamo: None) -> None:
    weights, before = [Weight("int8", n, "int8") for n in (16, 16, 700)], torch.get_num_threads()
    run = compiled(lambda x: [w(x) for w in weights])
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for rows in (1, 40):
                x = torch.randn(rows, K)
                for got, weight in zip(run(x), weights, strict=True):
                    assert torch.equal(got, weight(x))
    finally:
        torch.set_num_threads(before)


def test_only_equal_schemes_go_together(fresh_dynamo: None) -> None:
    q, k, v = Weight("int8", 64), Weight("int4_g128", 16), Weight("int8", 16)
    other = Weight("int8", 16, "int8")
    x = torch.randn(3, K)
    got, code = code_of(lambda x: [w(x) for w in (q, k, other, v)], x)
    assert all(torch.equal(y, w(x)) for y, w in zip(got, (q, k, other, v), strict=True))
    assert code.count(CALL) == 3


def test_a_product_of_another_input_lies_between(fresh_dynamo: None) -> None:
    """As in decoders whose every layer multiplies the encoder's states: all at once would keep all results at a time."""
    first, between, second, third = (Weight("int8", n) for n in (K, K, 32, 48))

    def forward(states: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return first(states), between(x), second(states), third(states)

    states, x = torch.randn(3, K), torch.randn(2, K)
    got, code = code_of(forward, states, x)
    assert all(torch.equal(y, want) for y, want in zip(got, forward(states, x), strict=True))
    assert code.count(CALL) == 3


def test_what_is_not_known_yet_goes_by_itself(fresh_dynamo: None) -> None:
    """A bias that is made of the first layer's result, and one that kernels do not take."""
    q, k, v, w = (Weight("int8", n, bias=None) for n in (64, 64, 64, 16))
    v.bias, doubled = torch.randn(64), torch.randn(16).double()

    def forward(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = q(x)
        second = ops.linear(x, k.planes, first.sum(0), k.key, k.n)
        return first, second, v(x), ops.linear(x, w.planes, doubled, w.key, w.n)

    x = torch.randn(3, K)
    got, code = code_of(forward, x)
    for y, want in zip(got, forward(x), strict=True):
        torch.testing.assert_close(y, want)
    assert code.count(CALL) == 2 and OPERATOR in code


@pytest.mark.parametrize("name", ["int4_g32_scaled", next(s.name for s in BUILT_IN if s.permuted)])
def test_columns_are_treated_once_where_that_is_right(name: str, fresh_dynamo: None) -> None:
    q, k, v = (Weight(name, n) for n in SIZES)
    if get(name).permuted:
        for weight in (q, v):
            weight.planes[-1] = torch.randperm(K).int()
    k.planes[-1], x = q.planes[-1], torch.randn(3, K)
    got, code = code_of(lambda x: [w(x) for w in (q, k, v)], x)
    for y, weight in zip(got, (q, k, v), strict=True):
        torch.testing.assert_close(y, weight(x), rtol=1e-5, atol=1e-4)
    assert code.count(CALL) == 2


@pytest.mark.parametrize("unread", [0, 1, 2])
def test_results_that_nobody_reads_are_not_made(unread: int, fresh_dynamo: None) -> None:
    weights, x = [Weight("int8", n) for n in (128, 64, 32)], torch.randn(3, K)

    def forward(x: torch.Tensor) -> list[torch.Tensor]:
        return [w(x)[:, :0] + 1 if i == unread else w(x) for i, w in enumerate(weights)]

    got, code = code_of(forward, x)
    assert all(torch.equal(y, want) for y, want in zip(got, forward(x), strict=True))
    (call,) = (line for line in code.splitlines() if CALL in line)
    assert call.count("None, ") == 1 and code.count("empty_strided_cpu((3, ") == 3  # two of them, and the empty one


class Block(nn.Module):
    """A layer of a Llama: grouped queries, gated products."""

    def __init__(self, size: int = 64, bias: bool = True) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.q_proj, self.o_proj = nn.Linear(size, size, bias), nn.Linear(size, size, bias)
        self.k_proj, self.v_proj = nn.Linear(size, size // 4, bias), nn.Linear(size, size // 4, bias)
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(*s, bias) for s in [(size, 2 * size)] * 2 + [(2 * size, size)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, shape = self.norm(x), (*x.shape[:2], -1, 16)
        q, k, v = (p(h).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)
        x = x + self.o_proj(y)
        h = self.norm2(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


def block() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block()).eval()


def test_a_block_calls_four_kernels_and_its_plan_has_seven_layers(fresh_dynamo: None, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x, outputs = torch.randn(1, 5, 64), []
    for expected in ("miss", "hit"):
        torch._dynamo.reset()
        counters.clear()
        model = block()
        run = torch.compile(model, backend="qcompile", options={"policy": "int8"})
        outputs.append(run(x))
        with profile() as seen:
            run(x)
        assert counters["aot_autograd"][f"autograd_cache_{expected}"] == 1 and counters["stats"]["unique_graphs"] == 1
        calls = calls_of(seen)
        layers = ("0.q_proj + 0.k_proj + 0.v_proj", "0.o_proj", "0.gate_proj + 0.up_proj", "0.down_proj")
        assert calls == [f"qcompile::linear int8 {name}" for name in layers]
    assert torch.equal(*outputs) and torch.allclose(outputs[0], model(x), atol=1e-5)
    assert qcompile.explain(block(), x, policy="int8").plan.totals().quantized == 7


def test_one_graph_serves_every_length(fresh_dynamo: None) -> None:
    model = block()
    run = torch.compile(model, backend="qcompile", options={"policy": "int8_dynamic"}, dynamic=True)
    for tokens in (3, 17, 256):
        x = torch.randn(2, tokens, 64)
        torch.testing.assert_close(run(x), model(x), rtol=1e-3, atol=0.02)
    assert counters["stats"]["unique_graphs"] == 1


def test_autocast_casts_the_input_of_all_once(fresh_dynamo: None) -> None:
    model, x = block(), torch.randn(2, 5, 64)
    run = torch.compile(model, backend="qcompile", options={"policy": "int8"})
    with torch.autocast("cpu", torch.bfloat16):
        got, codes = run_and_get_code(run, x)
        torch.testing.assert_close(got, model(x), rtol=2e-2, atol=2e-2)
    assert codes[-1].count(CALL) == 4


def test_gradients_flow_through_layers_that_were_computed_together(reset_dynamo: None) -> None:
    model, x = block().requires_grad_(False), torch.randn(2, 5, 64, requires_grad=True)
    model[0].q_proj.bias.requires_grad_()
    run = torch.compile(model, backend="qcompile", options={"policy": "int8"})
    wanted = (x, model[0].q_proj.bias)
    found, (forward, _) = run_and_get_code(lambda: torch.autograd.grad(run(x).square().sum(), wanted))
    assert forward.count(CALL) == 4
    exact = copy.deepcopy(model)
    for layer in exact.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(layer.weight.dequantize())
    want = torch.autograd.grad(exact(x).square().sum(), (x, exact[0].q_proj.bias))
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-3)


def test_a_package_makes_the_same_calls(fresh_dynamo: None, tmp_path: Path) -> None:
    model, x = block(), torch.randn(2, 5, 64)
    path = qcompile.package(model, (x,), tmp_path / "block.pt2", policy="int8")
    program = torch.export.export(model, (x,))
    got = torch._inductor.aoti_load_package(str(path))(x)
    torch.testing.assert_close(got, program.module()(x), rtol=1e-5, atol=1e-5)
