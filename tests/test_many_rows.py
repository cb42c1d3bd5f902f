"""Many rows on CPUs with matrix units: two ways, the same product; the faster one by measurement, once on a machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import qcompile
from qcompile import kernels
from qcompile.codegen import cpp, cpp_many
from qcompile.codegen.cpp import CpuKernels
from qcompile.codegen.cpp_many import FOUND, Product, Times
from qcompile.formats import Scheme, get, reference
from qcompile.store import COUNTS, Store

FORMATS = ("int4_g128", "int3_g64", "fp8_e4m3_b128", "fp8_e4m3_tensor", "int4_zp_g128_order", "Q4_K")
Seconds = Callable[[float, float], None]


@pytest.fixture(autouse=True)
def units(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A CPU whose 16-bit products run in matrix units, with no times known yet; libraries are those of every test."""
    store = Store(tmp_path, 10**9)
    for module in (cpp, cpp_many):
        monkeypatch.setattr(module, "has_matrix_units", lambda dtype: dtype != torch.float32)
    monkeypatch.setattr(cpp_many, "the_store", lambda: store)
    _forget()
    yield
    _forget()


def _forget() -> None:
    """What this process knows of kernels and times."""
    FOUND.clear(), COUNTS.clear(), kernels._begun.clear()
    cpp.cpu_kernels.cache_clear(), kernels.for_key.cache_clear()


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> Seconds:
    """Has both ways measured as taking so long: our product, and the other."""

    def take(ours: float, other: float) -> None:
        monkeypatch.setattr(cpp_many, "_shortest", lambda *ways: [ours, other])

    return take


def drawn(name: str, n: int, k: int) -> tuple[CpuKernels, list[torch.Tensor], torch.Tensor]:
    """Kernels, planes, and the float32 weight that they stand for."""
    spec = get(name)
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) / k**0.5
    planes = reference.quantize(spec, weight)
    if spec.permuted:
        planes[-1] = torch.randperm(k, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    found: Any = kernels.for_scheme(Scheme(spec), "cpu")
    return getattr(found, "inner", found), planes, reference.decode(spec, planes, n, k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_decoded_in_parts_is_the_product(
    name: str, dtype: torch.dtype, seconds: Seconds, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds(2.0, 1.0)
    n, k = 200, 512
    monkeypatch.setattr(cpp_many, "PART_BYTES", 64 * k * dtype.itemsize)  # parts of 64 rows, the last of 8
    own, planes, weight = drawn(name, n, k)
    x = torch.randn(3, 37, k + 8, generator=torch.Generator().manual_seed(2)).to(dtype)[..., :k]
    for bias in (None, torch.randn(n), torch.randn(n).to(dtype)):
        made = own.linear(x, planes, bias, n)
        wanted = x.double() @ weight.to(dtype).double().t() + (0 if bias is None else bias.double())
        assert made.dtype == dtype and made.shape == (3, 37, n)
        assert (made.double() - wanted).norm() <= 2 * torch.finfo(dtype).eps * wanted.norm()
    assert [t.decodes for t in FOUND.values()] == [True]


def test_parts_bound_the_memory(seconds: Seconds, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds(2.0, 1.0)
    n, k, m = 4096, 1024, 32
    own, planes, _ = drawn("int4_g128", n, k)
    monkeypatch.setattr(cpp_many, "PART_BYTES", 1 << 17)
    largest = Largest()
    with largest:
        own.linear(torch.ones(m, k, dtype=torch.bfloat16), planes, None, n)
    assert FOUND and largest.nbytes <= max(1 << 17, m * n * 2)  # the weight has 8 MiB


class Largest(TorchDispatchMode):
    """The largest tensor that an operator makes."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made._base is None:
            self.nbytes = max(self.nbytes, made.nbytes)
        return made


def test_the_faster_way_is_taken_and_kept(seconds: Seconds, monkeypatch: pytest.MonkeyPatch) -> None:
    own, planes, _ = drawn("int4_g128", 64, 256)
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    assert isinstance(own.call, Product)
    decoded: list[Any] = []
    monkeypatch.setattr(own.call, "_decode", lambda *a: (decoded.append(a), own._decode(*a)))
    for other, rows, wanted in ((0.5, 64, True), (0.96, 128, False), (2.0, 256, False)):
        seconds(1.0, other)
        decoded.clear()
        own.linear(x.repeat(rows // 64, 1), planes, None, 64)
        assert bool(decoded) is wanted
    assert COUNTS["timed"] == 3

    FOUND.clear()  # a later process
    seconds(float("nan"), float("nan"))
    for rows, wanted in ((64, True), (127, True), (128, False), (256, False)):
        decoded.clear()
        own.linear(x.repeat(4, 1)[:rows], planes, None, 64)
        assert bool(decoded) is wanted
    assert COUNTS["timed"] == 3 and COUNTS["product read"] == 3


def test_both_ways_are_really_timed() -> None:
    own, planes, weight = drawn("int4_g128", 64, 256)
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    made = own.linear(x, planes, None, 64)
    (times,) = FOUND.values()
    assert times.ours > 0 and times.other > 0
    assert (made.double() - x.double() @ weight.to(torch.bfloat16).double().t()).norm() <= 0.01 * made.double().norm()


def test_what_is_never_timed(seconds: Seconds) -> None:
    seconds(2.0, 1.0)
    own, planes, _ = drawn("int4_g128", 64, 256)
    own.linear(torch.ones(31, 256, dtype=torch.bfloat16), planes, None, 64)  # few rows
    own.linear(torch.ones(64, 256), planes, None, 64)  # float32
    assert not FOUND
    assert not isinstance(CpuKernels(Scheme(get("int8"), "int8")).call, Product)  # integer products


def test_a_cpu_without_matrix_units_calls_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "has_matrix_units", lambda dtype: False)
    assert CpuKernels(Scheme(get("int4_g128"))).call is cpp.caller().linear


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_layers(dynamic: bool, seconds: Seconds, fresh_dynamo: None) -> None:
    seconds(2e-3, 1e-3)

    class Gated(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = torch.nn.Linear(128, 96), torch.nn.Linear(128, 64, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.gate(x), self.up(x)], -1)

    torch.manual_seed(0)
    model = Gated().to(torch.bfloat16)
    run = torch.compile(model, backend="qcompile", dynamic=dynamic, options={"policy": "int4_g128"})
    x = torch.randn(100, 128).to(torch.bfloat16)
    few = run(x[:3])
    assert not FOUND
    many = run(x)
    ((label, kind),) = FOUND  # both layers are one call
    assert (label, kind.rows, kind.n, kind.k) == ("int4_g128", 64, 160, 128)
    assert (many[:3].double() - few.double()).norm() <= 0.01 * few.double().norm()
    report = qcompile.explain(run, x)
    line = "int4_g128, 64 to 127 rows of bfloat16 by 160×128: decoded, then PyTorch's product: 1 ms, ours 2 ms"
    assert line in str(report)
    assert json.loads(report.to_json())["products"] == [
        {"format": "int4_g128", "rows": 64, "n": 160, "k": 128, "dtype": "bfloat16", "threads": torch.get_num_threads(),
         "ours": 2e-3, "other": 1e-3}
    ]  # fmt: skip


def test_a_tie_is_ours() -> None:
    assert not Times(1.0, 0.96).decodes and Times(1.0, 0.95).decodes
