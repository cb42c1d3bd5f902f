"""Attention kernels on a machine without a GPU: interpreted against float64, and compiled for four targets."""

import pytest
import torch
from triton_programs import HERE, INTEGER, TRITON, Report, reports

from qcompile.codegen import tiles
from qcompile.codegen.triton_attend_tiles import attend_tile, parts
from qcompile.codegen.triton_attention import check_format, triton_attention, triton_prefill
from qcompile.errors import FormatError, KernelBuildError
from qcompile.formats import BUILT_IN, Scheme, get
from qcompile.formats.ranges import why_no_range
from qcompile.target import Target

pytestmark = pytest.mark.skipif(not HERE, reason="Triton is not installed")

ARCHES = (80, 89, 90, 100)
SIXTEEN = {80: {"HMMA"}, 89: {"HMMA"}, 90: {"HGMMA"}, 100: {"UTCHMMA"}}
EIGHT = {80: "IMMA", 89: "QMMA", 90: "QGMMA", 100: "UTCQMMA"}
FRESH = ("fp8 fresh", "int8 fresh", "int8_both fresh")
PROGRAMS = {"interpreter": ("triton_attention_interpreter.py",), "compile 0": ("triton_attention_compile.py", "--part", "0/2"),
            "compile 1": ("triton_attention_compile.py", "--part", "1/2")}  # fmt: skip


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    """What the interpreter program and the compiler program (in two halves) report."""
    return reports(PROGRAMS, tmp_path_factory)


def compiled(programs: dict[str, Report], *kernels: str) -> Report:
    found = [r for r in programs["compile"] if r["kernel"] in kernels]
    assert found, f"nothing was compiled of {kernels}"
    return found


def shown(reports: Report) -> str:
    return "\n".join(map(str, reports))


@pytest.mark.parametrize("check", ["correction", "write", "attend", "prefill", "emulation", "sums"])
def test_interpreted_kernels_match_float64(programs: dict[str, Report], check: str) -> None:
    done = [r for r in programs["interpreter"] if r["check"] == check]
    assert done
    wrong = [r for r in done if not r["error"] <= r["limit"]]
    assert not wrong, shown(wrong)


def test_every_kernel_was_compiled_for_every_target(programs: dict[str, Report]) -> None:
    for kernels in (("few",), ("many",), ("merge",), ("turn",), ("write",), ("fp8 fresh", "int8 fresh"),
                    ("fp8 quantize", "int8 quantize"), ("int8_both fresh",), ("int8_both quantize",)):  # fmt: skip
        assert {r["arch"] for r in compiled(programs, *kernels)} == set(ARCHES), kernels


def test_nothing_spills_and_everything_fits(programs: dict[str, Report]) -> None:
    """Triton 3.6 spills a few registers before and behind a loop."""
    reports, kind = programs["compile"], "spills repeated" if TRITON < (3, 7) else "spills"
    assert not (bad := [r for r in reports if r[kind]]), shown(bad)
    assert not (bad := [r for r in reports if r["shared"] > tiles.SHARED_BYTES[r["arch"]]]), shown(bad)
    assert not (bad := [r for r in reports if not r["stores"]]), "code that stores nothing: " + shown(bad)
    assert not (bad := [r for r in reports if r["registers"] * r["threads"] > tiles.REGISTERS_PER_BLOCK]), shown(bad)


def test_packed_words_are_copied_sixteen_bytes_at_a_time(programs: dict[str, Report]) -> None:
    """Unless a block of tokens has fewer for each thread: then as many as there are."""
    reports = compiled(programs, "few", "many")
    assert not (bad := [r for r in reports if r["copied"] < r["copyable"]]), shown(bad)
    assert not (bad := [r for r in reports if r["kernel"] == "few" and r["arch"] < 100 and r["copied"] < 16]), shown(bad)
    fresh = compiled(programs, *FRESH)
    assert not (bad := [r for r in fresh if r["copied"] < 16]), shown(bad)


def test_products_use_the_matrix_units_of_their_target(programs: dict[str, Report]) -> None:
    reports = compiled(programs, "few", "many")
    assert not (bad := [r for r in reports if not SIXTEEN[r["arch"]] <= set(r["matrix"])]), shown(bad)
    for r in compiled(programs, "fp8 fresh"):
        assert r["matrix"] == [EIGHT[r["arch"]]], shown([r])
    for r in compiled(programs, "int8 fresh", "int8_both fresh"):
        both = {INTEGER[r["arch"]], *SIXTEEN[r["arch"]]}
        assert set(r["matrix"]) == both, shown([r])  # in 16 bits: what turns channels
        assert set(r["repeated"]) == ({INTEGER[r["arch"]]} if r["kernel"] == "int8_both fresh" else both), shown([r])


def test_rounded_probabilities_stay_in_their_registers(programs: dict[str, Report]) -> None:
    """The order of tokens in a block of values is that in which threads hold scores: the only shuffles left are those of the
    maxima and sums of rows, two each for each of a thread's rows."""
    for r in compiled(programs, *FRESH):
        if r["arch"] == 90:
            assert r["shuffles"] <= 8, shown([r])


def test_int8_costs_hardly_more_than_e4m3(programs: dict[str, Report]) -> None:
    """What surrounds two products in int8, instructions of a block of tokens against those around products in e4m3."""
    loops = {(r["kernel"], r["arch"]): r["loop"] for r in compiled(programs, *FRESH) if r["width"] == 128}
    for arch in (90, 100):
        assert 0 < loops["int8_both fresh", arch] <= 1.25 * loops["fp8 fresh", arch], loops


def test_codes_are_stored_in_words(programs: dict[str, Report]) -> None:
    """Channels and tokens change places in registers, not in addresses, which would be of single bytes."""
    for r in compiled(programs, *(name.replace("fresh", "quantize") for name in FRESH)):
        assert r["stores"] <= 16, shown([r])


def test_instructions_for_each_element(programs: dict[str, Report]) -> None:
    """A guard against layouts that stop matching. A step of a decoded block costs a few instructions for each key and value
    element, and the softmax of 16 or 32 queries."""
    for r in compiled(programs, "few"):
        if r["dtype"] != "float32":
            assert 0 < r["loop"] <= 9.0 * r["elements"] + 900, shown([r])


# What needs no Triton at all.


def test_old_gpus_multiply_in_int8_where_fp8_was_asked_for() -> None:
    prefill = triton_prefill("fp8")
    assert [prefill.variant(Target("cuda", arch)) for arch in ("80", "86", "89", "90", "100")] == ["int8"] * 2 + ["fp8"] * 3
    for kind in ("int8", "int8_both"):
        assert {triton_prefill(kind).variant(Target("cuda", arch)) for arch in ("80", "90")} == {kind}
    with pytest.raises(KernelBuildError, match="'int4'.*'fp8', 'int8' or 'int8_both'"):
        triton_prefill("int4")


def test_every_format_of_rows_is_printed_or_says_why_not() -> None:
    for spec in BUILT_IN:
        scheme = Scheme(spec)
        if spec.permuted or any(p.rows != 1 for p in spec.scales):
            with pytest.raises(FormatError, match=f"{spec.name}.*; use"):
                triton_attention(scheme, scheme)
            continue
        kernels = triton_attention(scheme, scheme)
        compile(kernels.source, spec.name, "exec")
        if why_no_range(spec) is None:
            compile(kernels.store_source, spec.name, "exec")
            continue
        with pytest.raises(FormatError, match=spec.name):
            _ = kernels.store_source


@pytest.mark.parametrize("name,found", [
    ("nvfp4", "shared by rows"), ("int4_zp_g128_order", "another order"), ("Q4_K", "cannot hold keys and values"),
    ("mxfp4", "cannot hold keys and values"), ("int4_g48", "a power of two, found 48"),
])  # fmt: skip
def test_formats_that_tokens_cannot_be_written_in_are_named(name: str, found: str) -> None:
    with pytest.raises(FormatError, match=f"{name}.*{found}"):
        check_format(get(name))


def test_names_of_kernels_are_their_own() -> None:
    pairs = [triton_attention(Scheme(get(k)), Scheme(get(v))) for k, v in (("int8", "int8"), ("int8", "int4_g32"))]
    texts = [dict(block.split("(", 1) for block in k.source.split("@triton.jit\ndef ")[1:]) for k in pairs]
    for name in set(texts[0]) & set(texts[1]):
        assert texts[0][name].strip() == texts[1][name].strip(), name


def test_masks_and_tensors_that_no_kernel_takes_are_refused() -> None:
    spec = get("int8")
    kernels = triton_attention(Scheme(spec), Scheme(spec))
    planes = [torch.zeros(1, 1, *spec.part_shape(p, 16, 64), dtype=p.dtype) for p in spec.parts]
    with pytest.raises(KernelBuildError, match="CUDA tensors, found one on cpu"):
        kernels.attend(torch.zeros(1, 1, 1, 64), planes, planes, torch.zeros(1, dtype=torch.int64), 1, 64)
    with pytest.raises(KernelBuildError, match="CUDA tensors, found one on cpu"):
        kernels.write(planes, planes, *[torch.zeros(1, 1, 1, 64)] * 2, torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("rows,left", [(1, True), (32, True), (33, False), (4096, False)])
def test_the_table_chooses_by_queries(rows: int, left: bool) -> None:
    assert all(attend_tile(rows, 128, arch, False, True).left == left for arch in ARCHES)


def test_parts_fill_the_device_and_stay_long_enough() -> None:
    assert parts(90, programs=8, blocks=512) > 16 and parts(90, programs=8, blocks=3) == 1
    assert parts(90, programs=1000, blocks=512) == 1 and parts(90, programs=1, blocks=10**6) == 64
