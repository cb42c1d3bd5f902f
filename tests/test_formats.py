"""Formats as data: algebra, exact sizes, layout, reference quantizer and decoder, over every registered format."""

import itertools

import pytest
import sympy
import torch

from qcompile import formats
from qcompile.errors import FormatError, LayoutError, UnknownFormatError, WeightError
from qcompile.formats import ROW, Codebook, FormatSpec, Plane, Scheme, affine, reference, scheme_of, symbols
from qcompile.formats.algebra import gen_table
from qcompile.formats.layout import check_planes, pack_plane, unpack_plane

SPECS = list(formats.REGISTRY.values())
each_format = pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
SHAPES = [(1, 1), (16, 32), (37, 100), (64, 384), (5, 257)]


@each_format
def test_affine_form_is_the_value(spec: FormatSpec) -> None:
    form = affine(spec)
    assert sympy.expand(form.coeff * form.gen + form.offset - spec.value) == 0
    codes = {p.name for p in spec.codes}
    assert not {s.name for s in (form.coeff + form.offset).free_symbols} & codes
    assert {s.name for s in form.gen.free_symbols} == codes


def test_affine_form_of_the_formats_to_come() -> None:
    d, dmin, sc, m, q, absmax, ql, qh = symbols("d dmin sc m q absmax ql qh")
    code = (Plane("q", "u4"),)
    q4_k = FormatSpec("q4_k", (Plane("d", "f16", 256), Plane("dmin", "f16", 256), Plane("sc", "f32", 32),
                               Plane("m", "f32", 32), *code), d * sc * q - dmin * m)  # fmt: skip
    form = affine(q4_k)
    assert (form.coeff, form.gen, form.offset, form.period) == (d * sc, q, -dmin * m, 32)
    assert form.integer
    q6_k = FormatSpec("q6_k", (Plane("d", "f16", 256), Plane("sc", "f32", 16), Plane("ql", "u4"), Plane("qh", "u2")),
                      d * sc * (ql + 16 * qh - 32))  # fmt: skip
    form = affine(q6_k)
    assert form.coeff == d * sc and sympy.expand(form.gen - ql - 16 * qh + 32) == 0 and form.offset == 0
    book = Codebook("NF4", tuple(float(v) for v in range(16)))
    nf4 = FormatSpec("nf4", (Plane("absmax", "f32", 64), *code), absmax * book(q), (book,))
    assert affine(nf4).gen == book(q) and not affine(nf4).integer


@pytest.mark.parametrize("value", ["scale**q", "scale*q + other*q", "scale*q**2 + q"])
def test_values_that_are_not_affine_are_refused(value: str) -> None:
    names = {s: symbols(s)[0] for s in ("scale", "q", "other")}
    expr = sympy.sympify(value, locals=names)
    planes = [Plane("q", "u4")] + [Plane(n, "f32", 32) for n in ("scale", "other") if names[n] in expr.free_symbols]
    with pytest.raises(FormatError, match="f"):
        affine(FormatSpec("f", tuple(planes), expr))


def test_bits_per_weight_are_exact() -> None:
    bits = {s.name: s.bits_per_weight(4096) for s in SPECS}
    assert bits["int4_g128"] == sympy.Rational(17, 4)
    assert bits["int4_sym_g128"] == sympy.Rational(33, 8)
    assert bits["int4_g32"] == 5 and bits["int8_g32"] == sympy.Rational(17, 2)
    assert bits["int8"] == bits["fp8_e4m3"] == 8 + sympy.Rational(32, 4096)


@each_format
def test_bytes_are_those_of_the_planes_and_of_the_declaration(spec: FormatSpec) -> None:
    planes = reference.quantize(spec, torch.randn(64, 512))
    assert sum(p.nbytes for p in planes) == spec.nbytes(64, 512) == spec.bits_per_weight(512) * 64 * 512 / 8


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8", "i8"])
def test_layout_is_as_documented(dtype: str) -> None:
    plane = Plane("q", dtype)
    bits, per_word = plane.bits, 32 // plane.bits
    codes = torch.randint(0, 2**bits, (32, 64), dtype=torch.uint8)
    stored = pack_plane(plane, codes.view(torch.int8) if dtype == "i8" else codes, (2, 64 // per_word, 16))
    words = stored.to(torch.int64) & 0xFFFFFFFF
    for t, w, lane in itertools.product((0, 1), (0, 64 // per_word - 1), (0, 7, 15)):
        for s, j in itertools.product(range(8 // bits), range(4)):
            code = (int(words[t, w, lane]) >> (8 * j + bits * s)) & (2**bits - 1)
            assert code == codes[16 * t + lane, per_word * w + 4 * s + j]
    assert torch.equal(unpack_plane(plane, stored, 32).view(torch.uint8), codes)


@each_format
@pytest.mark.parametrize("n,k", SHAPES)
def test_min_max_decodes_to_within_half_a_step(
    spec: FormatSpec, n: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "FITTED_BITS", 0)
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n * k))
    planes = reference.quantize(spec, weight)
    check_planes(spec, planes, n, k)
    decoded = reference.decode(spec, planes, n, k)
    table = gen_table(spec)
    steps = table[torch.isfinite(table)].sort().values.diff()
    largest_gap = float(steps.max())
    scale = unpack_plane(spec.planes[0], planes[0], n).float()
    scale = scale.repeat_interleave(spec.period or spec.padded(n, k)[1], 1)[:, :k]
    # Half of the largest gap, and what rounding scale and offset to bfloat16 can move the ends by.
    slack = 2**-7 * weight.abs().max() if spec.scales[0].dtype == "bf16" else 1e-6
    assert ((decoded - weight).abs() <= scale * largest_gap / 2 + slack).all()


@each_format
@pytest.mark.parametrize("n,k", SHAPES)
def test_no_group_is_worse_than_under_min_max(
    spec: FormatSpec, n: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n * k))
    padded, period = spec.padded(n, k)[1], spec.period or spec.padded(n, k)[1]

    def errors() -> torch.Tensor:
        planes = reference.quantize(spec, weight)
        check_planes(spec, planes, n, k)
        difference = reference.decode(spec, planes, n, k).double() - weight
        return torch.nn.functional.pad(difference, (0, padded - k)).square().view(n, -1, period).sum(-1)

    fitted = errors()
    monkeypatch.setattr(reference, "FITTED_BITS", 0)
    min_max = errors()
    assert (fitted <= min_max * (1 + 1e-5) + 1e-12).all()
    is_fitted = spec.codes[0].bits <= 4 and k >= 100
    assert fitted.sum() < 0.97 * min_max.sum() if is_fitted else fitted.sum() <= min_max.sum()


@each_format
def test_decoding_is_the_value_for_every_code(spec: FormatSpec) -> None:
    patterns = torch.arange(2 ** spec.codes[0].bits, dtype=torch.uint8)
    n, k = 16, spec.padded(16, 256)[1]
    codes = patterns.repeat(-(-n * k // len(patterns)))[: n * k].view(n, k)
    entries = {p.name: torch.rand(n, 1 if p.per == ROW else k // p.per).to(p.storage_dtype) for p in spec.scales}
    entries[spec.codes[0].name] = codes.view(torch.int8) if spec.codes[0].dtype == "i8" else codes
    planes = [pack_plane(p, entries[p.name], spec.plane_shape(p, n, k)) for p in spec.planes]
    decoded = reference.decode(spec, planes, n, k)
    wide = {p.name: entries[p.name].float().repeat_interleave(p.per or k, 1).double() for p in spec.scales}
    expected = wide["scale"] * gen_table(spec)[codes.long()] + wide.get("zero", torch.zeros(()))
    torch.testing.assert_close(decoded.double(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name,dtype", [("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)])
def test_fp8_rounds_as_torch_does(name: str, dtype: torch.dtype) -> None:
    spec = formats.get(name)
    finite = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    torch.testing.assert_close(torch.tensor(spec.codebooks[0].values), finite, rtol=0, atol=0, equal_nan=True)
    finite = finite[torch.isfinite(finite)].sort().values
    halfway = (finite[1:] + finite[:-1]) / 2
    wanted = torch.cat([finite, halfway])
    assert torch.equal(reference.nearest_code(spec, wanted.clone()), wanted.to(dtype).view(torch.uint8))
    beyond = reference.nearest_code(spec, torch.tensor([1e9, -1e9]))
    assert torch.equal(beyond.view(dtype).float(), torch.tensor([finite.max(), finite.min()]))


@each_format
def test_constant_and_zero_weights_are_exact(spec: FormatSpec) -> None:
    for value in (0.0, 0.5, -3.0):
        weight = torch.full((20, 128), value)
        decoded = reference.decode(spec, reference.quantize(spec, weight), 20, 128)
        torch.testing.assert_close(decoded, weight, rtol=2**-8, atol=0)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(100, 64)
    whole = [reference.quantize(s, weight) for s in SPECS]
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 16 * 64)
    for spec, planes in zip(SPECS, whole, strict=True):
        for a, b in zip(planes, reference.quantize(spec, weight), strict=True):
            assert torch.equal(a, b)
        exact = 10 * torch.log10(
            weight.square().sum() / (weight - reference.decode(spec, planes, 100, 64)).square().sum()
        )
        assert abs(reference.sqnr(spec, planes, weight) - float(exact)) < 1e-3


def test_bad_weights_are_named() -> None:
    spec = formats.get("int4_g32")
    bad = torch.zeros(4, 4)
    bad[2, 1] = float("nan")
    with pytest.raises(WeightError, match=r"layers\.3\.mlp.*NaN"):
        reference.quantize(spec, bad, "layers.3.mlp")
    with pytest.raises(WeightError, match="2-D float weight"):
        reference.quantize(spec, torch.zeros(4, 4, 4))
    with pytest.raises(WeightError, match="int64"):
        reference.quantize(spec, torch.zeros(4, 4, dtype=torch.int64))
    planes = reference.quantize(spec, torch.zeros(16, 64))
    with pytest.raises(LayoutError, match="plane 'scale'.*16×96"):
        reference.decode(spec, planes, 16, 96)
    with pytest.raises(LayoutError, match="3 planes, found 2"):
        reference.decode(spec, planes[:2], 16, 64)


def test_registry_refuses_and_suggests() -> None:
    with pytest.raises(UnknownFormatError, match="Did you mean 'int4_g32'"):
        formats.get("int4_g33")
    q, scale = symbols("q scale")
    clash = FormatSpec("int8", (Plane("scale", "f32", 64), Plane("q", "i8")), scale * q)
    with pytest.raises(FormatError, match="registered already"):
        formats.register_format(clash)
    assert formats.register_format(formats.get("int8")) is formats.get("int8")
    for planes, message in [
        ((Plane("scale", "f32", 64),), "planes are"),
        ((Plane("scale", "f32", 64), Plane("q", "u4"), Plane("q", "u4")), "one name"),
    ]:
        with pytest.raises(FormatError, match=message):
            FormatSpec("x", planes, scale * q)
    for arguments, message in [(("q", "u3"), "unknown dtype"), (("q", "u4", 32), "per=1"), (("Q", "u4"), "lower-case")]:
        with pytest.raises(FormatError, match=message):
            Plane(*arguments)


def test_schemes_and_their_keys() -> None:
    int8, fp8 = formats.get("int8"), formats.get("fp8_e4m3")
    assert scheme_of(Scheme(int8, "int8").key) == Scheme(int8, "int8")
    assert Scheme(int8).key != Scheme(int8, "int8").key
    for spec, activations in [(fp8, "int8"), (int8, "fp8"), (int8, "int3")]:
        with pytest.raises(FormatError, match="activations"):
            Scheme(spec, activations)
    with pytest.raises(UnknownFormatError):
        scheme_of("int8@0000000000000000")


def test_fingerprint_covers_every_deciding_field() -> None:
    q, scale = symbols("q scale")
    base = {"name": "f", "planes": (Plane("scale", "f32", 32), Plane("q", "u4")), "value": scale * (q - 8)}
    changed = [
        base | {"value": scale * (q - 7)},
        base | {"planes": (Plane("scale", "f16", 32), Plane("q", "u4"))},
        base | {"planes": (Plane("scale", "f32", 64), Plane("q", "u4"))},
        base | {"name": "g"},
    ]
    prints = {FormatSpec(**fields).fingerprint for fields in [base, *changed]}
    books = [Codebook("T", (0.0,) * 16), Codebook("T", (1.0,) * 16)]
    prints |= {FormatSpec("f", base["planes"], scale * b(q), (b,)).fingerprint for b in books}
    assert len(prints) == len(changed) + 3
