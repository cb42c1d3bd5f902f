"""Compiles generated Triton kernels to machine code for GPUs that are not here, and reports what the code is made of.

A driver that only names a target lets ``TritonKernels.linear`` run up to the launch, on meta tensors; every launch is
compiled with exactly its arguments instead. Prints one JSON object for each kernel; ``--table`` prints for people.
``tests/test_triton.py`` starts this program and asserts.
"""

from __future__ import annotations

import collections
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton_cases as cases
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import MockTensor

from qcompile.codegen import tiles
from qcompile.codegen.triton import TritonKernels, Variant
from qcompile.codegen.triton_act import blocks, form8
from qcompile.codegen.triton_print import Printer, lane_gen, minifloat_gen
from qcompile.formats import REGISTRY, Scheme
from qcompile.target import Target

ARCHES = (80, 89, 90, 100)
AMD = 94
"""gfx942: its compute capability as PyTorch gives it."""
ROWS = (16, 32, 64, 128)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX = re.compile(r"(HMMA|IMMA|QMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA)$")
SIZE = (4096, 4096)


class NamedTarget:
    """A Triton driver that knows which GPU is meant, and nothing else."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("hip", "gfx942", 64) if self.arch == AMD else GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class Compiled(TritonKernels):
    """Kernels that are compiled for ``arch`` instead of launched; ``built`` collects (name, compiled, options).

    The sum of parts and the quantization of activations differ little between formats: once for each target is enough.
    """

    shared_kernels: set[tuple[str, int, str | None]] = set()

    def __init__(self, scheme: Scheme, arch: int) -> None:
        self.arch, self.permutes = arch, arch != AMD
        super().__init__(scheme)
        self.built: list[tuple[str, Any, dict[str, Any]]] = []
        triton.runtime.driver.set_active(NamedTarget(arch))

    def _target(self, x: torch.Tensor) -> Target:
        return Target("cuda", str(self.arch))

    def kernel(self, name: str) -> Any:
        function, built = super().kernel(name), self.built
        key = (name, self.arch, self.scheme.activations)
        once = name in ("reduce", "quantize") and key in self.shared_kernels
        self.shared_kernels.add(key)

        class Launch:
            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                def launch(*arguments: Any, **options: Any) -> Any:
                    if once:
                        return None
                    function.device_caches.clear()
                    mocked = [MockTensor(a.dtype, list(a.shape)) if isinstance(a, torch.Tensor) else a for a in arguments]
                    compiled = function.warmup(*mocked, grid=grid, **options)
                    built.append((name, compiled, options))
                    return SimpleNamespace(n_spills=spills(compiled))

                return launch

        return Launch()

    def run(self, rows: int, dtype: torch.dtype, bias: bool, variant: Variant | None = None) -> None:
        n, k = SIZE
        spec = self.scheme.format
        planes = [torch.empty(spec.part_shape(p, n, k), dtype=p.dtype, device="meta") for p in spec.parts]
        x = torch.empty(rows, k, dtype=dtype, device="meta")
        smaller = -1
        while len(self._smaller) > smaller:  # until a tile keeps everything in registers
            smaller = len(self._smaller)
            self.built.clear()
            self.linear(x, planes, torch.empty(n, dtype=dtype, device="meta") if bias else None, n, variant=variant)
        if variant is not None and variant.tile.kernel == "decode":
            self.rows(planes, torch.empty(7, dtype=torch.int64, device="meta"), n, k, dtype)


def spills(compiled: Any) -> int:
    """Loads and stores of spilled registers in the machine code."""
    if "amdgcn" in compiled.asm:
        return sum(int(n) for n in re.findall(r"\.[vs]gpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"]))
    return sum(operation(i).startswith(("LDL", "STL")) for i in disassembled(compiled.asm["cubin"])[0] if not i.endswith(":"))


@functools.lru_cache(maxsize=8)
def disassembled(cubin: bytes) -> tuple[list[str], int]:
    """(instructions with operands, registers of a thread) of machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True)
    registers = re.search(r"REG:(\d+)", usage.stdout + usage.stderr)
    assert registers is not None
    lines = [(m.group(1), m.group(2)) for m in re.finditer(r"^\s*(?:(\.L\w+):|/\*[0-9a-f]+\*/\s+(.*?)\s*;)", text, re.M)]
    return [f"{label}:" if label else operation for label, operation in lines], int(registers.group(1))


def operation(instruction: str) -> str:
    """Opcode with its modifiers, without the predicate."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def longest_loop(instructions: list[str]) -> list[str]:
    """Instructions of the longest backward branch that stores nothing: the loop over K (branchless kernels have none)."""
    at, labels, loop = 0, {}, (0, 0)
    kept = []
    for line in instructions:
        if line.endswith(":"):
            labels[line[:-1]] = at
            continue
        kept.append(line)
        at += 1
        target = re.search(r"BRA.*`\((\.L\w+)\)", line)
        start = labels.get(target.group(1), at) if target else at
        if start < at - (loop[1] - loop[0]) and not any("STG" in i or "EXIT" in i for i in kept[start:at]):
            loop = start, at
    return kept[loop[0] : loop[1]]


def facts(kernels: Compiled, rows: int, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for name, compiled, options in kernels.built:
        shared = {"kernel": name, "scheme": kernels.scheme.label, "format": kernels.scheme.format.name, "arch": kernels.arch,
                  "rows": rows, "dtype": str(dtype), "shared": compiled.metadata.shared}  # fmt: skip
        yield shared | (amd_facts(compiled) if kernels.arch == AMD else code_facts(kernels, name, compiled, options))


def amd_facts(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]
    registers = int(re.findall(r"\.vgpr_count:\s*(\d+)", text)[0])
    stores = len(re.findall(r"(?:buffer|global)_store", text))
    return {"spills": spills(compiled), "registers": registers, "threads": 64 * compiled.metadata.num_warps, "loop": 0,
            "weights": 0, "matrix": sorted(set(re.findall(r"v_mfma_\w+", text))), "stores": stores}  # fmt: skip


def code_facts(kernels: Compiled, name: str, compiled: Any, options: dict[str, Any]) -> dict[str, Any]:
    instructions, registers = disassembled(compiled.asm["cubin"])
    names = [operation(i) for i in instructions if not i.endswith(":")]
    loop = collections.Counter(operation(i).split(".")[0] for i in longest_loop(instructions))
    whole = collections.Counter(n.split(".")[0] for n in names)
    threads = 32 * options["num_warps"]
    products, size = blocks(kernels.printer)
    groups = max((options.get("BK") or size) // kernels.printer.group, 1)
    # Warps side by side along the rows of x decode the same weights.
    warps = re.search(r"nvidia_mma<.*warpsPerCTA = \[\d+, (\d+)\]", compiled.asm["ttgir"])
    twice = int(warps.group(1)) if warps and name == "dot" else 1
    weights = options.get("BT", 1) * 16 * (options.get("BK") or products * size) // threads * twice
    return {
        "threads": threads, "registers": registers, "spills": spills(compiled),
        "matrix": sorted({n for n in whole if MATRIX.match(n)}), "stores": sum(n.startswith("STG") for n in names),
        "copied": max((width for width, mark in ((16, ".128"), (8, ".64"), (4, "")) for n in names
                       if n.startswith(("LDGSTS", "LDG")) and mark in n), default=0),
        "copyable": min(16, 4 * options.get("BT", 1) * 16 * groups // threads),
        "weights": weights, "loop": sum(loop.values()),
        "scalar_multiplies": sum(loop[n] for n in ("FFMA", "FMUL")) + 2 * sum(loop[n] for n in ("FFMA2", "FMUL2")),
        "pair_multiplies": sum(loop[n] for n in ("HFMA2", "HMUL2")),
        "permutes": (loop or whole)["PRMT"], "selects": (loop or whole)["SEL"] + (loop or whole)["FSEL"],
        "scales": -(-options.get("BK", 0) // (kernels.printer.granule or options.get("BK", 1)) * 16 // threads),
        "accumulators": options.get("BT", 0) * 16 * options.get("BM", 0) // threads, "products": products,
        "offset": kernels.printer.form.offset != 0, "group": kernels.printer.cut or kernels.printer.group,
        "direct": kernels.printer.direct, "decoder": decoder(kernels.scheme),
    }  # fmt: skip


def decoder(scheme: Scheme) -> str:
    """How codes become numbers: linear, minifloat or table."""
    spec = scheme.format
    return "linear" if lane_gen(spec) is not None else "minifloat" if minifloat_gen(spec) is not None else "table"


def kind(scheme: Scheme) -> tuple[object, ...]:
    """What schemes share whose kernels are compiled from nearly the same text."""
    printer, spec = Printer(scheme.format), scheme.format
    if scheme.activations is not None:
        book = spec.codebooks[-1].minifloat if scheme.activations == "fp8" else None
        return scheme.activations, spec.code.dtype, decoder(scheme), form8(printer).offset != 0, blocks(printer)[1], book
    table = tuple(len(b.values) for b in spec.codebooks)
    integers = any(p.is_integer for p in spec.scales)
    return spec.code.dtype, decoder(scheme), table, integers, printer.form.offset != 0, min(printer.granule or 128, 64)


def chosen(schemes: list[Scheme]) -> list[Scheme]:
    """The first scheme of each kind."""
    return list({kind(s): s for s in reversed(schemes)}.values())[::-1]


Task = tuple[Scheme, int, int, torch.dtype, str]


def plan(schemes: list[Scheme]) -> Iterator[Task]:
    """(scheme, compute capability, rows, dtype, kernel). A product of every kind of scheme is compiled for one or two targets
    in turn, and each of the other kernels for one; over all of them, every target gets every tile."""
    for i, scheme in enumerate(schemes):
        both = (torch.bfloat16, torch.float16)
        for j in (i, i + 2) if scheme.activations is None and i % 3 else (i,):
            yield scheme, ARCHES[j % 4], ROWS[(j + i // 4) % 4], both[(i // 2 + j // 4) % 2], "table"
        if scheme.activations is None:
            yield scheme, ARCHES[(i + 1) % 4], 1, torch.bfloat16, "gemv"
        if i % 3 == 0 and scheme.activations is None:
            yield scheme, ARCHES[(i // 3) % 4], 256, torch.bfloat16, "decode"
        if decoder(scheme) == "table" or i % 4 == 0:
            yield scheme, AMD, 16, torch.float16, "table"
    for arch in ARCHES:
        yield schemes[0], arch, 16, torch.float32, "table"


def everything(schemes: list[Scheme]) -> Iterator[Task]:
    """Every scheme for every target in every tile, in one 16-bit type after the other, and every other kernel: two hours of
    one core."""
    both = (torch.bfloat16, torch.float16)
    for (a, arch), (r, rows), (i, scheme) in itertools.product(enumerate(ARCHES), enumerate(ROWS), enumerate(schemes)):
        yield scheme, arch, rows, both[(a + r + i) % 2], "table"
    for (a, arch), (i, scheme) in itertools.product(enumerate(ARCHES), enumerate(schemes)):
        if scheme.activations is None:
            yield scheme, arch, 16, torch.float32, "table"
            yield scheme, arch, 1, both[(a + i) % 2], "gemv"
            yield scheme, arch, 256, both[(a + i) % 2], "decode"
    for scheme in schemes:
        yield scheme, AMD, 16, torch.float16, "table"


def reports(tasks: list[Task]) -> Iterator[dict[str, Any]]:
    for scheme, arch, rows, dtype, kernel in tasks:
        kernels = Compiled(scheme, arch)
        printer, variant = kernels.printer, None
        if kernel == "gemv":
            variant = Variant(tiles.gemv_tile(printer.group, printer.granule, SIZE[1]), printer.wide, "float32")
        elif kernel == "decode":
            variant = Variant(tiles.decode_tile(), printer.wide, "float32")
        kernels.run(rows, dtype, bias=rows == 16, variant=variant)
        yield from facts(kernels, rows, dtype)


HEADINGS = (("kernel", 9), ("scheme", 26), ("arch", 5), ("rows", 5), ("registers", 10), ("spills", 7), ("shared", 8),
            ("loop", 6), ("weights", 8))  # fmt: skip


def main() -> None:
    """``--table`` for people; ``--part 0/2`` for the even half of the tasks; ``--everything`` for all there is."""
    wanted = [s for s in cases.schemes() if s.format.name in REGISTRY]
    if "--everything" in sys.argv:
        tasks = list(everything(wanted))
    else:
        tasks = list(plan(wanted if "QCOMPILE_TEST_SCHEMES" in os.environ else chosen(wanted)))
    if "--part" in sys.argv:
        part, parts = map(int, sys.argv[sys.argv.index("--part") + 1].split("/"))
        tasks = tasks[part::parts]
    table = "--table" in sys.argv
    if table:
        print("".join(f"{h:>{w}}" for h, w in HEADINGS) + "  instr./weight  matrix instructions")
    for fact in reports(tasks):
        if not table:
            print(json.dumps(fact), flush=True)
            continue
        each = f"{fact['loop'] / fact['weights']:.2f}" if fact["weights"] and fact["loop"] else "-"
        print("".join(f"{fact[h]:>{w}}" for h, w in HEADINGS) + f"{each:>15}  {' '.join(fact['matrix'])}", flush=True)


if __name__ == "__main__":
    main()
