"""Gradients of packed linear layers: of every format, in chunks, in little memory, of second order."""

from __future__ import annotations

import adapters
import pytest
import torch

from qcompile import formats, gradient, ops
from qcompile.errors import LayoutError
from qcompile.formats import Scheme, get, reference, register_scheme
from qcompile.formats.layout import columns_multiple
from qcompile.tensor import quantize

SCHEMES = [Scheme(spec) for spec in formats.REGISTRY.values()]
each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)
N = 37


def weight_of(scheme: Scheme, k: int, n: int = N) -> tuple[str, list[torch.Tensor], torch.Tensor]:
    """Scheme key, planes (columns shuffled, factors other than 1), and the weight [N, K] in float64 that they stand for."""
    spec, generator = scheme.format, torch.Generator().manual_seed(k)
    factors = torch.rand(k, generator=generator) + 0.5 if spec.scaled else None
    planes = list(reference.quantize(spec, torch.randn(n, k, generator=generator), factors=factors))
    if spec.permuted:
        planes[len(spec.parts)] = torch.randperm(k, generator=generator).int()
    return register_scheme(scheme), planes, reference.decode(spec, planes, n, k).double()


@each_scheme
def test_it_is_the_product_with_the_decoded_weight(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several chunks, of which the last is cut short; each dtype rounds the result once."""
    monkeypatch.setattr(gradient, "CHUNK_BYTES", 1)
    k = columns_multiple(scheme.format) * 2 + 36
    key, planes, weight = weight_of(scheme, k)
    for dtype, bound in ((torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)):
        for leading in ((2, 3), (), (0,)):
            grad = torch.randn(*leading, N).to(dtype)
            found, exact = ops.linear_grad(grad, planes, key, N, k), grad.double() @ weight
            assert found.shape == (*leading, k) and found.dtype == dtype
            assert (found - exact).norm() <= bound * exact.norm()


@each_scheme
def test_finite_differences(scheme: Scheme) -> None:
    """A layer is linear in x, so its differences are exact for steps of any length: a long one, against rounding."""
    key, planes, _ = weight_of(scheme, 100)
    x, step, bias = torch.randn(5, 100, requires_grad=True), torch.randn(5, 100), torch.randn(N, requires_grad=True)
    toward = torch.randn(5, N)
    ops.linear(x, planes, bias, key, N).backward(toward)

    def difference(*moved: torch.Tensor) -> float:
        with torch.no_grad():
            change = ops.linear(moved[0], planes, moved[1], key, N) - ops.linear(x, planes, bias, key, N)
        return float((change.double() * toward).sum())

    assert difference(x + step, bias) == pytest.approx(float((x.grad.double() * step).sum()), rel=2e-5, abs=2e-3)
    assert difference(x, bias + 1) == pytest.approx(float(bias.grad.double().sum()), rel=2e-5, abs=2e-3)


@pytest.mark.parametrize("name", ["int4_g128", "nf4", "int8", "Q4_K", "int4_g32_scaled"])
def test_no_float_copy_of_the_weight_is_made(name: str) -> None:
    """Beside its result: a chunk, the chunk's planes and its product."""
    n = k = 2048
    spec = get(name)
    small = reference.quantize(spec, torch.randn(64, k))
    planes = [p.repeat(n // 64, 1, 1) if p.dim() == 3 else p for p in small]
    key, grad = register_scheme(Scheme(spec)), torch.randn(32, n)
    ops.linear_grad(grad, planes, key, n, k)
    peak = adapters.peak_of(lambda: ops.linear_grad(grad, planes, key, n, k))
    result = 4 * 32 * k
    assert result < peak <= 2 * result + 1.5 * gradient.CHUNK_BYTES < 4 * n * k / 4
    whole = adapters.peak_of(lambda: grad @ ops.decode(planes, key, n, k, torch.float32))
    assert whole >= 4 * n * k


@pytest.mark.parametrize("activations", [None, "int8"])
def test_second_order(activations: str | None) -> None:
    """A penalty on the gradient; quantized activations count as if they were not."""
    key, planes, weight = weight_of(Scheme(get("int8"), activations), 96)
    x = torch.randn(4, 96, requires_grad=True)
    out = ops.linear(x, planes, None, key, N)
    (first,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    y, w = out.detach().double(), weight
    inner = (3 * y**2) @ w  # the first gradient
    assert (first - inner).norm() <= 1e-5 * inner.norm()
    exact = (2 * inner @ w.t() * 6 * y) @ w
    assert (second - exact).norm() <= 1e-5 * exact.norm()


def test_a_weight_used_the_other_way_around_is_not_decoded() -> None:
    weight = quantize(torch.randn(1024, 2048), Scheme(get("int8")))
    x, bias = torch.randn(8, 1024, requires_grad=True), torch.randn(2048)
    with torch.no_grad():
        torch.nn.functional.linear(x, weight.t(), bias)
        assert adapters.peak_of(lambda: torch.nn.functional.linear(x, weight.t(), bias)) < 4 * 1024 * 2048 / 2
    out = torch.nn.functional.linear(x, weight.t(), bias)
    out.backward(toward := torch.randn(8, 2048))
    torch.testing.assert_close(out.detach(), x.detach() @ weight.dequantize() + bias, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(x.grad, toward @ weight.dequantize().t(), rtol=1e-5, atol=1e-3)


def test_planes_of_another_weight_are_refused() -> None:
    key, planes, _ = weight_of(Scheme(get("int8")), 96)
    with pytest.raises(LayoutError, match="plane 'scale'.*found"):
        ops.linear_grad(torch.randn(2, 64), planes, key, 64, 96)
