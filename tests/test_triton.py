"""Generated Triton kernels on a machine without a GPU: interpreted against the reference, and compiled for five targets."""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton_cases as cases
from triton_programs import HERE, INTEGER, Report, reports

from qcompile.codegen import tiles
from qcompile.codegen.triton import TritonKernels, triton_kernels
from qcompile.errors import FormatError, KernelBuildError
from qcompile.formats import BUILT_IN, Codebook, FormatSpec, Plane, Scheme, get, reference, symbols
from qcompile.target import Target

pytestmark = pytest.mark.skipif(not HERE, reason="Triton is not installed")

AMD = 94
MATRIX_UNITS = {80: {"HMMA", "IMMA"}, 89: {"HMMA", "IMMA", "QMMA"}, 90: {"HGMMA", "IGMMA", "QGMMA"},
                100: {"UTCHMMA", INTEGER[100], "UTCQMMA"}}  # fmt: skip
PROGRAMS = {"interpreter": ("triton_interpreter.py",), "compile 0": ("triton_compile.py", "--part", "0/2"),
            "compile 1": ("triton_compile.py", "--part", "1/2")}  # fmt: skip
if "QCOMPILE_TEST_EVERYTHING" in os.environ:  # every format for every target in every tile: an hour on two cores
    PROGRAMS = {name: (*words, "--everything") for name, words in PROGRAMS.items()}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    """What the interpreter program and the compiler program (in two halves) report."""
    print("representatives:", ", ".join(s.name for s in cases.representatives()))
    return reports(PROGRAMS, tmp_path_factory)


def compiled(programs: dict[str, Report], *kernels: str, amd: bool = False) -> Report:
    found = [r for r in programs["compile"] if r["kernel"] in kernels and (amd or r["arch"] != AMD)]
    assert found, f"nothing was compiled of {kernels}"
    return found


def shown(reports: Report) -> str:
    keys = ("kernel", "scheme", "arch", "rows", "dtype", "registers", "spills", "shared", "loop", "weights", "matrix")
    more = ("scalar_multiplies", "pair_multiplies", "permutes", "selects", "products", "accumulators", "offset")
    return "\n".join(", ".join(f"{k}={r[k]}" for k in (*keys, *more) if k in r) for r in reports)


CHECKS = ("correction", "decode", "product", "quantized", "select", "bfloat16", "shape", "experts", "old mma")


@pytest.mark.parametrize("check", CHECKS)
def test_interpreted_kernels_match_the_reference(programs: dict[str, Report], check: str) -> None:
    done = [r for r in programs["interpreter"] if r["check"] == check]
    assert done
    wrong = [r for r in done if not r["error"] <= r["limit"]]
    assert not wrong, "\n".join(map(str, wrong))


ASSEMBLY = """
import json, torch
from triton_compile import Compiled
from qcompile.formats import Scheme, get
kernels = Compiled(Scheme(get("int4_g128")), 90)
before = kernels.machine_code()
for rows, dtype in ((1, torch.float32), (16, torch.float16)):
    kernels.run(rows, dtype, bias=False)
print(json.dumps([before, kernels.machine_code()]))
"""


def test_what_was_compiled_can_be_read(tmp_path: Path) -> None:
    """The assembly that reports show: of kernels that ran, with what they were specialized for."""
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "QCOMPILE_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", ASSEMBLY], cwd=Path(__file__).parent, env=env, check=True,
                         capture_output=True, text=True)  # fmt: skip
    before, code = json.loads(run.stdout)
    assert before == {}
    for kernel in ("gemv", "dot"):
        (name,) = (name for name in code if name.startswith(kernel))
        text = code[name]
        assert "for 90: " in name and "warps, " in name and "BT=" in name
        assert ".target sm_90" in text and f".entry {name.split()[0]}" in text and ".loc" not in text
        assert ("wgmma" in text or "mma.sync" in text) == (kernel == "dot")


def test_the_interpreter_saw_every_representative(programs: dict[str, Report]) -> None:
    seen = {(r["check"], r["case"].split(" ")[0]) for r in programs["interpreter"]}
    for scheme in cases.schemes():
        wanted = ("decode", "product") if scheme.activations is None else ("quantized",)
        assert {(check, scheme.label.split(" ")[0]) for check in wanted} <= seen


def test_every_registered_format_has_a_representative() -> None:
    """Of formats that differ in their groups only, one stands for all; printing is tried for each."""
    assert {cases.kind(s) for s in BUILT_IN if not s.permuted} == {cases.kind(s) for s in cases.representatives()}
    for spec in BUILT_IN:
        compile(triton_kernels(Scheme(spec)).source, spec.name, "exec")


def test_every_way_of_decoding_was_compiled_for_every_target(programs: dict[str, Report]) -> None:
    for kernels, decoders in ((("gemv",), 3), (("dot",), 3), (("dot8",), 3), (("decode",), 2), (("rows",), 2)):
        for arch in MATRIX_UNITS:
            seen = {r["decoder"] for r in compiled(programs, *kernels) if r["arch"] == arch}
            assert len(seen) >= (decoders if kernels[0] == "dot" else 1), (kernels, arch, seen)
        assert len({r["decoder"] for r in compiled(programs, *kernels)}) >= decoders
    tables = {r["scheme"] for r in programs["compile"] if r["arch"] == AMD and r["kernel"] in ("dot", "dot8")}
    assert {"nf4", "IQ4_NL", "IQ4_NL+int8 act"} <= tables


def test_nothing_spills_and_everything_fits(programs: dict[str, Report]) -> None:
    reports = compiled(programs, "gemv", "dot", "dot8", "decode", "rows", "quantize", "reduce", amd=True)
    assert not (bad := [r for r in reports if r["spills"]]), shown(bad)
    assert not (bad := [r for r in reports if r["shared"] > tiles.SHARED_BYTES[r["arch"]]]), shown(bad)
    assert not (bad := [r for r in reports if not r["stores"]]), "code that stores nothing: " + shown(bad)
    reports = compiled(programs, "gemv", "dot", "dot8", "decode", "rows")
    assert not (bad := [r for r in reports if r["registers"] * r["threads"] > tiles.REGISTERS_PER_BLOCK]), shown(bad)


def test_products_use_the_matrix_units_of_their_target(programs: dict[str, Report]) -> None:
    reports = compiled(programs, "dot", "dot8")
    assert not (bad := [r for r in reports if not MATRIX_UNITS[r["arch"]] & set(r["matrix"])]), shown(bad)
    eight = [r for r in reports if r["kernel"] == "dot8"]
    assert not (bad := [r for r in eight if not any(m in ("IMMA", "QMMA", "IGMMA", "QGMMA", "UTCIMMA", "UTCQMMA")
                                                    for m in r["matrix"])]), shown(bad)  # fmt: skip
    assert all(not r["matrix"] for r in compiled(programs, "gemv"))
    amd = [r for r in compiled(programs, "dot", "dot8", amd=True) if r["arch"] == AMD]
    assert not (bad := [r for r in amd if not r["matrix"]]), shown(bad)


def test_weights_are_copied_sixteen_bytes_at_a_time(programs: dict[str, Report]) -> None:
    """Unless the words of one product are fewer than 16 bytes for each thread: then as many as there are."""
    reports = compiled(programs, "gemv", "dot", "dot8", "decode")
    assert not (bad := [r for r in reports if r["copied"] < r["copyable"]]), shown(bad)
    products = [r for r in compiled(programs, "dot", "dot8") if r["direct"] and r["threads"] == 128 and "32" not in r["dtype"]]
    wide = compiled(programs, "gemv") + products
    assert not (bad := [r for r in wide if r["copied"] < 16]), shown(bad)


def test_scales_are_multiplied_once_per_period(programs: dict[str, Report]) -> None:
    """Inside the loop: one float32 multiply for each accumulator and hoisted factor, one 16-bit pair for two weights.

    LLVM has no packed bfloat16 arithmetic below sm_90; on sm_80 the assembler pairs what it wrote one by one, all of linear
    codes, but of minifloats only those in the low halves of registers: 3 instructions for 4 weights. Float32 activations take
    short tiles, whose weights several warps decode where they do not come in the layout of the product: 64 a thread at least.
    """
    for r in compiled(programs, "dot", "dot8"):
        scaled = r["accumulators"] * r["products"] * (1 + r["offset"])
        assert r["scalar_multiplies"] <= scaled + 24 * r["products"], shown([r])
        unpaired = r["arch"] == 80 and r["decoder"] == "minifloat" and "bfloat16" in r["dtype"]
        twice = "float32" in r["dtype"] and not r["direct"]
        pairs = max(r["weights"], 64) if twice else r["weights"] * (0.75 if unpaired else 0.5)
        assert r["pair_multiplies"] <= pairs + 16, shown([r])
        assert r["kernel"] == "dot" or r["pair_multiplies"] <= 16, shown([r])
    for r in compiled(programs, "gemv"):
        words = r["weights"] / r["group"]
        factors = 4 * r["scales"]  # planes multiplied with each other and by the unit, for the scales that a thread loads
        assert r["scalar_multiplies"] <= r["weights"] + words * (1 + 2 * r["offset"]) + factors + 24, shown([r])


def test_tables_are_looked_up_by_byte_permutes(programs: dict[str, Report]) -> None:
    """12 permutes look up 8 weights of two bytes and 4 put them into pairs; one select a weight would be 15 of them."""
    for r in compiled(programs, "dot", "gemv", "dot8"):
        if r["decoder"] == "table":
            assert r["permutes"] >= r["weights"], shown([r])
            assert r["selects"] <= r["weights"] / 4 + 32, shown([r])


def test_instructions_for_each_weight(programs: dict[str, Report]) -> None:
    """A guard against layouts that stop matching: then every weight passes through shared memory, at 3 to 5 more. Where
    periods are shorter than four groups of words it does so anyway, and scales come more often. On sm_80,
    without packed bfloat16 arithmetic or wgmma, the sums of x that an offset needs come on top."""
    for r in compiled(programs, "gemv"):
        sums = 0.25 if r["offset"] and r["arch"] == 80 else 0.0
        assert r["loop"] <= (9.0 + sums) * r["weights"], shown([r])
    for r in compiled(programs, "dot", "dot8"):
        if r["rows"] == 16 and "float32" not in r["dtype"]:
            sums = 0.75 if r["offset"] and r["arch"] == 80 and r["direct"] else 0.0
            assert 0 < r["loop"] <= ((6.0 if r["direct"] else 11.0) + sums) * r["weights"], shown([r])


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


@pytest.mark.parametrize("name,kernels", [
    ("six_bits", "gemv dot decode dot"), ("four_g48", "gemv dot decode"), ("seven_odd", "gemv dot decode dot8"),
    ("five_g24", "gemv decode decode decode"), ("Q3_K", "gemv dot decode dot"), ("Q4_K", "dot dot decode dot8"),
    ("nf4", "dot dot decode"),
])  # fmt: skip
def test_periods_decide_which_kernels_run(name: str, kernels: str) -> None:
    """For 1, 16 and 300 rows, and for 16 rows with int8 activations. All periods decode and stream; 16-bit matrix units sum
    16 weights of one scale, 8-bit units 32."""
    spec = next((s for s in cases.PRIVATE if s.name == name), None) or get(name)
    target = Target("cuda", "90")
    found = [triton_kernels(Scheme(spec)).variant(rows, torch.bfloat16, target).tile.kernel for rows in (1, 16, 300)]
    if len(kernels.split()) > 3:
        found.append(triton_kernels(Scheme(spec, "int8")).variant(16, torch.bfloat16, target).tile.kernel)
    assert " ".join(found) == kernels


def test_what_cannot_be_printed_says_why() -> None:
    q, scale, s = symbols("q scale s")
    odd = FormatSpec("odd", (Plane("scale", "f32", 6), Plane("q", "u4")), value=scale * q)
    with pytest.raises(FormatError, match="odd.*every 6 weights.*multiple of 4"):
        triton_kernels(Scheme(odd))
    table = Codebook("LONG", tuple(float(i * i) for i in range(256)))
    long = FormatSpec("long", (Plane("s", "u8", 32), Plane("q", "u8")), value=table(s) * q, codebooks=(table,))
    with pytest.raises(FormatError, match="long.*at most 64 values"):
        triton_kernels(Scheme(long))


def test_each_gpu_gets_the_text_that_it_can_run() -> None:
    class Other(TritonKernels):
        permutes = False

    assert "byte_perm" in triton_kernels(scheme("nf4")).source and "byte_perm" not in triton_kernels(scheme("int4_g128")).source
    assert "byte_perm" not in Other(scheme("nf4")).source and "libdevice" not in Other(scheme("nf4")).source


def test_a_product_that_spills_takes_a_smaller_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it fits: half the rows, then half the weights. Kernels that fit stay, and the next process begins with them."""
    monkeypatch.setenv("QCOMPILE_CACHE_DIR", str(tmp_path))
    launched: list[tuple[int, int]] = []

    class Spilling(TritonKernels):
        def _target(self, x: torch.Tensor) -> Target:
            return Target("cuda", "90")

        def kernel(self, name: str) -> Any:
            def launch(**options: Any) -> SimpleNamespace:
                launched.append((options["BM"], options["BT"]))
                return SimpleNamespace(n_spills=3 if options["BM"] > 16 or options["BT"] > 4 else 0)

            return collections.defaultdict(lambda: lambda *_, **options: launch(**options))

    spec, x = get("int4_g128"), torch.empty(64, 256, dtype=torch.bfloat16, device="meta")
    planes = [torch.empty(spec.part_shape(p, 4096, 256), dtype=p.dtype, device="meta") for p in spec.parts]
    kernels = Spilling(scheme("int4_g128"))
    for _ in range(6):
        kernels.linear(x, planes, None, 4096)
    assert launched == [(64, 8), (32, 8), (16, 8)] + 3 * [(16, 4)]
    Spilling(scheme("int4_g128")).linear(x, planes, None, 4096)
    assert launched[6:] == [(16, 4)]
    assert tiles.smaller(tiles.Tile("dot", 2, 16, 4, 4)) is None


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
