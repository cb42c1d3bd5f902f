"""Sums for the search of scales: C++ and PyTorch give the same bits, and these are the sums."""

from __future__ import annotations

import pytest
import torch

import qcompile.kernels  # noqa: F401 - names the search in C++
from qcompile.codegen import cpp_moments
from qcompile.formats import REGISTRY, FormatSpec, get, moments
from qcompile.formats.algebra import zero_points
from qcompile.formats.moments import Rounding, total
from qcompile.formats.search import fit, has_search, whole_tensor

SEARCHED = sorted((s for s in REGISTRY.values() if has_search(s)), key=lambda s: s.name)


def given(spec: FormatSpec, groups: int, group: int, weighted: bool) -> tuple[torch.Tensor, ...]:
    made = torch.Generator().manual_seed(groups + group)
    x = torch.randn(groups, group, generator=made)
    w = torch.rand(groups, group, generator=made) if weighted else None
    inverse = torch.rand(3, groups, generator=made) * 8
    inverse[0, 0] = 0
    inverse[1, 1] = 1e20
    return x, w, inverse, torch.randn(3, groups, generator=made)  # type: ignore[return-value]


@pytest.mark.parametrize("spec", SEARCHED, ids=lambda s: s.name)
@pytest.mark.parametrize("weighted", [False, True])
def test_native_sums_have_the_bits_of_pytorchs(spec: FormatSpec, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rounding = Rounding.of(spec)
    group = spec.period or 96
    for groups, size, offset in ((517, group, True), (33, 600, False), (300, 71, True)):
        x, w, inverse, offsets = given(spec, groups, size, weighted)
        monkeypatch.setattr(moments, "_native", [])
        want = moments.moments(spec, x, w, inverse, offsets if offset else None)
        if rounding is None:
            continue
        monkeypatch.setattr(cpp_moments, "SMALL", 0)
        got = cpp_moments.moments(rounding, x, w, inverse, offsets if offset else None)
        assert got is not None and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("spec", [*SEARCHED, get("int4_sym_f32_g64"), get("int4_sym_f16_g128")], ids=lambda s: s.name)
@pytest.mark.parametrize("size", [1e-7, 1.0, 3e4])
def test_the_native_search_finds_the_bits_of_pytorchs(spec: FormatSpec, size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among groups of zeros, of one sign, on a grid and with one weight, under scales that are subnormal or saturate."""
    torch.manual_seed(0)
    weight = torch.randn(37, 1024) * size
    weight[3], weight[4], weight[5], weight[7, 5:] = 0, weight[4].abs(), -weight[5].abs(), 0
    weight[6] = (weight[6] * 3 / size).round() * size
    fixed = whole_tensor(spec, float(weight.min()), float(weight.max()))
    monkeypatch.setattr(cpp_moments, "SMALL", 0)
    asked: list[torch.Tensor] = []
    original = cpp_moments.search
    monkeypatch.setattr(cpp_moments, "search", lambda *a: asked.append(original(*a)) or asked[-1])
    for importance in (None, torch.rand(1024)):
        with monkeypatch.context() as patch:
            found = fit(spec, weight, importance, fixed)
            patch.setattr(moments, "_native", [])
            want = fit(spec, weight, importance, fixed)
        assert torch.equal(found.scale, want.scale)
        assert found.offset is want.offset is None or torch.equal(found.offset, want.offset)  # type: ignore[arg-type]
        assert all(torch.equal(found.entries[name], entry) for name, entry in want.entries.items())
    in_python = zero_points(spec) is not None or spec.name in ("mxfp4", "nvfp4")
    assert len(asked) == (0 if in_python else 2) and all(one is not None for one in asked)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 7, 8, 37, 128])
def test_totals(count: int) -> None:
    terms = torch.randn(count, 50)
    torch.testing.assert_close(total(terms), terms.double().sum(0).float(), rtol=1e-5, atol=1e-6)
    exact = torch.randint(-8, 8, (count, 50)).float()
    assert torch.equal(total(exact), exact.sum(0))


def test_sums_are_those_of_their_definition() -> None:
    spec = REGISTRY["int4_g32"]
    x, w, inverse, offset = given(spec, 600, 32, True)
    b, c, a = (m.double() for m in moments.moments(spec, x, w, inverse, offset))
    for i in range(3):
        wanted = ((x - offset[i][:, None]) * inverse[i][:, None]).double()
        gen = (wanted + 0.5).round() - 0.5 if Rounding.of(spec).shift % 1 else wanted.round()  # type: ignore[union-attr]
        low, high = Rounding.of(spec).low, Rounding.of(spec).high  # type: ignore[union-attr]
        gen = gen.clamp(low, high)
        for got, want in ((b, w * gen * x), (c, w * gen), (a, w * gen * gen)):
            torch.testing.assert_close(got[i], want.sum(1), rtol=1e-4, atol=1e-4)


def test_without_a_compiler_pytorch_computes_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from qcompile.errors import KernelBuildError

    def broken(*_: object) -> None:
        raise KernelBuildError("no C++ compiler was found")

    monkeypatch.setattr(cpp_moments, "load_library", broken)
    cpp_moments._library.cache_clear()
    spec = REGISTRY["int4_g32"]
    arguments = given(spec, 600, 32, False)
    with pytest.warns(UserWarning, match="quantized in PyTorch, with the same results but slower: no C"):
        assert cpp_moments.moments(Rounding.of(spec), *arguments) is None  # type: ignore[arg-type]
    cpp_moments._library.cache_clear()
