"""Packed linear layers inside Inductor's code: direct calls, right for every way that x can lie in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._inductor.compile_fx import compile_fx
from torch._inductor.utils import run_and_get_code

from qcompile import inductor, ops
from qcompile.codegen.cpp_call import caller
from qcompile.errors import LayoutError
from qcompile.formats import BUILT_IN, Scheme, get, reference, register_scheme

N, K = 48, 64
CALL, OPERATOR = "qcompile_linear(qcompile_", "torch.ops.qcompile.linear"

VIEWS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], tuple[int, ...]]] = {
    "as it is": (lambda x: x, (3, 5, K)),
    "one vector": (lambda x: x, (K,)),
    "last token": (lambda x: x[:, -1], (3, 5, K)),
    "last token, kept": (lambda x: x[:, -1:], (3, 5, K)),
    "from the second on": (lambda x: x[1:], (3, 5, K)),
    "some columns": (lambda x: x[..., 8 : 8 + K], (3, 5, K + 20)),
    "every other column": (lambda x: x[..., ::2], (4, 2 * K)),
    "transposed": (lambda x: x.t(), (K, 7)),
    "heads": (lambda x: x.transpose(1, 2).flatten(2), (2, 4, 5, K // 4)),
    "computed": (lambda x: torch.relu(x) * 2, (3, 5, K)),
    "expanded": (lambda x: x.expand(3, 5, K), (1, 1, K)),
}


def packed(name: str = "int8", activations: str | None = None) -> tuple[str, list[torch.Tensor], torch.Tensor]:
    scheme = Scheme(get(name), activations)
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    planes = list(reference.quantize(scheme.format, weight))
    return register_scheme(scheme), planes, reference.decode(scheme.format, planes, N, K)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` under plain Inductor, with the lowering installed, and caches keyed by it, as the backend does it."""

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        with inductor.keyed(gm):
            return compile_fx(gm, inputs)

    inductor.install()
    torch._dynamo.reset()
    return torch.compile(function, backend=backend)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_x_may_lie_in_memory_in_any_way(view: str, dtype: torch.dtype) -> None:
    key, planes, weight = packed()
    cut, shape = VIEWS[view]
    x = torch.randn(shape).to(dtype)

    def layer(x: torch.Tensor, *planes: torch.Tensor) -> torch.Tensor:
        return ops.linear(cut(x), list(planes), None, key, N) + 1

    got, (code,) = run_and_get_code(compiled(layer), x, *planes)
    want = cut(x).float() @ weight.t() + 1
    assert got.dtype == dtype and got.shape == want.shape
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.float(), want, rtol=bound, atol=5 * bound)
    assert CALL in code and OPERATOR not in code
    if view in ("as it is", "last token", "last token, kept", "from the second on", "some columns"):
        call = code[code.index("def call(") : code.index("def get_args")]
        assert call.count("cpp_fused") == 1, "x was copied"


@pytest.mark.parametrize("bias", [torch.float32, torch.float16, torch.bfloat16])
def test_biases_of_every_dtype(bias: torch.dtype) -> None:
    key, planes, weight = packed()
    x, b = torch.randn(3, K), torch.randn(N).to(bias)
    got, (code,) = run_and_get_code(compiled(lambda x, b, *p: ops.linear(x, list(p), b, key, N)), x, b, *planes)
    torch.testing.assert_close(got, x @ weight.t() + b.float(), rtol=1e-5, atol=1e-5)
    assert CALL in code


def test_other_dtypes_go_through_the_operator() -> None:
    key, planes, weight = packed()
    x, b = torch.randn(3, K), torch.randn(N, dtype=torch.float64)
    got, (code,) = run_and_get_code(compiled(lambda x, b, *p: ops.linear(x, list(p), b, key, N)), x, b, *planes)
    torch.testing.assert_close(got, (x @ weight.t() + b).float(), rtol=1e-5, atol=1e-5)
    assert OPERATOR in code and CALL not in code


def test_one_graph_for_every_number_of_rows() -> None:
    key, planes, weight = packed()
    torch._dynamo.utils.counters.clear()
    layer = compiled(lambda x, *p: ops.linear(x, list(p), None, key, N))
    for rows in (2, 3, 17, 64, 1000, 0):
        x = torch.randn(rows, K)
        torch.testing.assert_close(layer(x, *planes), x @ weight.t(), rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3  # of 2 rows, of any number, of none


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_in_another_order_are_put_so_by_the_kernel(rows: int, dtype: torch.dtype) -> None:
    spec, k = next(s for s in BUILT_IN if s.permuted), 300
    planes = list(reference.quantize(spec, torch.randn(N, k)))
    planes[-1] = torch.randperm(k).to(planes[-1].dtype)
    key, x, bias = register_scheme(Scheme(spec)), torch.randn(rows, k + 7).to(dtype)[:, 3:-4], torch.randn(N)
    got, (code,) = run_and_get_code(compiled(lambda x, b, *p: ops.linear(x, list(p), b, key, N)), x, bias, *planes)
    want = x.float() @ reference.decode(spec, planes, N, k).t() + bias
    bound = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.float(), want, rtol=bound, atol=bound * float(want.abs().max()))
    assert CALL in code and "cpp_pybinding(" not in code  # nothing gathers before


def test_an_order_that_leaves_the_row_reads_nothing_beyond_it() -> None:
    spec, k = next(s for s in BUILT_IN if s.permuted), 64
    planes = list(reference.quantize(spec, torch.randn(N, k)))
    for bad in (-1, k, 2**31 - 1):
        planes[-1] = torch.full((k,), bad, dtype=torch.int32)
        x = torch.arange(k).float().repeat(9, 1)
        last = torch.full((9, k), k - 1.0)
        plain = [*planes[:-1], torch.arange(k, dtype=torch.int32)]
        key = register_scheme(Scheme(spec))
        torch.testing.assert_close(ops.linear(x, planes, None, key, N), ops.linear(last, plain, None, key, N))
    with pytest.raises(LayoutError, match="order of columns must be contiguous int32"):
        ops.linear(x, [*planes[:-1], planes[-1].long()], None, key, N)


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_of_columns_are_fused_into_what_makes_the_inputs(activations: str | None, dtype: torch.dtype) -> None:
    spec, k = get("int4_g32_scaled"), 256
    weight, factors = torch.randn(N, k), torch.rand(k) + 0.5
    planes = reference.quantize(spec, weight, factors=factors)
    key, x, gain = register_scheme(Scheme(spec, activations)), torch.randn(5, k).to(dtype), torch.randn(k).to(dtype)

    def layer(x: torch.Tensor, gain: torch.Tensor, *p: torch.Tensor) -> torch.Tensor:
        return ops.linear(torch.nn.functional.silu(x) * gain, list(p), None, key, N)

    got, (code,) = run_and_get_code(compiled(layer), x, gain, *planes)
    eager = layer(x, gain, *planes)
    bound = 1e-5 if dtype == torch.float32 else 2e-2  # fused, x is not rounded to bfloat16 before its factor
    torch.testing.assert_close(got, eager, rtol=bound, atol=bound * eager.abs().max())
    want = (torch.nn.functional.silu(x) * gain).float() @ reference.decode(spec, planes, N, k).t()
    assert (eager - want).norm() < (0.04 if activations else 0.01) * want.norm()
    assert CALL in code and code.count("async_compile.cpp_pybinding(") == 1


def test_training_keeps_the_gradient() -> None:
    key, planes, weight = packed()
    x = torch.randn(3, K, requires_grad=True)
    got, codes = run_and_get_code(compiled(lambda x, *p: ops.linear(x, list(p), None, key, N).square().sum()), x, *planes)
    got.backward()
    want = x.detach().clone().requires_grad_()
    (want @ weight.t()).square().sum().backward()
    torch.testing.assert_close(x.grad, want.grad, rtol=1e-4, atol=1e-4)
    assert CALL in codes[0]


def test_threads_are_torchs_own_at_each_call() -> None:
    """A graph compiled under one number of threads is right under another."""
    key, planes, weight = packed()
    layer, before, x = compiled(lambda x, *p: ops.linear(x, list(p), None, key, N)), torch.get_num_threads(), torch.randn(2, K)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            torch.testing.assert_close(layer(x, *planes), x @ weight.t(), rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(before)


def test_the_c_function_refuses_what_it_cannot_call() -> None:
    linear, x = caller().linear, torch.zeros(1, K)
    numbers, layer = (0, 1, K, K, K), (x, None, 0, 0)
    for name in ((), ("name",)):
        with pytest.raises(TypeError, match="1 to 16 planes"):
            linear(1, x, *name)
        with pytest.raises(TypeError, match="1 to 16 planes for each of its layers; found 12 for 1"):
            linear(1, x, *numbers, 1, *layer, *name)
        with pytest.raises(TypeError, match="found 18 for 3"):
            linear(1, x, *numbers, 3, *layer, x, *layer, x, *name)
        with pytest.raises(TypeError, match="found 13 for 0"):
            linear(1, x, *numbers, 0, *layer, x, *name)
        with pytest.raises(TypeError, match="found 13 for -1"):
            linear(1, x, *numbers, -1, *layer, x, *name)
        with pytest.raises(TypeError, match="non-tensor"):
            linear(1, 3, *numbers, 1, *layer, x, *name)
        with pytest.raises(TypeError, match="non-tensor"):
            linear(1, x, *numbers, 2, *layer, x, 3, *layer[1:], x, *name)
    with pytest.raises(TypeError, match="integer"):
        linear(1, x, "a", *numbers[1:], 1, *layer, x)
    with pytest.raises(OverflowError):
        linear(1, x, 2**70, *numbers[1:], 1, *layer, x)
    assert linear(1, x, 0, 0, *numbers[2:], 1, *layer, x) is None  # no rows: nothing is called


def test_caches_of_other_versions_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed() -> str:
        with torch.compiler.config.patch(cache_key_tag="mine"):
            inductor.install()
            inductor.install()
            tag: str = torch.compiler.config.cache_key_tag
            with inductor.keyed():
                assert torch.compiler.config.cache_key_tag.startswith(f"{tag} ")
            assert torch.compiler.config.cache_key_tag == tag
        return tag

    first = installed()
    assert first.startswith("mine qcompile ") and first.count("qcompile") == 1
    monkeypatch.setattr(inductor, "_version", lambda: "another")
    assert installed() == "mine qcompile another" != first
