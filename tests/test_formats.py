"""Formats as data: algebra, exact sizes, layout, tables, decoding, registry and schemes, over every registered format."""

import ast
import dataclasses
import importlib
import inspect
import itertools
import math
import re
from pathlib import Path
from types import ModuleType

import pytest
import sympy
import torch

import qcompile
from qcompile import formats
from qcompile.errors import FormatError, LayoutError, UnknownFormatError, WeightError
from qcompile.formats import ALL, ROW, Codebook, FormatSpec, Plane, Scheme, affine, reference, scheme_of, symbols
from qcompile.formats.algebra import gen_table, integer_gen, linear_gen
from qcompile.formats.codes import nearest_code, nearest_gen
from qcompile.formats.layout import by_plane, check_planes, pack_plane, unpack_plane
from qcompile.formats.scheme import activations_of

SPECS = [*formats.REGISTRY.values(), formats.scaled(formats.get("Q4_K")), formats.scaled(formats.get("int4_zp_g128_order"))]
each_format = pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
pytestmark = pytest.mark.usefixtures("one_thread")
MODULES = [importlib.import_module(f"qcompile.formats.{name}") for name in ("integer", "float", "codebook", "gguf")]
DOCUMENT = Path(__file__).parents[1] / "docs" / "formats.md"
INTEGERS = ["u1", "u2", "u3", "u4", "u5", "u6", "u7", "u8", "i8"]
q, scale, zero = symbols("q scale zero")


def one_plane(dtype: str, per: int = 1, rows: int = 1) -> FormatSpec:
    """A format with a plane ``p`` of that dtype; if it holds no codes, there are codes ``c`` of 4 bits."""
    p, c = symbols("p c")
    other = Plane("scale", "f32", 32) if per == 1 else Plane("c", "u4")
    return FormatSpec("one", (Plane("p", dtype, per, rows), other), scale * p if per == 1 else p * c)


def entries_like(spec: FormatSpec, plane: Plane, n: int, k: int, seed: int = 0) -> torch.Tensor:
    """Random entries of a plane: every pattern of integers, floats from 0.5 to 1.5."""
    shape, generator = spec.entry_shape(plane, n, k), torch.Generator().manual_seed(seed)
    if plane.is_integer:
        return torch.randint(0, 2**plane.bits, shape, generator=generator, dtype=torch.uint8).view(plane.entry_dtype)
    return (torch.rand(shape, generator=generator) + 0.5).to(plane.entry_dtype)


# Algebra -------------------------------------------------------------------------------------------------------------


@each_format
def test_affine_form_is_the_value(spec: FormatSpec) -> None:
    form = affine(spec)
    assert sympy.expand(form.coeff * form.gen + form.offset - spec.value) == 0
    assert spec.code.name not in {s.name for s in (form.coeff + form.offset).free_symbols}
    assert {s.name for s in form.gen.free_symbols} == {spec.code.name}
    assert form.period == spec.period
    assert all(p.per == ROW or p.per % form.period == 0 for p in spec.scales)


@pytest.mark.parametrize("value", ["scale**q", "scale*q + other*q**2", "scale*q**2 + q"])
def test_values_that_are_not_affine_are_refused(value: str) -> None:
    names = {s: symbols(s)[0] for s in ("scale", "q", "other")}
    expr = sympy.sympify(value, locals=names)
    planes = [Plane("q", "u4")] + [Plane(n, "f32", 32) for n in ("scale", "other") if names[n] in expr.free_symbols]
    with pytest.raises(FormatError, match="format 'f'"):
        affine(FormatSpec("f", tuple(planes), expr))


@each_format
def test_linear_and_integer_values_are_those_of_the_table(spec: FormatSpec) -> None:
    table, linear, integer = gen_table(spec), linear_gen(spec), integer_gen(spec)
    assert table.shape == (2**spec.code.bits,)
    if linear is not None:
        codes = torch.arange(len(table), dtype=torch.uint8).view(spec.code.entry_dtype).double()
        assert torch.equal(linear[0] * codes + linear[1], table)
    if integer is not None:
        assert torch.equal(integer[0] * torch.tensor(integer[1], dtype=torch.float64), table)
        assert max(integer[1]) - min(integer[1]) <= 255
    assert (linear is None) == bool(spec.code.name in str(affine(spec).gen.atoms(sympy.Function)))


# Sizes ---------------------------------------------------------------------------------------------------------------

BITS = {
    "fp8_e4m3": "8 + 32/K", "fp8_e5m2": "8 + 32/K", "fp8_e4m3_tensor": "8 + 32/(N*K)", "fp8_e5m2_tensor": "8 + 32/(N*K)",
    "fp8_e3m4": "8 + 32/K", "fp8_e4m3_b128": "8 + 1/512", "fp8_e5m2_b128": "8 + 1/512", "int8": "8 + 32/K",
    **{f"int8_g{group}": f"8 + 16/{group}" for group in (32, 64, 128)},
    **{f"int{bits}_g{group}": f"{bits} + 32/{group}" for bits in range(2, 7) for group in (32, 64, 128)},
    **{f"int{bits}_sym_g{group}": f"{bits} + 16/{group}" for bits in range(2, 7) for group in (32, 64, 128)},
    **{f"int{bits}_zp_g128{order}": f"{bits} + (16 + {bits})/128{add}"
       for bits in (2, 3, 4, 8) for order, add in (("", ""), ("_order", " + 32/N"))},
    "mxfp4": "17/4", "nvfp4": "9/2 + 32/(N*K)", "nf4": "9/2", "fp4": "9/2", "nf4_dq": "4 + 1/8 + 1/512",
    "Q4_0": "9/2", "Q4_1": "5", "Q5_0": "11/2", "Q5_1": "6", "Q8_0": "17/2", "Q2_K": "21/8", "Q3_K": "55/16", "Q4_K": "9/2",
    "Q5_K": "11/2", "Q6_K": "105/16", "IQ4_NL": "9/2", "IQ4_XS": "17/4",
}  # fmt: skip
"""Bits per weight of an N×K weight, by definition of each format; some are only made by asking."""


@pytest.mark.parametrize("name", BITS)
def test_bits_per_weight_are_exact(name: str) -> None:
    sizes = {"N": sympy.Symbol("N", positive=True), "K": sympy.Symbol("K", positive=True)}
    spec, wanted = formats.get(name), sympy.sympify(BITS[name], locals=sizes)
    assert sympy.simplify(spec.bits_per_weight() - wanted) == 0
    assert spec.bits_per_weight(64, 512) == wanted.subs({sizes["N"]: 64, sizes["K"]: 512})


def test_every_format_of_the_library_has_its_bits_listed() -> None:
    assert {spec.name for module in MODULES for spec in module.FORMATS} <= set(BITS)


@each_format
def test_bytes_are_those_of_the_planes_and_of_the_declaration(spec: FormatSpec) -> None:
    """Entries that rows share are stored once for each tile of 16 rows, all others once."""
    n, k = 256, math.lcm(1024, spec.k_multiple)
    planes = reference.quantize(spec, torch.randn(n, k))
    declared = spec.bits_per_weight(n, k) * n * k / 8
    shared = [p for p in spec.scales if p.rows != 1]
    for plane in shared:
        each_row = sympy.Rational(plane.bits, 8) * n * (1 if plane.per == ROW else k // plane.per)
        declared += each_row / 16 - each_row / (plane.rows or n)
    assert sum(p.nbytes for p in planes) == spec.nbytes(n, k) == declared


# Layout --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", INTEGERS)
def test_codes_are_laid_out_as_documented(dtype: str) -> None:
    spec, n, k = one_plane(dtype), 32, 128
    plane = spec.code
    codes = entries_like(spec, plane, n, k)
    stored = pack_plane(spec, plane, codes, n, k)
    assert [part.bits for part in plane.parts] == [b for b in (8, 4, 2, 1) if b & plane.bits]
    for part, tensor in zip(plane.parts, stored, strict=True):
        bits, per_word = part.bits, 32 // part.bits
        assert tensor.shape == (2, k // per_word, 16) and tensor.dtype == torch.int32 and tensor.is_contiguous()
        words = tensor.to(torch.int64) & 0xFFFFFFFF
        for t, w, lane in itertools.product((0, 1), (0, k // per_word - 1), (0, 7, 15)):
            for s, j in itertools.product(range(8 // bits), range(4)):
                code = (int(words[t, w, lane]) >> (8 * j + bits * s)) & (2**bits - 1)
                whole = int(codes.view(torch.uint8)[16 * t + lane, per_word * w + 4 * s + j])
                assert code == (whole >> part.shift) & (2**bits - 1)
    assert torch.equal(unpack_plane(plane, stored, n), codes)


@pytest.mark.parametrize("dtype", [*INTEGERS, "f32", "f16", "bf16"])
@pytest.mark.parametrize("rows", [1, 16, 64, ALL])
def test_scales_are_laid_out_as_documented(dtype: str, rows: int) -> None:
    spec = one_plane(dtype, 16, rows)
    plane, n, k = spec.planes[0], 72, 16 * 24
    entries = entries_like(spec, plane, n, k)
    stored = pack_plane(spec, plane, entries, n, k)
    height, lanes = rows or n, 16 if rows == 1 else 1
    assert stored[0].shape[0] == 5 and stored[0].shape[2] == lanes
    for part, tensor in zip(plane.parts, stored, strict=True):
        each = 8 // part.bits if plane.is_integer else 1
        assert tensor.shape[1] == 24 // each
        assert tensor.dtype == (torch.uint8 if plane.is_integer else plane.entry_dtype)
        for tile, entry, lane in itertools.product((0, 2, 4), (0, 1, 7, 23), (0, 7) if lanes == 16 else (0,)):
            row = (16 * tile + lane) // height
            wanted, found = entries[row, entry], tensor[tile, entry // each, lane]
            if plane.is_integer:
                mask = 2**part.bits - 1
                assert (int(found) >> (part.bits * (entry % each))) & mask == (int(wanted) >> part.shift) & mask
            else:
                assert found == wanted
    assert torch.equal(unpack_plane(plane, stored, n), entries.repeat_interleave(height, 0)[:n])


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("n,k", [(1, 1), (5, 3), (17, 100)])
def test_padding_is_zero(dtype: str, n: int, k: int) -> None:
    spec = one_plane(dtype)
    codes = torch.full((n, k), 255 >> (8 - spec.code.bits), dtype=torch.uint8).view(spec.code.entry_dtype)
    stored = pack_plane(spec, spec.code, codes, n, k)
    rows, cols = spec.padded(n, k)
    whole = unpack_plane(spec.code, stored, rows)
    assert whole.shape == (rows, cols) and rows % 16 == 0 and cols % spec.k_multiple == 0
    assert torch.equal(whole[:n, :k], codes)
    assert not whole[n:].any() and not whole[:, k:].any()


def test_planes_of_other_sizes_are_refused() -> None:
    spec = formats.get("int4_g32")
    planes = reference.quantize(spec, torch.zeros(16, 64))
    check_planes(spec, planes, 16, 64)
    with pytest.raises(LayoutError, match="plane 'scale'.*16×96"):
        reference.decode(spec, planes, 16, 96)
    with pytest.raises(LayoutError, match="3 planes, found 2"):
        reference.decode(spec, planes[:2], 16, 64)
    with pytest.raises(LayoutError, match=r"layers\.0.*torch.int32.*found torch.int64"):
        check_planes(spec, [*planes[:2], planes[2].long()], 16, 64, "layers.0")
    with pytest.raises(LayoutError, match="plane 'order'"):
        check_planes(formats.get("int4_zp_g128_order"), [*reference.quantize(formats.get("int4_zp_g128"), torch.ones(16, 256)),
                                                         torch.arange(256)], 16, 256)  # fmt: skip


# Decoding ------------------------------------------------------------------------------------------------------------


@each_format
def test_decoding_is_the_value_for_every_code(spec: FormatSpec) -> None:
    n, k = 16, math.lcm(spec.k_multiple, 256)
    entries = {p.name: entries_like(spec, p, n, k, seed) for seed, p in enumerate(spec.planes)}
    patterns = torch.arange(n * k) % 2**spec.code.bits
    entries[spec.code.name] = patterns.to(torch.uint8).view(n, k).view(spec.code.entry_dtype)
    planes = [part for p in spec.planes for part in pack_plane(spec, p, entries[p.name], n, k)]
    order = torch.randperm(k, generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    factors = torch.rand(k, generator=torch.Generator().manual_seed(1)) + 0.5
    decoded = reference.decode(spec, planes + [order] * spec.permuted + [factors] * spec.scaled, n, k)
    wide = {
        p.name: entries[p.name].repeat_interleave(p.rows or n, 0)[:n].repeat_interleave(p.per or k, 1)[:, :k]
        for p in spec.planes
    }
    expected = _evaluated(spec, wide)
    if spec.permuted:
        expected = expected[:, order.argsort()]
    if spec.scaled:
        expected = expected * factors
    torch.testing.assert_close(decoded, expected.float(), rtol=1e-5, atol=1e-6, equal_nan=True)


def _evaluated(spec: FormatSpec, wide: dict[str, torch.Tensor]) -> torch.Tensor:
    """``spec.value`` in float64, as sympy states it; no word of the affine form."""
    tables = {b.name: torch.tensor(b.values, dtype=torch.float64) for b in spec.codebooks}
    names = sorted(s.name for s in spec.value.free_symbols)
    called = {s.name for f in spec.value.atoms(sympy.Function) for s in f.free_symbols}
    modules = [{name: (lambda code, table=table: table[code.long()]) for name, table in tables.items()}]
    arguments = [next(s for s in spec.value.free_symbols if s.name == name) for name in names]
    function = sympy.lambdify(arguments, spec.value, modules=modules)
    return function(*(wide[n].view(torch.uint8) if n in called else wide[n].double() for n in names))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_decoding_rounds_once_to_the_dtype_asked_for(dtype: torch.dtype) -> None:
    spec, weight = formats.get("Q4_K"), torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    planes = reference.quantize(spec, weight)
    assert torch.equal(
        reference.decode(spec, planes, 16, 256, dtype), reference.decode(spec, planes, 16, 256).to(dtype)
    )


def test_stored_columns_go_to_their_places() -> None:
    permuted, plain = formats.get("int4_zp_g128_order"), formats.get("int4_zp_g128")
    weight = torch.randn(20, 300, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    planes = reference.quantize(permuted, weight[:, order])
    assert torch.equal(planes[-1], torch.arange(300, dtype=torch.int32))
    decoded = reference.decode(permuted, [*planes[:-1], order], 20, 300)
    stored = reference.decode(plain, planes[:-1], 20, 300)
    assert torch.equal(decoded[:, order], stored)
    assert (decoded - weight).norm() < 0.15 * weight.norm()
    assert torch.equal(reference.decode(permuted, planes, 20, 300), stored)


def test_factors_of_columns_are_part_of_the_weight() -> None:
    plain = formats.get("int4_g32")
    spec = formats.get("int4_g32_scaled")
    assert spec == formats.scaled(plain) and spec.plain == plain and "int4_g32_scaled" not in formats.names()
    assert spec.fingerprint != plain.fingerprint and spec.nbytes(16, 256) == plain.nbytes(16, 256) + 4 * 256
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    factors = torch.rand(256, generator=torch.Generator().manual_seed(1)) + 0.5
    planes = reference.quantize(spec, weight, factors=factors)
    assert torch.equal(planes[-1], factors)
    stored = reference.decode(plain, planes[:-1], 16, 256)
    assert torch.equal(reference.decode(spec, planes, 16, 256), stored * factors)
    assert (reference.decode(spec, planes, 16, 256) - weight).norm() < 0.15 * weight.norm()
    x = torch.randn(3, 256)
    torch.testing.assert_close(reference.prepared(spec, x, planes) @ stored.t(),
                               x @ reference.decode(spec, planes, 16, 256).t())  # fmt: skip
    assert torch.equal(reference.quantize(spec, weight)[-1], torch.ones(256))


def test_factors_are_checked() -> None:
    weight, spec = torch.randn(16, 64), formats.get("int8_scaled")
    for bad in (torch.ones(63), torch.zeros(64), torch.full((64,), float("nan"))):
        with pytest.raises(WeightError, match=r"up_proj: factors must be \[64\], positive and finite"):
            reference.quantize(spec, weight, "up_proj", factors=bad)
    with pytest.raises(FormatError, match="has no factors for columns"):
        reference.quantize(formats.get("int8"), weight, factors=torch.ones(64))
    with pytest.raises(FormatError, match="end in '_scaled'"):
        dataclasses.replace(spec, scaled=False)


@each_format
def test_chunks_of_rows_do_not_change_the_result(spec: FormatSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to what the order of additions changes; what is kept by rows is then equal."""
    weight = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    whole = reference.decode(spec, reference.quantize(spec, weight), 300, 64)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 16 * 64)
    planes = reference.quantize(spec, weight)
    decoded = reference.decode(spec, planes, 300, 64)
    assert (decoded != whole).double().mean() < 0.01
    exact = 10 * torch.log10(weight.square().sum() / (weight - decoded).square().sum())
    assert abs(reference.sqnr(spec, planes, weight) - float(exact)) < 1e-3


@each_format
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_are_read(spec: FormatSpec, dtype: torch.dtype) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    for ours, wide in zip(reference.quantize(spec, weight), reference.quantize(spec, weight.float()), strict=True):
        assert torch.equal(ours, wide)


def test_bad_weights_are_named() -> None:
    spec, bad = formats.get("int4_g32"), torch.zeros(4, 4)
    for value in (math.nan, math.inf):
        bad[2, 1] = value
        with pytest.raises(WeightError, match=r"layers\.3\.mlp.*NaN"):
            reference.quantize(spec, bad, "layers.3.mlp")
    for shape in ((4,), (2, 4, 4, 4)):
        with pytest.raises(WeightError, match="2-D float weight"):
            reference.quantize(spec, torch.zeros(shape))
    with pytest.raises(WeightError, match=r"experts\[2\].*NaN"):
        reference.quantize(spec, torch.stack([torch.zeros(4, 4), torch.zeros(4, 4), bad]), "experts")
    with pytest.raises(WeightError, match="int64"):
        reference.quantize(spec, torch.zeros(4, 4, dtype=torch.int64))
    for importance in (torch.ones(5), -torch.ones(4), torch.full((4,), math.nan)):
        with pytest.raises(WeightError, match=r"importance must be \[4\]"):
            reference.quantize(spec, torch.zeros(4, 4), importance=importance)


# Tables and rounding -------------------------------------------------------------------------------------------------


def e2m1_of_torchao() -> torch.Tensor:
    """float32 ``[16]``: torchao's decoding; torch has no conversion from its ``float4_e2m1fn_x2``."""
    from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32

    return f4_unpacked_to_f32(torch.arange(16, dtype=torch.uint8))


def table_of(name: str) -> torch.Tensor:
    return torch.tensor(next(b for s in SPECS for b in s.codebooks if b.name == name).values)


@pytest.mark.parametrize("name,dtype", [("E4M3", "float8_e4m3fn"), ("E5M2", "float8_e5m2"), ("E8M0", "float8_e8m0fnu")])
def test_tables_of_8_bits_are_those_of_torch(name: str, dtype: str) -> None:
    wanted = torch.arange(256, dtype=torch.uint8).view(getattr(torch, dtype)).float()
    torch.testing.assert_close(table_of(name), wanted, rtol=0, atol=0, equal_nan=True)
    real = ~wanted.isnan()
    assert torch.equal(table_of(name)[real].signbit(), wanted[real].signbit())


def test_table_of_e2m1_is_that_of_torchao() -> None:
    assert torch.equal(table_of("E2M1"), e2m1_of_torchao())
    assert torch.equal(table_of("E2M1").signbit(), e2m1_of_torchao().signbit())


@pytest.mark.parametrize("name,dtype", [("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)])
def test_fp8_rounds_as_torch_does(name: str, dtype: torch.dtype) -> None:
    spec = formats.get(name)
    finite = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    finite = finite[torch.isfinite(finite)].sort().values
    wanted = _with_halves(finite)
    assert torch.equal(nearest_code(spec, wanted.clone()), wanted.to(dtype).view(torch.uint8))
    beyond = nearest_code(spec, torch.tensor([1e9, -1e9, math.inf, -math.inf])).view(dtype).float()
    assert torch.equal(beyond, torch.stack([finite.max(), finite.min()]).repeat(2))
    assert nearest_code(spec, torch.tensor([math.nan])).view(dtype).float().isnan()


def _with_halves(values: torch.Tensor) -> torch.Tensor:
    """Sorted ``values``, the middles between neighbours, and the floats just below and above those."""
    middles = (values[1:] + values[:-1]) / 2
    return torch.cat([values, middles, *(middles.nextafter(torch.tensor(end)) for end in (-math.inf, math.inf))])


def test_e2m1_rounds_as_torchao_does() -> None:
    from torchao.prototype.mx_formats.kernels import f32_to_f4_unpacked

    wanted = torch.cat([_with_halves(table_of("E2M1").unique()), torch.tensor([7.0, -7.0, 1e9, -1e9])])
    book = Codebook("E2M1", tuple(table_of("E2M1").tolist()), minifloat=(2, 1))
    spec = FormatSpec("f", (Plane("scale", "f32", 32), Plane("q", "u4")), scale * book(q), (book,))
    codes = nearest_code(spec, wanted.clone())
    assert torch.equal(table_of("E2M1")[codes.long()], table_of("E2M1")[f32_to_f4_unpacked(wanted).long()])
    assert nearest_code(spec, torch.tensor([math.nan])).item() < 16


@each_format
def test_the_nearest_code_is_nearest(spec: FormatSpec) -> None:
    table = gen_table(spec)
    finite = table[torch.isfinite(table)].unique()
    span = float(finite[-1] - finite[0])
    wanted = torch.cat(
        [
            _with_halves(finite.float()),
            torch.linspace(float(finite[0]) - 0.1 * span, float(finite[-1]) + 0.1 * span, 999),
        ]
    )
    found = table[nearest_code(spec, wanted.clone()).view(torch.uint8).long()]
    best = (finite - wanted.double().unsqueeze(-1)).abs().amin(-1)
    assert ((found - wanted).abs() <= best + 1e-6 * span).all()
    rough = nearest_gen(spec, wanted.clone()).double()
    assert ((rough - wanted).abs() <= best + span / 4095).all()


@pytest.mark.parametrize("name", ["int4_g32", "int8", "Q6_K", "int4_zp_g128"])
def test_ties_of_linear_codes_go_to_the_even_one(name: str) -> None:
    spec = formats.get(name)
    step, base = linear_gen(spec) or (0, 0)
    codes = nearest_code(spec, step * (torch.arange(0, 12) + 0.5) + base)
    assert torch.equal(codes, torch.tensor([0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12]).to(codes.dtype))


# Registry, schemes, fingerprints -------------------------------------------------------------------------------------


def test_formats_are_found_by_name_in_whatever_case() -> None:
    assert formats.get("q4_k") is formats.get("Q4_K") and formats.get("NF4") is formats.get("nf4")
    assert formats.get("MXFP4") is formats.get("mxfp4")
    made = formats.get("int3_g96")
    assert made is formats.get("INT3_G96") and made.bits_per_weight() == 3 + sympy.Rational(1, 3) and made.period == 96
    assert formats.get("nf4_g128").bits_per_weight() == sympy.Rational(17, 4)
    assert formats.get("int4_zp_g64_order").permuted and not formats.get("int4_zp_g64").permuted
    assert [formats.find(n) for n in ("int3_g0", "int3_g1", "int7_g64", "int4_g", "int9_zp_g64", "int4")] == [None] * 6


@pytest.mark.parametrize(
    "wrong,right", [("int4_g", "int4_g32"), ("int4g32", "int4_g32"), ("nf5", "nf4"), ("Q4K", "Q4_K")]
)
def test_a_wrong_name_gets_near_ones(wrong: str, right: str) -> None:
    with pytest.raises(UnknownFormatError, match=rf"unknown format '{wrong}'. Did you mean .*'{right}'"):
        formats.get(wrong)


def test_clashes_are_refused() -> None:
    for name in ("int8", "INT8", "int3_g160"):
        clash = FormatSpec(name, (Plane("scale", "f32", 64), Plane("q", "i8")), scale * q)
        with pytest.raises(FormatError, match="registered already with another declaration"):
            formats.register_format(clash)
    assert formats.register_format(formats.get("int8")) is formats.get("int8")


def test_a_format_that_is_not_affine_is_not_registered() -> None:
    with pytest.raises(FormatError, match="mixes codes and scales"):
        formats.register_format(FormatSpec("power", (Plane("scale", "f32", 64), Plane("q", "u4")), scale**q))
    assert formats.find("power") is None


SCALE, CODE = Plane("scale", "f32", 64), Plane("q", "u4")
BOOK = Codebook("T", tuple(map(float, range(16))))


@pytest.mark.parametrize("planes,value,message", [
    ((SCALE,), scale * q, "planes are"),
    ((SCALE, CODE, CODE), scale * q, "one name"),
    ((SCALE, Plane("q", "u3"), Plane("q_2", "u4", 32)), scale * q * symbols("q_2")[0], "one name"),
    ((SCALE, CODE, Plane("zero", "u4")), scale * (q - zero), "exactly one plane holds codes"),
    ((SCALE,), scale, "exactly one plane holds codes"),
    ((SCALE, CODE), scale * BOOK(q), "not in codebooks"),
])  # fmt: skip
def test_declarations_that_do_not_fit_are_refused(planes: tuple[Plane, ...], value: sympy.Expr, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        FormatSpec("x", planes, value)


@pytest.mark.parametrize("arguments,message", [
    (("q", "u9"), "unknown dtype"), (("q", "f32"), "per=1"), (("q", "u4", 1, 16), "per=1"), (("Q", "u4"), "lower-case"),
    (("q", "u4", ROW), "8 bits or a float"), (("q", "f32", 32, 8), "a multiple of 16, or ALL"), (("q", "f32", -1), "per=-1"),
])  # fmt: skip
def test_planes_that_cannot_be_are_refused(arguments: tuple[str, str], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Plane(*arguments)
    with pytest.raises(FormatError, match="letters, digits and _"):
        FormatSpec("a b", (SCALE, CODE), scale * q)


def test_values_without_a_product_of_planes_need_a_quantizer() -> None:
    a, b = symbols("a b")
    planes = (Plane("a", "f32", 64), Plane("b", "f32", 64), CODE)
    with pytest.raises(FormatError, match="give quantizer="):
        reference.quantize(FormatSpec("sum", planes, (a + b) * q), torch.ones(16, 64))

    def all_ones(spec: FormatSpec, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        codes = torch.ones(weight.shape, dtype=torch.uint8)
        return {"a": weight[:, ::64] / 4, "b": weight[:, ::64] * 0.75, "q": codes}

    spec = FormatSpec("sum", planes, (a + b) * q, quantizer=all_ones)
    decoded = reference.decode(spec, reference.quantize(spec, torch.ones(16, 100)), 16, 100)
    assert torch.equal(decoded, torch.ones(16, 100))


def test_schemes_and_their_keys() -> None:
    int8, fp8 = formats.get("int8"), formats.get("fp8_e4m3")
    assert scheme_of(Scheme(int8, "int8").key) == Scheme(int8, "int8")
    assert scheme_of(Scheme(formats.get("Q4_K")).key).format is formats.get("Q4_K")
    assert Scheme(int8).key != Scheme(int8, "int8").key
    for spec, activations in [(fp8, "int8"), (int8, "fp8"), (int8, "int3")]:
        with pytest.raises(FormatError, match="activations"):
            Scheme(spec, activations)
    with pytest.raises(UnknownFormatError):
        scheme_of("int8@0000000000000000")


@each_format
def test_activations_that_a_format_takes(spec: FormatSpec) -> None:
    """int8: integer codes of all kinds, e2m1 (halves) and IQ4 (a table of integers); fp8: only the fp8 that devices multiply."""
    name = spec.name.lower()
    none = name.startswith(("nf4", "fp4", "fp8_e3m4"))
    wanted = () if none else ("fp8",) if name.startswith("fp8_") else ("int8",)
    assert activations_of(spec) == wanted
    for activations in ("int8", "fp8"):
        if activations in wanted:
            assert Scheme(spec, activations).label == f"{spec.name}+{activations} act"
        else:
            with pytest.raises(FormatError, match=f"{spec.name} is not one"):
                Scheme(spec, activations)


def test_fingerprint_covers_every_deciding_field() -> None:
    base = {"name": "f", "planes": (Plane("scale", "f32", 32), CODE), "value": scale * (q - 8)}
    changed = [
        base | {"name": "g"},
        base | {"value": scale * (q - 7)},
        base | {"permuted": True},
        base | {"planes": (Plane("scale", "f16", 32), CODE)},
        base | {"planes": (Plane("scale", "f32", 64), CODE)},
        base | {"planes": (Plane("scale", "f32", 32, 16), CODE)},
        base | {"planes": (CODE, Plane("scale", "f32", 32))},
        base | {"planes": (Plane("scale", "f32", 32), Plane("q", "u5"))},
    ]
    prints = {FormatSpec(**fields).fingerprint for fields in [base, *changed]}
    books = [BOOK, Codebook("T", (1.0,) * 16), Codebook("T", BOOK.values, minifloat=(2, 1)), Codebook("U", BOOK.values)]
    prints |= {FormatSpec("f", base["planes"], scale * b(q), (b,)).fingerprint for b in books}
    assert len(prints) == 1 + len(changed) + len(books)
    # How scales are found does not change what stored planes stand for.
    assert (
        FormatSpec(**base, shrinks=(), quantizer=lambda spec, weight: {}).fingerprint == FormatSpec(**base).fingerprint
    )
    assert len({s.fingerprint for s in SPECS}) == len(SPECS)


@each_format
def test_a_copy_of_a_declaration_is_equal(spec: FormatSpec) -> None:
    copy = FormatSpec(spec.name, spec.planes, spec.value, spec.codebooks, permuted=spec.permuted, scaled=spec.scaled)
    assert copy.fingerprint == spec.fingerprint and copy.part_names == spec.part_names
    grouped = by_plane(spec, [torch.empty(0)] * len(spec.parts))
    assert list(grouped) == [p.name for p in spec.planes] and sum(map(len, grouped.values())) == len(spec.parts)


# docs/formats.md -----------------------------------------------------------------------------------------------------

MAKERS = {"fp8_": "fp8", "_zp_": "zero_point", "_sym_": "symmetric", "int8": "int8", "int": "asymmetric"}
"""What a name has in it → the function that declares such formats; the first that fits."""


def lines_of_declaration(spec: FormatSpec, module: ModuleType) -> int:
    """Lines of source that declare ``spec``: its own call, and the function called unless it is ``FormatSpec`` itself."""
    tree = ast.parse(inspect.getsource(module))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            if isinstance(node.args[0], ast.Constant) and node.args[0].value == spec.name:
                made = functions.get(node.func.id)
                return _lines(node) + (_lines_without_docstring(made) if made else 0)
    name = next(maker for part, maker in MAKERS.items() if part in spec.name)
    return _lines_without_docstring(functions[name])


def _lines(node: ast.expr | ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _lines_without_docstring(function: ast.FunctionDef) -> int:
    return _lines(function) - (_lines(function.body[0]) if ast.get_docstring(function) else 0)


def described(plane: Plane) -> str:
    """``d f16/256``: dtype, and the weights of a row (× rows) that share an entry."""
    if plane.is_code:
        return f"{plane.name} {plane.dtype}"
    if plane.rows == ALL:
        return f"{plane.name} {plane.dtype}/tensor"
    per = "row" if plane.per == ROW else str(plane.per)
    return f"{plane.name} {plane.dtype}/{per}" + (f"×{plane.rows}" if plane.rows != 1 else "")


def table_of_formats() -> str:
    """The table of docs/formats.md."""
    lines = ["| format | value of a weight | planes | bits per weight | lines |", "|---|---|---|---|---|"]
    for module in MODULES:
        for spec in module.FORMATS:
            planes, (bits, rest) = ", ".join(map(described, spec.planes)), spec.bits_per_weight().as_coeff_Add()
            size = f"{float(bits)!r}".removesuffix(".0") + (f" + {rest}".replace("*", "·") if rest else "")
            value = str(spec.value).replace("*", "·")
            lines.append(f"| `{spec.name}` | {value} | {planes} | {size} | {lines_of_declaration(spec, module)} |")
    return "\n".join(lines) + "\n"


def test_the_table_of_formats_is_true() -> None:
    assert table_of_formats() in DOCUMENT.read_text()


def test_the_format_of_the_document_works() -> None:
    example = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.S)[0]
    try:
        exec(example, {})
        spec = formats.get("ternary_256")
        assert spec.bits_per_weight() == 2 + sympy.Rational(1, 16) and activations_of(spec) == ("int8",)
        weight = torch.randn(20, 600, generator=torch.Generator().manual_seed(0))
        planes = reference.quantize(spec, weight)
        grouped = by_plane(spec, planes)
        codes, scales = (unpack_plane(p, grouped[p.name], 20) for p in (spec.code, spec.scales[0]))
        assert set(codes[:, :600].flatten().tolist()) == {0, 1, 2} and scales.shape == (20, 3)
        decoded = reference.decode(spec, planes, 20, 600)
        wide = scales.float().repeat_interleave(256, 1)[:, :600]
        assert torch.equal(decoded, wide * (codes[:, :600].float() - 1))
        assert (decoded - weight).norm() < 0.55 * weight.norm()
        assert scheme_of(Scheme(spec, "int8").key).format is spec
        assert qcompile.Policy.parse({"*": "ternary_256"}).rules[0].label == "ternary_256"
    finally:
        formats.REGISTRY.pop("ternary_256", None)
