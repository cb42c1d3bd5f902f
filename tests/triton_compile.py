"""Compiles generated Triton kernels to machine code for GPUs that are not here, and reports what the code is made of.

A driver that only names a target lets ``TritonKernels.linear`` run up to the launch, on meta tensors; every launch is
compiled with exactly its arguments instead. Prints one JSON object for each kernel; ``--table`` prints for people.
``tests/test_triton.py`` starts this program and asserts.
"""

from __future__ import annotations

import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton_cases as cases
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import MockTensor

from qcompile.codegen import tiles
from qcompile.codegen.triton import TritonKernels, Variant
from qcompile.codegen.triton_act import blocks
from qcompile.formats import REGISTRY, Scheme
from qcompile.target import Target

ARCHES = (80, 89, 90, 100)
ROWS = (16, 32, 64, 128)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX = re.compile(r"(HMMA|IMMA|QMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA)$")
SIZE = (4096, 4096)


class NamedTarget:
    """A Triton driver that knows which GPU is meant, and nothing else."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

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
        super().__init__(scheme)
        self.arch = arch
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
                def launch(*arguments: Any, **options: Any) -> None:
                    if once:
                        return
                    function.device_caches.clear()
                    mocked = [MockTensor(a.dtype, list(a.shape)) if isinstance(a, torch.Tensor) else a for a in arguments]
                    built.append((name, function.warmup(*mocked, grid=grid, **options), options))

                return launch

        return Launch()

    def run(self, rows: int, dtype: torch.dtype, bias: bool, variant: Variant | None = None) -> None:
        n, k = SIZE
        spec = self.scheme.format
        planes = [torch.empty(spec.part_shape(p, n, k), dtype=p.dtype, device="meta") for p in spec.parts]
        x = torch.empty(rows, k, dtype=dtype, device="meta")
        self.linear(x, planes, torch.empty(n, dtype=dtype, device="meta") if bias else None, n, variant=variant)


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
    """Instructions of the longest backward branch: the loop over K (unrolled or branchless kernels have none)."""
    at, labels, loop = 0, {}, (0, 0)
    kept = []
    for line in instructions:
        if line.endswith(":"):
            labels[line[:-1]] = at
            continue
        kept.append(line)
        at += 1
        target = re.search(r"BRA.*`\((\.L\w+)\)", line)
        if target and labels.get(target.group(1), at) < at - (loop[1] - loop[0]):
            loop = labels[target.group(1)], at
    return kept[loop[0] : loop[1]]


def facts(kernels: Compiled, rows: int, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for name, compiled, options in kernels.built:
        instructions, registers = disassembled(compiled.asm["cubin"])
        names = [operation(i) for i in instructions if not i.endswith(":")]
        loop = collections.Counter(operation(i).split(".")[0] for i in longest_loop(instructions))
        threads = 32 * options["num_warps"]
        products, size = blocks(kernels.printer)
        weights = options.get("BT", 0) * 16 * (options.get("BK") or products * size) // threads
        yield {
            "kernel": name, "scheme": kernels.scheme.label, "format": kernels.scheme.format.name, "arch": kernels.arch,
            "rows": rows, "dtype": str(dtype), "threads": threads, "registers": registers,
            "spills": sum(n.startswith(("LDL", "STL")) for n in names), "shared": compiled.metadata.shared,
            "matrix": sorted({n.split(".")[0] for n in names if MATRIX.match(n.split(".")[0])}),
            "stores": sum(n.startswith("STG") for n in names),
            "wide_copies": sum(n.startswith(("LDGSTS", "LDG")) and ".128" in n for n in names),
            "weights": weights, "loop": sum(loop.values()),
            "scalar_multiplies": sum(loop[n] for n in ("FFMA", "FMUL")) + 2 * sum(loop[n] for n in ("FFMA2", "FMUL2")),
            "pair_multiplies": sum(loop[n] for n in ("HFMA2", "HMUL2")),
            "accumulators": options.get("BT", 0) * 16 * options.get("BM", 0) // threads, "products": products,
            "offset": kernels.printer.form.offset != 0, "group": kernels.printer.group,
        }  # fmt: skip


def plan(schemes: list[Scheme]) -> Iterator[tuple[Scheme, int, int, torch.dtype, str]]:
    """(scheme, compute capability, rows, dtype, kernel): every scheme on every target with every product, over all of them
    every tile; decoding on one target for each format."""
    for i, scheme in enumerate(schemes):
        for j, arch in enumerate(ARCHES):
            yield scheme, arch, ROWS[(i + j) % 4], (torch.bfloat16, torch.float16)[(i + j // 2) % 2], "table"
            if scheme.activations is None:
                yield scheme, arch, 1, torch.bfloat16, "gemv"
                if i % 4 == j:
                    yield scheme, arch, 256, torch.bfloat16, "table"
    for arch in ARCHES:
        yield schemes[0], arch, 16, torch.float32, "table"


def reports(schemes: list[Scheme]) -> Iterator[dict[str, Any]]:
    for scheme, arch, rows, dtype, kernel in plan(schemes):
        kernels = Compiled(scheme, arch)
        variant = None
        if kernel == "gemv":
            tile = tiles.gemv_tile(kernels.printer.group, kernels.printer.granule, SIZE[1])
            variant = Variant(tile, kernels.printer.wide, "float32")
        kernels.run(rows, dtype, bias=rows == 16, variant=variant)
        yield from facts(kernels, rows, dtype)


HEADINGS = (("kernel", 9), ("scheme", 26), ("arch", 5), ("rows", 5), ("registers", 10), ("spills", 7), ("shared", 8),
            ("loop", 6), ("weights", 8))  # fmt: skip


def main() -> None:
    everything = [s for s in cases.schemes() if s.format.name in REGISTRY]
    wanted = [s for s in everything if re.search(os.environ.get("QCOMPILE_TEST_SCHEMES", "."), s.label)]
    table = "--table" in sys.argv
    if table:
        print("".join(f"{h:>{w}}" for h, w in HEADINGS) + "  instr./weight  matrix instructions")
    for fact in reports(wanted):
        if not table:
            print(json.dumps(fact), flush=True)
            continue
        each = f"{fact['loop'] / fact['weights']:.2f}" if fact["weights"] and fact["loop"] else "-"
        print("".join(f"{fact[h]:>{w}}" for h, w in HEADINGS) + f"{each:>15}  {' '.join(fact['matrix'])}", flush=True)


if __name__ == "__main__":
    main()
