"""Generated Triton kernels on a machine without a GPU: interpreted against the reference, and compiled for four targets."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton_cases as cases

from qcompile.codegen import tiles
from qcompile.codegen.triton import triton_kernels
from qcompile.errors import FormatError, KernelBuildError
from qcompile.formats import REGISTRY, ROW, Codebook, FormatSpec, Plane, Scheme, affine, get, reference, symbols
from qcompile.target import Target

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

MATRIX_UNITS = {80: {"HMMA", "IMMA"}, 89: {"HMMA", "IMMA", "QMMA"}, 90: {"HGMMA", "IGMMA", "QGMMA"},
                100: {"UTCHMMA", "UTCIMMA", "UTCQMMA"}}  # fmt: skip

Report = list[dict]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Report]]:
    """What the interpreter program and the compiler program report; both run at once, with empty caches."""
    started = {}
    for name in ("interpreter", "compile"):
        folder = tmp_path_factory.mktemp(name)
        program = Path(__file__).with_name(f"triton_{name}.py")
        env = {**os.environ, "TRITON_CACHE_DIR": str(folder / "triton"), "QCOMPILE_CACHE_DIR": str(folder / "sources")}
        env.pop("TRITON_INTERPRET", None)
        out, err = (folder / "out").open("w+"), (folder / "err").open("w+")
        started[name] = subprocess.Popen([sys.executable, program], stdout=out, stderr=err, env=env), out, err
    reports = {}
    for name, (process, out, err) in started.items():
        code = process.wait(timeout=900)
        out.seek(0), err.seek(0)
        assert code == 0, f"triton_{name}.py ended with {code}: {err.read()[-3000:]}"
        reports[name] = [json.loads(line) for line in out]
        out.close(), err.close()
    yield reports


def compiled(programs: dict[str, Report], *kernels: str) -> Report:
    found = [r for r in programs["compile"] if r["kernel"] in kernels]
    assert found, f"nothing was compiled of {kernels}"
    return found


def shown(reports: Report) -> str:
    keys = ("kernel", "scheme", "arch", "rows", "registers", "spills", "shared", "loop", "weights", "matrix")
    return "\n".join(", ".join(f"{k}={r[k]}" for k in keys) for r in reports)


@pytest.mark.parametrize("check", ["correction", "decode", "product", "quantized", "bfloat16", "shape", "old mma"])
def test_interpreted_kernels_match_the_reference(programs: dict[str, Report], check: str) -> None:
    done = [r for r in programs["interpreter"] if r["check"] == check]
    assert done
    wrong = [r for r in done if not r["error"] <= r["limit"]]
    assert not wrong, "\n".join(map(str, wrong))


def test_the_interpreter_saw_every_format(programs: dict[str, Report]) -> None:
    seen = {(r["check"], r["case"].split(" ")[0]) for r in programs["interpreter"]}
    for scheme in cases.schemes():
        wanted = ("decode", "product") if scheme.activations is None else ("quantized",)
        assert {(check, scheme.label.split(" ")[0]) for check in wanted} <= seen


def test_every_format_was_compiled_for_every_target(programs: dict[str, Report]) -> None:
    for kernels, activated in ((("gemv",), False), (("dot",), False), (("dot8", "dot"), True)):
        seen = {(r["scheme"], r["arch"]) for r in programs["compile"] if r["kernel"] in kernels}
        schemes = [s for s in cases.schemes() if s.format.name in REGISTRY and (s.activations is not None) == activated]
        missing = {(s.label, arch) for s in schemes for arch in MATRIX_UNITS} - seen
        assert not missing


def test_nothing_spills_and_everything_fits(programs: dict[str, Report]) -> None:
    reports = compiled(programs, "gemv", "dot", "dot8", "decode", "quantize", "reduce")
    assert not (bad := [r for r in reports if r["spills"]]), shown(bad)
    assert not (bad := [r for r in reports if r["shared"] > tiles.SHARED_BYTES[r["arch"]]]), shown(bad)
    assert not (bad := [r for r in reports if r["registers"] * r["threads"] > tiles.REGISTERS_PER_BLOCK]), shown(bad)
    assert not (bad := [r for r in reports if not r["stores"]]), "code that stores nothing: " + shown(bad)


def test_products_use_the_matrix_units_of_their_target(programs: dict[str, Report]) -> None:
    reports = compiled(programs, "dot", "dot8")
    assert not (bad := [r for r in reports if not MATRIX_UNITS[r["arch"]] & set(r["matrix"])]), shown(bad)
    eight = [r for r in reports if r["kernel"] == "dot8"]
    assert not (bad := [r for r in eight if not any(m in ("IMMA", "QMMA", "IGMMA", "QGMMA", "UTCIMMA", "UTCQMMA")
                                                    for m in r["matrix"])]), shown(bad)  # fmt: skip
    assert all(not r["matrix"] for r in compiled(programs, "gemv"))


def test_weights_are_copied_sixteen_bytes_at_a_time(programs: dict[str, Report]) -> None:
    bad = [r for r in compiled(programs, "gemv", "dot", "dot8", "decode") if not r["wide_copies"]]
    assert not bad, shown(bad)


def test_scales_are_multiplied_once_per_period(programs: dict[str, Report]) -> None:
    """Inside the loop: one float32 multiply for each accumulator and hoisted factor, one 16-bit pair for two weights."""
    for r in compiled(programs, "dot", "dot8"):
        scaled = r["accumulators"] * r["products"] * (1 + r["offset"])
        assert r["scalar_multiplies"] <= scaled + 24 * r["products"], shown([r])
        assert r["pair_multiplies"] <= r["weights"] * 0.5 + 40, shown([r])
    for r in compiled(programs, "gemv"):
        words = r["weights"] / r["group"]
        assert r["scalar_multiplies"] <= r["weights"] + words * (1 + 2 * r["offset"]) + 24, shown([r])


def test_instructions_for_each_weight(programs: dict[str, Report]) -> None:
    """A guard against layouts that stop matching: then every weight passes through shared memory, at 3 to 5 more."""
    for r in compiled(programs, "gemv"):
        assert r["loop"] <= 7.5 * r["weights"], shown([r])
    for r in compiled(programs, "dot", "dot8"):
        if r["rows"] == 16 and "float32" not in r["dtype"]:
            assert 0 < r["loop"] <= 6.0 * r["weights"], shown([r])


# What needs no Triton at all.


def scheme(name: str, activations: str | None = None) -> Scheme:
    return Scheme(get(name), activations)


@pytest.mark.parametrize("rows,kernel", [(1, "dot"), (16, "dot"), (64, "dot"), (255, "dot"), (256, "decode")])
def test_the_table_chooses_by_rows(rows: int, kernel: str) -> None:
    chosen = triton_kernels(scheme("int4_g128")).variant(rows, torch.bfloat16, Target("cuda", "90"))
    assert chosen.tile.kernel == kernel and chosen.decoded in ("bfloat16", "float16")
    assert triton_kernels(scheme("int8")).variant(1, torch.bfloat16, Target("cuda", "90")).tile.kernel == "gemv"


def test_fp8_activations_need_fp8_units_or_go_through_float16() -> None:
    kernels = triton_kernels(scheme("fp8_e4m3", "fp8"))
    assert kernels.variant(16, torch.bfloat16, Target("cuda", "90")).tile.kernel == "dot8"
    old = kernels.variant(16, torch.bfloat16, Target("cuda", "80"))
    assert (old.tile.kernel, old.operand) == ("dot", "float16")


def test_the_source_depends_on_the_declaration_only_and_names_are_its_own() -> None:
    one, other = triton_kernels(scheme("int4_g128")), triton_kernels(scheme("int4_g64"))
    assert one is triton_kernels(scheme("int4_g128")) and one.source != other.source
    names = [{line for line in k.source.splitlines() if line.startswith("def ")} for k in (one, other)]
    assert not {n.split("(")[0] for n in names[0]} & {n.split("(")[0] for n in names[1]}
    for spec in cases.formats():
        compile(triton_kernels(Scheme(spec)).source, spec.name, "exec")


def test_what_cannot_be_printed_says_why() -> None:
    q, scale = symbols("q scale")
    odd = FormatSpec("odd", (Plane("scale", "f32", 48), Plane("q", "u4")), value=scale * q)
    with pytest.raises(FormatError, match="odd.*every 48 weights.*power of two"):
        triton_kernels(Scheme(odd))
    table = Codebook("LONG", tuple(float(i * i) for i in range(256)))
    long = FormatSpec("long", (Plane("scale", "f32", ROW), Plane("q", "u8")), value=scale * table(q), codebooks=(table,))
    with pytest.raises(FormatError, match="long.*at most 16 values"):
        triton_kernels(Scheme(long))
    six = next(s for s in cases.PRIVATE if affine(s).integer and s.period == 16)
    with pytest.raises(FormatError, match="six_bits.*every 16 weights.*activations=None"):
        triton_kernels(Scheme(six, "int8"))


def test_a_cpu_tensor_is_refused() -> None:
    spec = get("int4_g128")
    planes = reference.quantize(spec, torch.randn(16, 128))
    with pytest.raises(KernelBuildError, match="CUDA tensors, found one on cpu"):
        triton_kernels(Scheme(spec)).linear(torch.randn(1, 128), planes, None, 16)
    with pytest.raises(KernelBuildError, match="float64"):
        triton_kernels(Scheme(spec)).variant(1, torch.float64, Target("cuda", "90"))


@pytest.mark.parametrize("rows", [1, 16, 64])
def test_splits_keep_workspaces_small(rows: int) -> None:
    parts = tiles.splits(90, blocks=32, steps=32, rows=rows, bits=4.0)
    assert parts in (1, 2, 4, 8) and 8 * rows * parts * 4 <= 32 * 16 * 4.0 * max(parts, 1) / 1 or parts == 1
    assert tiles.splits(90, blocks=1000, steps=32, rows=1, bits=4.0) == 1
