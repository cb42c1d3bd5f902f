"""What calibration is made of: the factor of an inverse, curvature, and ranges that are clipped."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from qcompile import formats
from qcompile.formats import reference
from qcompile.rounding import clip, factors, gptq
from qcompile.rounding.cholesky import inverse_factor_
from qcompile.rounding.layers import Layer
from qcompile.rounding.methods import to_nearest
from qcompile.rounding.seen import Seen, outputs, relative_error


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def inputs(tokens: int, width: int) -> torch.Tensor:
    """Rows [tokens, width] of a few strong directions, of channels that differ in size."""
    mixed = torch.randn(tokens, width // 4) @ torch.randn(width // 4, width) + 0.3 * torch.randn(tokens, width)
    return mixed * torch.rand(width).add(0.1).pow(2)


@pytest.mark.parametrize("size", [1, 5, 256, 300, 700])
def test_the_factor_of_an_inverse_is_made_without_the_inverse(size: int) -> None:
    x = torch.randn(2 * size, size, dtype=torch.float64) * torch.rand(size, dtype=torch.float64).add(0.05)
    hessian = x.t() @ x + 0.01 * torch.eye(size, dtype=torch.float64)
    expected = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    work = hessian.flip(0, 1).clone()
    assert inverse_factor_(work)
    torch.testing.assert_close(work.flip(0, 1), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("at", [0, 255, 256, 600])
def test_what_is_not_positive_definite_has_no_factor(at: int) -> None:
    matrix = torch.eye(700, dtype=torch.float64)
    matrix[at, at] = -1e-3
    assert not inverse_factor_(matrix)


def test_padding_of_a_hessian_changes_nothing_for_its_columns() -> None:
    x = inputs(300, 100)
    plain, padded = (gptq.Curvature.of(x.t() @ x, cols) for cols in (100, 128))
    assert torch.equal(padded.order[:100], plain.order) and sorted(padded.order[100:].tolist()) == list(range(100, 128))
    torch.testing.assert_close(padded.upper[:100, :100], plain.upper)
    assert not padded.upper[:100, 100:].any() and not padded.importance[100:].any()


def test_each_sweep_of_clipping_makes_errors_of_outputs_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = torch.randn(40, 256), inputs(2000, 256)
    layer, f, hessian = Layer("up", formats.Scheme(formats.get("int4_g64")), weight), torch.rand(256).add(0.5), x.t() @ x
    spec, found = replace(formats.scaled(layer.scheme.format), shrinks=()), []
    for sweeps in [clip.STEPS[:count] for count in range(1, len(clip.STEPS) + 1)]:
        monkeypatch.setattr(clip, "STEPS", sweeps)
        matrix, left = clip.clipped(layer, f, hessian)
        decoded = reference.decode(spec, reference.quantize(spec, matrix, "up", None, f), *weight.shape)
        found.append(relative_error(*outputs(x, weight, decoded, None)))
        assert 0.5 < left < 1
    nearest = reference.decode(spec, reference.quantize(spec, weight, "up", None, f), *weight.shape)
    assert found == sorted(found, reverse=True) and found[-1] < 0.8 * relative_error(*outputs(x, weight, nearest, None))


@pytest.mark.parametrize("name,note", [("int4_g64", "ranges clipped"), ("mxfp4", "scales searched for")])
def test_awq_keeps_the_better_of_clipped_ranges_and_searched_scales(name: str, note: str) -> None:
    layer = Layer("up", formats.Scheme(formats.get(name)), torch.randn(48, 128))
    seen = Seen.of([(0, inputs(1000, 128))], "up", with_hessian=True)
    (found,) = factors.awq([layer], seen)
    assert note in found.note
    assert found.error(layer, seen.sample) < to_nearest(layer, "").error(layer, seen.sample)


@pytest.mark.parametrize("cols", [100, 128])
def test_the_factor_in_the_memory_of_h_is_the_same(cols: int) -> None:
    x = torch.randn(400, 100)
    hessian = x.t() @ x
    kept = hessian.clone()
    apart = gptq.Curvature.of(hessian, cols)
    assert torch.equal(hessian, kept)
    within = gptq.Curvature.of(hessian, cols, overwrite=True)
    assert torch.equal(within.upper, apart.upper) and torch.equal(within.order, apart.order)
    assert (within.upper.data_ptr() == hessian.data_ptr()) == (cols == 100)


def test_layers_of_one_input_are_rounded_as_each_by_itself() -> None:
    """K = 96 is whole groups of 32, and padded to one of 128."""
    x = torch.randn(400, 96)
    hessian = x.t() @ x
    names = ("int4_g32", "int8", "int4_g128", "int3_g32")
    weights = [(formats.get(name), torch.randn(48, 96), name) for name in names]
    assert [spec.whole(96) for spec, _, _ in weights] == [96, 96, 128, 96]
    alone = [gptq.quantize(spec, weight, hessian) for spec, weight, _ in weights]
    for (planes, damping), expected in zip(gptq.quantize_all(weights, hessian.clone()), alone, strict=True):
        assert damping == gptq.DAMPING and all(map(torch.equal, planes, expected))
