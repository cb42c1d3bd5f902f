"""Gradients of weights in training: the derivative of Ŵ with codes held, rounding taken for the identity."""

from __future__ import annotations

import pytest
import torch

from qcompile.formats import REGISTRY, FormatSpec, get
from qcompile.formats.algebra import finite_range, gen_table, zero_points
from qcompile.formats.codes import reach
from qcompile.formats.reference import fake
from qcompile.formats.search import has_search
from qcompile.formats.surrogate import dependence, gradient

SPECS = sorted({s.name: s for s in (*REGISTRY.values(), get("int2_g32"), get("int3_range_g128"))}.values(), key=lambda s: s.name)
N, K = 33, 1024


class Surrogate:
    """float64 ``[groups, size]`` → Ŵ with the codes and the cut-offs of one weight: in range W + s(W)·ε, ε what rounding adds
    to a code, beyond it s(W)·gen + o(W)."""

    def __init__(self, spec: FormatSpec, x: torch.Tensor, made: torch.Tensor, scales: torch.Tensor) -> None:
        self.spec, self.stored = spec, scales
        self.offset = scales[1] if len(scales) == 2 and zero_points(spec) is None else None
        low, high = reach(spec)
        at = (x - (scales[1] if len(scales) == 2 else 0)) / scales[0]
        self.kept = (at >= low) & (at <= high)
        self.gen = (made - (0 if self.offset is None else self.offset)) / scales[0]
        self.noise = (made - x) / scales[0]
        self.per_magnitude = scales[0] / x.abs().amax(1, keepdim=True)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        scale, offset = self.scales(x)
        return torch.where(self.kept, x + scale * self.noise, scale * self.gen + offset)

    def scales(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        """As the declaration says that they follow from a group."""
        if not dependence(self.spec).squares and not dependence(self.spec).range:
            return self.stored[0], 0.0 if self.offset is None else self.offset
        if has_search(self.spec):
            ones = torch.ones_like(x) if self.offset is None else (self.offset != 0).double().expand_as(x)
            columns = torch.stack([self.gen, ones], -1)[..., : 1 if self.offset is None else 2]
            found = torch.linalg.pinv(columns) @ x.unsqueeze(-1)
            return found[:, 0], 0.0 if self.offset is None else found[:, 1]
        low, high = finite_range(gen_table(self.spec))
        top, bottom = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
        if self.offset is None:
            return torch.maximum(top, -bottom) * self.per_magnitude, 0.0
        scale = (top - bottom) / (high - low)
        return scale, (top + bottom) / 2 - scale * (low + high) / 2


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_the_gradient_is_the_surrogates_by_finite_differences(spec: FormatSpec) -> None:
    torch.manual_seed(0)
    weight, grad, size = torch.randn(N, K), torch.randn(N, K), spec.period or K
    made, scales = fake(spec, weight)
    found = gradient(spec, grad, weight, made, scales).view(-1, size)
    x, of = weight.double().view(-1, size), grad.double().view(-1, size)
    surrogate = Surrogate(spec, x, made.double().view(-1, size), scales.double().view(len(scales), -1, 1))
    step = 1e-6
    for column in torch.randperm(size)[:16].tolist():
        moved = [x.clone(), x.clone()]
        moved[0][:, column] += step
        moved[1][:, column] -= step
        plus, minus = ((surrogate(m) * of).sum(1) for m in moved)
        torch.testing.assert_close(found[:, column].double(), (plus - minus) / (2 * step), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["int4_g128", "int3_range_g128", "Q4_K", "nf4"])
def test_groups_that_are_not_whole_and_groups_of_zeros(name: str) -> None:
    """The gradient of the columns that a group has is that of a weight that ends there; a group of zeros has no scale."""
    torch.manual_seed(0)
    spec = get(name)
    weight, grad = torch.randn(20, 300), torch.randn(20, 300)
    weight[4] = 0
    made, scales = fake(spec, weight)
    found = gradient(spec, grad, weight, made, scales)
    assert torch.isfinite(found).all() and torch.equal(found[4], grad[4])
    whole = 300 // spec.period * spec.period
    alone = gradient(spec, grad[:, :whole], weight[:, :whole], made[:, :whole], scales)
    assert torch.equal(found[:, :whole], alone)
    assert not torch.equal(found[:, whole:], grad[:, whole:])


def test_ties_share_the_gradient_of_a_range() -> None:
    spec = get("int3_range_g128")
    weight = torch.tensor([[1.0, -1.0] * 64])
    weight[0, 2:66:3] = 0.1
    grad = torch.randn(1, 128)
    made, scales = fake(spec, weight)
    through = gradient(spec, grad, weight, made, scales) - grad
    top = weight == 1
    torch.testing.assert_close(through[top], through[top].mean().expand(int(top.sum())), rtol=1e-2, atol=1e-6)
    assert through[weight == 0.1].abs().max() == 0 and through[top].abs().min() > 0
    of_scale = (grad * (made - weight) / scales[0, :, 0]).sum()
    torch.testing.assert_close(through[top].sum(), of_scale / 7, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["fp8_e4m3_b128", "fp8_e4m3_tensor", "int8_zp_g128"])
def test_scales_that_follow_from_more_than_a_group_count_as_constants(name: str) -> None:
    spec = get(name)
    weight, grad = torch.randn(16, 256), torch.randn(16, 256)
    found = gradient(spec, grad, weight, *fake(spec, weight))
    assert not dependence(spec).squares and not dependence(spec).range
    assert torch.equal(found, torch.where(found != 0, grad, 0.0)) and (found != 0).float().mean() > 0.9


def test_half_precision_has_the_gradient_of_single() -> None:
    spec = get("int4_g128")
    weight, grad = torch.randn(16, 256).bfloat16(), torch.randn(16, 256).bfloat16()
    found = gradient(spec, grad, weight, *fake(spec, weight))
    want = gradient(spec, grad.float(), weight.float(), *fake(spec, weight.float()))
    assert found.dtype == torch.bfloat16 and (found.float() - want).norm() < 2e-2 * want.norm()


def test_scales_of_a_range_reach_both_ends() -> None:
    spec = get("int3_range_g128")
    weight = torch.randn(8, 256)
    made, scales = fake(spec, weight)
    groups, values = weight.view(8, 2, 128), made.view(8, 2, 128)
    span = groups.amax(-1) - groups.amin(-1)
    assert torch.equal(scales[0], (span / 7).bfloat16().float()) and spec.planes == get("int3_g128").planes
    for end in (torch.amax, torch.amin):
        assert ((end(values, -1) - end(groups, -1)).abs() <= 0.02 * span).all()
