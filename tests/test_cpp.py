"""Generated CPU kernels against the reference: products, decoding, activations, instruction sets."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from qcompile.codegen.cpp import CpuKernels, cpu_kernels
from qcompile.errors import FormatError, LayoutError
from qcompile.formats import ALL, REGISTRY, ROW, Codebook, FormatSpec, Plane, Scheme, get, scaled, symbols
from qcompile.formats.layout import pack_plane
from qcompile.formats.reference import decode, quantize
from qcompile.kernels import Kernels, for_scheme

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
ROWS = (0, 1, 3, 16, 24, 65, 300)
SHAPES = ((37, 100), (64, 384))
TURNS = {"int8": 4, "int4_g128": 4, "nf4_g64": 4, "fp8_e4m3": 2, "Q8_0": 4, "Q4_K": 1, "Q4_K+int8": 2, "int8+int8": 4}
q, scale, zero, d, sc = symbols("q scale zero d sc")
NF4 = Codebook("NF4", tuple(torch.linspace(-1, 1, 16).pow(3).tolist()))
BOOK = Codebook("BOOK", tuple(torch.linspace(-3, 5, 256).sin().tolist()))
CUBES = Codebook("CUBES", tuple(float(round((c - 16) ** 3 / 40)) for c in range(32)))
PRIVATE = (
    FormatSpec("six_bits", (Plane("d", "f16", 256), Plane("sc", "f32", 16), Plane("q", "u6")), d * sc * (q - 32)),
    FormatSpec("seven_bits", (Plane("scale", "bf16", 32), Plane("zero", "f16", 32), Plane("q", "u7")), scale * q + zero),
    FormatSpec("cubes", (Plane("scale", "f16", 128), Plane("q", "u5")), scale * CUBES(q), (CUBES,)),
    FormatSpec("bits", (Plane("scale", "f32", 64), Plane("q", "u1")), scale * (2 * q - 1)),
    FormatSpec("normal_float", (Plane("scale", "f32", 64), Plane("q", "u4")), scale * NF4(q), (NF4,)),
    FormatSpec("ternary", (Plane("scale", "f32", ROW), Plane("q", "u2")), scale * (q - 1)),
    FormatSpec("odd_steps", (Plane("scale", "f32", 1024), Plane("zero", "f32", 24), Plane("q", "u4")),
               scale * (3 * q - 8) + zero),
    FormatSpec("table", (Plane("scale", "f32", ROW), Plane("zero", "f32", ROW), Plane("q", "u8")),
               scale * BOOK(q) + zero, (BOOK,)),
    FormatSpec("coded", (Plane("scale", "f16", 96, 32), Plane("sc", "u7", 12), Plane("zero", "u3", 48, ALL), Plane("q", "u3")),
               scale * BOOK(sc) * q - scale * NF4(zero), (BOOK, NF4)),
)  # fmt: skip


def legal(spec: FormatSpec) -> list[Scheme]:
    schemes = []
    for activations in (None, "int8", "fp8"):
        try:
            schemes.append(Scheme(spec, activations))
        except FormatError:
            continue
    return schemes


REGISTERED = [scheme for spec in REGISTRY.values() for scheme in legal(spec)]
FACTORS = [scaled(REGISTRY[name]) for name in ("int4_g128", "Q4_K", "int4_zp_g128_order", "int8")]
UNREGISTERED = [scheme for spec in PRIVATE for scheme in legal(spec)]


def label(value: object) -> str | None:
    return value.label if isinstance(value, Scheme) else None


def random_planes(spec: FormatSpec, n: int, k: int) -> list[torch.Tensor]:
    """Planes of every code value and scales of either sign, in the stored layout."""
    planes = []
    for plane in spec.planes:
        shape = spec.entry_shape(plane, n, k)
        entries = torch.randn(shape)
        if plane.is_integer:
            limit = 2**plane.bits - (1 if plane.bits == 8 and not plane.is_code else 0)  # e8m0 and e4m3 scales end in NaN
            entries = torch.randint(0, limit, shape).to(torch.uint8).view(plane.entry_dtype)
            if not plane.is_code and plane.bits == 8 and plane.dtype == "u8":
                entries = entries % 32 + 100  # near one, for float sums
        planes += pack_plane(spec, plane, entries, n, k)
    order, factors = [torch.randperm(k).int()] * spec.permuted, [torch.rand(k) + 0.5] * spec.scaled
    return planes + order + factors


def as_multiplied(x: torch.Tensor, activations: str | None) -> torch.Tensor:
    """float64 of x after the scheme's quantization of activations."""
    if activations is None:
        return x.double()
    limit = 127.0 if activations == "int8" else 448.0
    step = x.float().abs().amax(-1, keepdim=True) / limit
    step = torch.where(step == 0, 1.0, step)
    ratio = x.float() / step
    codes = ratio.round().clamp(-127, 127) if activations == "int8" else ratio.clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.double() * step.double()


def rounded_to_bf16(spec: FormatSpec, planes: list[torch.Tensor], n: int, k: int) -> list[torch.Tensor]:
    """float64 [N, K] of what kernels in bf16 may multiply: the weights rounded, or, where scale and zero are of whole rows and
    wait for the sum, only what the codes stand for."""
    books = tuple(replace(b, values=tuple(torch.tensor(b.values).bfloat16().tolist())) for b in spec.codebooks)
    return [
        decode(spec, planes, n, k).bfloat16().double(),
        decode(replace(spec, codebooks=books), planes, n, k).double(),
    ]


def variant(kernels: Kernels, rows: int, dtype: torch.dtype) -> str:
    return getattr(kernels, "inner", kernels).variant(rows, dtype)


def check_linear(
    kernels: Kernels, scheme: Scheme, planes: list[torch.Tensor], weight: torch.Tensor, rows: int, dtype: torch.dtype,
    biased: bool,
) -> None:  # fmt: skip
    """Against ``weight`` [N, K] in float64. Allowed: rounding of y and 1e-6 of the norms for float32 sums."""
    n, k = weight.shape
    x = torch.randn(rows, k).to(dtype)
    bias = torch.randn(n).to(dtype) if biased else None
    y = kernels.linear(x, planes, bias, n)
    assert y.shape == (rows, n) and y.dtype == dtype
    wide = as_multiplied(x, scheme.activations)
    in_bf16 = variant(kernels, rows, dtype).endswith("_bf16") and dtype == torch.bfloat16
    worst = []
    for multiplied in [weight, *(rounded_to_bf16(scheme.format, planes, n, k) if in_bf16 else [])]:
        expected = wide @ multiplied.T + (0 if bias is None else bias.double())
        sums = torch.outer(wide.norm(dim=1), multiplied.norm(dim=1))
        allowed = UNIT_ROUNDOFF[dtype] * expected.abs() + 1e-6 * sums + 1e-6
        worst.append(((y.double() - expected).abs() / allowed).max().item() if rows else 0.0)
    assert min(worst) <= 1.0, (scheme.label, n, k, rows, dtype, worst)


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """All kernels are built first, as many at a time as there are processors."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda s: for_scheme(s, "cpu"), [*REGISTERED, *UNREGISTERED]))


@pytest.mark.parametrize("scheme", REGISTERED, ids=label)
def test_linear_of_registered_formats(scheme: Scheme) -> None:
    torch.manual_seed(0)
    kernels = for_scheme(scheme, "cpu")
    for n, k in SHAPES:
        planes = quantize(scheme.format, torch.randn(n, k))
        weight = decode(scheme.format, planes, n, k).double()
        for rows in ROWS:
            for i, dtype in enumerate(DTYPES):
                check_linear(kernels, scheme, planes, weight, rows, dtype, biased=(rows + i) % 2 == 0)


@pytest.mark.parametrize("name", TURNS)
def test_rows_that_take_turns_each_get_what_they_get_alone(name: str) -> None:
    """Bit for bit, for every number of rows that a kernel of few rows serves; a panel may sum in another order."""
    torch.manual_seed(0)
    fmt, _, activations = name.partition("+")
    scheme = Scheme(get(fmt), activations or None)
    kernels, planes = for_scheme(scheme, "cpu"), quantize(scheme.format, torch.randn(40, 256))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(128, 256).to(dtype)
        for rows in (17, 24, 31, 33, 48, 61, 64):
            if variant(kernels, rows, dtype) == variant(kernels, 16, dtype):
                y, first, last = (kernels.linear(part, planes, None, 40) for part in (x[:rows], x[:16], x[rows - 16 : rows]))
                assert torch.equal(y[:16], first) and torch.equal(y[-16:], last)
        most = {rows for rows in range(17, 129) if variant(kernels, rows, dtype) == variant(kernels, 16, dtype)}
        if torch.backends.cpu.get_cpu_capability() == "AVX512":
            assert len(most) == 16 * (TURNS[name] - 1) and most == set(range(17, 17 + len(most)))


@pytest.mark.parametrize("spec", FACTORS, ids=lambda s: s.name)
def test_inputs_are_multiplied_by_factors_of_columns(spec: FormatSpec) -> None:
    torch.manual_seed(1)
    kernels, (n, k) = for_scheme(Scheme(spec), "cpu"), (37, 300)
    planes = quantize(spec, torch.randn(n, k), factors=torch.rand(k) + 0.5)
    weight = decode(spec, planes, n, k).double()
    for rows in (1, 5, 40):
        check_linear(kernels, Scheme(spec), planes, weight, rows, torch.float32, biased=rows == 5)


@pytest.mark.parametrize("scheme", UNREGISTERED, ids=label)
def test_linear_and_decode_of_other_formats(scheme: Scheme) -> None:
    """Codes and scales of odd bits, scales of scales at two periods and shared by rows, tables, periods above a panel's depth
    and off powers of two."""
    torch.manual_seed(1)
    kernels, spec = cpu_kernels(scheme), scheme.format
    for n, k in ((37, 100), (70, 2100)):
        planes = random_planes(spec, n, k)
        weight = decode(spec, planes, n, k)
        assert torch.equal(kernels.decode(planes, n, k, torch.float32), weight)
        weight = weight.double()
        for rows in (1, 5, 17, 40):
            check_linear(kernels, scheme, planes, weight, rows, torch.float32, biased=False)
            check_linear(kernels, scheme, planes, weight, rows, torch.bfloat16, biased=True)


@pytest.mark.parametrize("spec", [*REGISTRY.values(), *FACTORS], ids=lambda s: s.name)
def test_decode_is_the_reference_for_every_code(spec: FormatSpec) -> None:
    torch.manual_seed(2)
    n, k = 37, 420
    planes = random_planes(spec, n, k)
    for dtype in (*DTYPES, torch.float64):
        got = for_scheme(Scheme(spec), "cpu").decode(planes, n, k, dtype)
        assert got.dtype == dtype
        want = decode(spec, planes, n, k, dtype)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        index = torch.randint(0, n, (3, 5))
        rows = for_scheme(Scheme(spec), "cpu").rows(planes, index, n, k, dtype)
        torch.testing.assert_close(rows, want[index], rtol=0, atol=0, equal_nan=True)


def test_nan_codes_of_fp8_decode_to_nan() -> None:
    spec = REGISTRY["fp8_e4m3"]
    weight = torch.tensor([[0x7F, 0xFF, 0x7E, 0x01]], dtype=torch.uint8)
    planes = [*pack_plane(spec, spec.planes[0], torch.ones(1, 1), 1, 4), *pack_plane(spec, spec.planes[1], weight, 1, 4)]
    got = cpu_kernels(Scheme(spec)).decode(planes, 1, 4, torch.float32)[0]
    assert got[:2].isnan().all() and got[2:].tolist() == [448.0, 2.0**-9]


@pytest.mark.parametrize("isa", ["avx2", "generic"])
@pytest.mark.parametrize("name", ["int4_g64", "int4_g64+int8", "int8+int8", "fp8_e4m3+fp8"])
def test_other_instruction_sets(isa: str, name: str) -> None:
    torch.manual_seed(3)
    fmt, _, activations = name.partition("+")
    scheme = Scheme(REGISTRY[fmt], activations or None)
    if isa == "avx2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this CPU has no AVX2")
    kernels = CpuKernels(scheme, isa)
    for n, k in SHAPES:
        planes = random_planes(scheme.format, n, k)
        if fmt == "fp8_e4m3":
            planes = quantize(scheme.format, torch.randn(n, k))
        weight = decode(scheme.format, planes, n, k).double()
        for dtype in DTYPES:
            assert torch.equal(kernels.decode(planes, n, k, dtype), decode(scheme.format, planes, n, k, dtype))
            for rows in (1, 2, 3, 4, 5, 7, 16, 65):
                check_linear(kernels, scheme, planes, weight, rows, dtype, biased=rows == 4)


# Activations ---------------------------------------------------------------------------------------------------------


def identity(spec: FormatSpec, code: int, k: int) -> list[torch.Tensor]:
    """Planes of the k×k matrix with scale 1 whose diagonal holds ``code``."""
    codes = torch.eye(k, dtype=torch.uint8) * code
    return [s for p in spec.planes for s in pack_plane(spec, p, codes if p.is_code else torch.ones(k, 1), k, k)]


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("activations, fmt, one", [("int8", "int8", 1), ("fp8", "fp8_e4m3", 0x38)])
def test_activations_round_as_torch_does(activations: str, fmt: str, one: int, rows: int) -> None:
    """Through an identity weight y is the dequantized x: ties, subnormals and all signs included, exactly."""
    kernels, limit = cpu_kernels(Scheme(REGISTRY[fmt], activations)), 127.0 if activations == "int8" else 448.0
    if activations == "int8":
        values = torch.arange(-253, 254) / 2
    else:
        finite = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        finite = finite[finite.isfinite()].sort().values
        values = torch.cat([finite, (finite[1:] + finite[:-1]) / 2])
    x = torch.cat([values, torch.tensor([limit])])[None].expand(rows, -1).contiguous()
    x[rows // 2 :] *= 1.7
    k = x.shape[1]
    y = kernels.linear(x, identity(REGISTRY[fmt], one, k), None, k)
    assert torch.equal(y.double(), as_multiplied(x, activations).float().double())


def test_integer_sums_are_exact() -> None:
    torch.manual_seed(4)
    spec, (n, k) = REGISTRY["int8"], (48, 1000)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    planes = [s for p in spec.planes for s in pack_plane(spec, p, weight if p.is_code else torch.ones(n, 1), n, k)]
    for rows in (1, 2, 9, 100):
        x = torch.randint(-127, 128, (rows, k))
        x[:, 0] = 127
        y = cpu_kernels(Scheme(spec, "int8")).linear(x.float(), planes, None, n)
        assert torch.equal(y.long(), x @ weight.long().T)


@pytest.mark.parametrize(
    "scheme", [Scheme(REGISTRY["int4_g32"], "int8"), Scheme(REGISTRY["fp8_e5m2"], "fp8")], ids=label
)
def test_rows_of_zeros_and_not_finite_rows(scheme: Scheme) -> None:
    planes = quantize(scheme.format, torch.randn(32, 64))
    for rows in (4, 30):
        x = torch.randn(rows, 64)
        x[0], x[1, 3], x[2, 5] = 0.0, float("nan"), float("inf")
        y = cpu_kernels(scheme).linear(x, planes, None, 32)
        assert (y[0] == 0).all() and y[1:3].isnan().all() and y[3:].isfinite().all()


# Tensors as callers have them ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_shape_and_stride_of_x(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    scheme, n, k = Scheme(REGISTRY["int4_g32"]), 40, 96
    planes, kernels, bias = (
        quantize(scheme.format, torch.randn(n, k)),
        cpu_kernels(scheme),
        torch.randn(n, dtype=torch.float64),
    )
    base = torch.randn(7 * 5 * (k + 3) + 1).to(dtype)
    inputs = [
        base[:k], base[1 : k + 1], base[: 5 * k].view(k, 5).T, base[: 5 * (k + 3)].view(5, k + 3)[:, 1 : k + 1],
        base[:k].expand(20, k), base[: 35 * k].view(7, 5, k)[:, ::2], base[: 4 * k].view(4, 1, k), base.new_empty(3, 0, k),
    ]  # fmt: skip
    for x in inputs:
        y = kernels.linear(x, planes, bias, n)
        plain = kernels.linear(
            x.clone(memory_format=torch.contiguous_format).reshape(-1, k), planes, bias.to(torch.float32), n
        )
        assert y.shape == (*x.shape[:-1], n) and torch.equal(y.reshape(-1, n), plain)


def test_misfits_are_refused() -> None:
    scheme = Scheme(REGISTRY["int4_g32"])
    planes, kernels = quantize(scheme.format, torch.randn(32, 64)), cpu_kernels(scheme)
    x = torch.randn(2, 64)
    with pytest.raises(LayoutError, match="float64 on cpu; convert it"):
        kernels.linear(x.double(), planes, None, 32)
    with pytest.raises(LayoutError, match="plane 'scale'"):
        kernels.linear(torch.randn(2, 128), planes, None, 32)
    with pytest.raises(LayoutError, match="plane 'q'"):
        kernels.linear(x, planes, None, 32)
        kernels.linear(x, [*planes[:2], planes[2][:, :-1]], None, 32)
    with pytest.raises(LayoutError, match="contiguous"):
        kernels.linear(x, [*planes[:2], torch.cat([planes[2]] * 2, 2)[:, :, ::2]], None, 32)
    with pytest.raises(LayoutError, match=r"bias must be a float CPU tensor \[32\]"):
        kernels.linear(x, planes, torch.randn(31), 32)
    with pytest.raises(FormatError, match="multiple of 4"):
        CpuKernels(Scheme(FormatSpec("pairs", (Plane("scale", "f32", 2), Plane("q", "u4")), scale * q)))
    with pytest.raises(FormatError, match="go with formats with integer values"):
        CpuKernels(Scheme(FormatSpec("wide", (Plane("scale", "f32", ROW), Plane("q", "u8")), scale * (3 * q)), "int8"))
    wide = torch.empty(1, 131104).to(torch.float32)
    with pytest.raises(LayoutError, match="overflows int32"):
        cpu_kernels(Scheme(REGISTRY["int8"], "int8")).linear(wide, quantize(REGISTRY["int8"], wide.zero_()), None, 1)


def test_threads_do_not_change_results_and_calls_may_overlap() -> None:
    torch.manual_seed(6)
    scheme, n, k = Scheme(REGISTRY["int4_g128"], "int8"), 200, 512
    planes, kernels = quantize(scheme.format, torch.randn(n, k)), cpu_kernels(scheme)
    inputs = [torch.randn(rows, k) for rows in (1, 6, 33, 200)] * 6
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [kernels.linear(x, planes, None, n) for x in inputs]
    finally:
        torch.set_num_threads(threads)
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda x: kernels.linear(x, planes, None, n), inputs))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
