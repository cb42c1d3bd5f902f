"""Generated Triton kernels on a CUDA device: bfloat16 and fp8 numerics, every tile, and determinism."""

import pytest
import torch
import triton_cases as cases

from qcompile.codegen.triton import TritonKernels, triton_kernels
from qcompile.formats import FormatSpec, Scheme, reference

pytestmark = pytest.mark.gpu

LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
"""Relative error (Frobenius) against float64: rounding of the output, and of a table's values to the operand type."""


def weights(kernels: TritonKernels, n: int, k: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    spec = kernels.scheme.format
    planes = reference.quantize(spec, torch.randn(n, k, device="cuda"))
    return planes, reference.decode(spec, planes, n, k).double()


def quantized(kernels: TritonKernels, x: torch.Tensor) -> torch.Tensor:
    """float64 x as dynamic quantization per token keeps it (as it is, without quantized activations)."""
    if kernels.scheme.activations is None:
        return x.double()
    largest = 127.0 if kernels.scheme.activations == "int8" else 448.0
    top = x.float().abs().amax(1, keepdim=True)
    scaled = x.float() * (largest / top)
    codes = scaled.round() if largest == 127.0 else scaled.to(torch.float8_e4m3fn).float()
    return codes.double() * (top / largest).double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16, 31, 64, 65, 200, 300])
@pytest.mark.parametrize("scheme", cases.schemes(), ids=lambda s: s.label)
def test_linear_matches_float64(scheme: Scheme, rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    kernels = triton_kernels(scheme)
    n, k = (1000, 1024) if rows % 2 else (528, 1111)
    planes, weight = weights(kernels, n, k)
    x, bias = torch.randn(rows, k, device="cuda").to(dtype), torch.randn(n, device="cuda").to(dtype)
    want = quantized(kernels, x) @ weight.t() + bias.double()
    got = kernels.linear(x, planes, bias, n)
    assert got.dtype == dtype and torch.isfinite(got).all()
    limit = LIMITS[dtype] if scheme.activations is None else max(LIMITS[dtype], 2e-3)
    assert (got.double() - want).norm() / want.norm() < limit
    assert torch.equal(got, kernels.linear(x, planes, bias, n)), "two runs differ"


@pytest.mark.parametrize("scheme", [s for s in cases.schemes() if s.activations is None], ids=lambda s: s.label)
def test_decode_is_rounded_once(scheme: Scheme) -> None:
    kernels = triton_kernels(scheme)
    planes, weight = weights(kernels, 200, 1111)
    got = kernels.decode(planes, 200, 1111, torch.float32)
    # With an offset, a fused multiply-add rounds once where the reference rounds twice.
    tiny = float(weight.abs().max()) * (1e-7 if kernels.printer.form.offset != 0 else 0) + 1e-30
    torch.testing.assert_close(got.double(), weight, rtol=2.5e-7, atol=tiny)
    half = kernels.decode(planes, 200, 1111, torch.bfloat16)
    torch.testing.assert_close(half.double(), weight, rtol=2**-8, atol=tiny)


@pytest.mark.parametrize("spec", cases.formats(), ids=lambda s: s.name)
def test_rows_are_those_of_the_decoded_weight(spec: FormatSpec) -> None:
    kernels = triton_kernels(Scheme(spec))
    planes, _ = weights(kernels, 200, 1111)
    indices = torch.randint(0, 200, (3, 5), device="cuda")
    for dtype in LIMITS:
        assert torch.equal(kernels.rows(planes, indices, 200, 1111, dtype), kernels.decode(planes, 200, 1111, dtype)[indices])


def test_a_captured_graph_replays_the_same_numbers() -> None:
    kernels = triton_kernels(cases.schemes()[4])
    planes, _ = weights(kernels, 512, 4096)
    x = torch.randn(3, 4096, device="cuda", dtype=torch.bfloat16)
    want = kernels.linear(x, planes, None, 512)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = kernels.linear(x, planes, None, 512)
    for _ in range(3):
        got.zero_()
        graph.replay()
        assert torch.equal(got, want)


def test_reduce_overhead_replays_on_new_inputs() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(512, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 256)).cuda().bfloat16()
    compiled = torch.compile(layer, backend="qcompile", options={"policy": "int4", "mode": "reduce-overhead"})
    with torch.no_grad():
        for _ in range(5):  # warmed up, recorded, replayed
            x = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
            torch.testing.assert_close(compiled(x).clone(), layer(x), rtol=2e-2, atol=2e-2)


def test_a_second_device_or_stream_is_respected() -> None:
    kernels = triton_kernels(cases.schemes()[4])
    planes, _ = weights(kernels, 512, 1024)
    x = torch.randn(5, 1024, device="cuda", dtype=torch.bfloat16)
    want = kernels.linear(x, planes, None, 512)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = kernels.linear(x, planes, None, 512)
    stream.synchronize()
    assert torch.equal(got, want)
