"""Compiles the attention kernels to machine code for GPUs that are not here, and reports what the code is made of.

As ``triton_compile.py``, whose parts it uses: launches on meta tensors are compiled with exactly their arguments. Prints one
JSON object for each kernel; ``--table`` prints for people. ``tests/test_triton_attention.py`` starts this program and asserts.
"""

from __future__ import annotations

import collections
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.runtime.jit import MockTensor
from triton_compile import ARCHES, MATRIX, NamedTarget, disassembled, longest_loop, operation

from qcompile.codegen.triton_attention import TritonAttention, TritonPrefill
from qcompile.formats import Scheme, get
from qcompile.target import Target

Built = list[tuple[str, Any, dict[str, Any]]]


def compiling(function: Any, name: str, built: Built) -> Any:
    """What stands in for the jitted ``function``: its launches are compiled and put into ``built``."""

    class Launch:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*arguments: Any, **options: Any) -> None:
                function.device_caches.clear()
                mocked = [MockTensor(a.dtype, list(a.shape)) if isinstance(a, torch.Tensor) else a for a in arguments]
                built.append((name, function.warmup(*mocked, grid=grid, **options), options))

            return launch

    return Launch()


class Compiled(TritonAttention):
    """Kernels that are compiled for ``arch`` instead of launched; ``built`` collects (name, compiled, options)."""

    def __init__(self, keys: Scheme, values: Scheme, arch: int) -> None:
        super().__init__(keys, values)
        self.arch = arch
        self.built: Built = []
        triton.runtime.driver.set_active(NamedTarget(arch))

    def _target(self, x: torch.Tensor) -> Target:
        return Target("cuda", str(self.arch))

    def kernel(self, name: str) -> Any:
        return compiling(super().kernel(name), name, self.built)


class CompiledPrefill(TritonPrefill):
    def __init__(self, kind: str, arch: int) -> None:
        super().__init__(kind)
        self.arch = arch
        self.built: Built = []
        triton.runtime.driver.set_active(NamedTarget(arch))

    def _target(self, x: torch.Tensor) -> Target:
        return Target("cuda", str(self.arch))

    def kernel(self, variant: str, name: str) -> Any:
        return compiling(super().kernel(variant, name), f"{variant} {name}", self.built)


@dataclass(frozen=True)
class Task:
    """One call of ``attend``, ``write`` or (of fresh tensors, keys naming the kind) ``prefill`` on ``arch``."""

    keys: str
    values: str
    arch: int
    dtype: torch.dtype
    width: int
    group: int
    length: int
    call: str = "attend"
    paged: bool = True
    batch: int = 1
    heads: int = 8
    tokens: int = 8192
    mask: torch.dtype | None = None
    options: tuple[tuple[str, Any], ...] = ()
    centered: bool = False


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def build(task: Task) -> Built:
    mask = empty(task.batch, 1, task.length, task.tokens, dtype=task.mask) if task.mask is not None else None
    if task.call == "prefill":
        prefill = CompiledPrefill(task.keys, task.arch)
        q = empty(task.batch, task.heads * task.group, task.length, task.width, dtype=task.dtype)
        k = empty(task.batch, task.heads, task.tokens, task.width, dtype=task.dtype)
        prefill.prefill(q, k, k, mask, **dict(task.options))
        return prefill.built
    formats = get(task.keys), get(task.values)
    kernels = Compiled(Scheme(formats[0]), Scheme(formats[1]), task.arch)
    pages, page = (task.batch * task.tokens // 64, 64) if task.paged else (task.batch, task.tokens)
    planes = [[empty(pages, task.heads, *s.part_shape(p, page, task.width), dtype=p.dtype) for p in s.parts] for s in formats]
    start = empty(task.batch, dtype=torch.int64)
    table = empty(task.batch, task.tokens // 64, dtype=torch.int32) if task.paged else None
    if task.call == "write":
        new = empty(task.batch, task.heads, task.length, task.width, dtype=task.dtype)
        kernels.write(planes[0], planes[1], new, new, start, table)
    else:
        q = empty(task.batch, task.heads * task.group, task.length, task.width, dtype=task.dtype)
        center = empty(task.batch, task.heads, 1, task.width, dtype=task.dtype) if task.centered else None
        kernels.attend(q, planes[0], planes[1], start, task.tokens, task.width, mask, table, center=center, **dict(task.options))
    return kernels.built


def _words(options: dict[str, Any]) -> int:
    """Words of codes that a block of tokens has on the side that has fewer; of 4 bits, as the narrowest here are."""
    return 16 * options.get("BT", 0) * min(options.get("KP", 0), options.get("VP", 0)) // 8


def facts(name: str, compiled: Any, options: dict[str, Any], arch: int) -> dict[str, Any]:
    instructions, registers = disassembled(compiled.asm["cubin"])
    names = [operation(i) for i in instructions if not i.endswith(":")]
    loop = collections.Counter(operation(i).split(".")[0] for i in longest_loop(instructions))
    whole = collections.Counter(n.split(".")[0] for n in names)
    threads = 32 * options["num_warps"]
    block = 16 * options.get("BT", 0) * (options.get("BK", 0) + options.get("BV", 0)) // threads
    return {
        "kernel": name, "arch": arch, "threads": threads, "registers": registers,
        "spills": whole["LDL"] + whole["STL"], "spills repeated": loop["LDL"] + loop["STL"], "shared": compiled.metadata.shared,
        "copyable": min(16, _words(options) // threads * 4),
        "matrix": sorted({n for n in whole if MATRIX.match(n)}), "repeated": sorted({n for n in loop if MATRIX.match(n)}),
        "stores": sum(n.startswith("STG") for n in names),
        "copied": max((width for width, mark in ((16, ".128"), (8, ".64"), (4, "")) for n in names
                       if n.startswith(("LDGSTS", "LDG")) and mark in n), default=0),
        "elements": block, "loop": sum(loop.values()), "shuffles": loop["SHFL"],
    }  # fmt: skip


HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
PAIRS = (("fp8_e4m3", "fp8_e4m3"), ("int4_g32", "int4_g32"), ("nf4_g32", "int4_zp_g32"), ("int8_g64", "fp8_e5m2"),
         ("mxfp4", "mxfp4"), ("int8", "int8"), ("fp8_e3m4", "fp8_e3m4"))  # fmt: skip
SHAPES = ((128, 4, 1), (128, 4, 512), (64, 8, 4), (256, 4, 256), (80, 1, 64), (256, 2, 1))
"""Channels, query heads of a key-value head, new tokens."""


def tasks() -> Iterator[Task]:
    """Every pair of formats on every target, in shapes that take turns; the rest on some."""
    for i, (keys, values) in enumerate(PAIRS):
        for j, arch in enumerate(ARCHES):
            yield Task(keys, values, arch, (BRAIN, HALF)[(i + j) % 2], *SHAPES[(i + 2 * j + i // 3) % 6], paged=(i + j) % 3 != 0)
    for j, arch in enumerate(ARCHES):
        yield Task("int8", "int8", arch, FLOAT, *SHAPES[(0, 1, 3, 5)[j]])
        yield Task(*PAIRS[j + 1 if j < 3 else 0], arch, BRAIN, 128, 1, (1, 512)[j % 2], "write")
        yield Task("fp8_e3m4", "fp8_e3m4", arch, (BRAIN, HALF)[j % 2], 128, 1, (512, 1)[j % 2], "write")
        shape = ((128, 4, 512), (256, 2, 64), (128, 4, 512), (64, 1, 512))[j]
        yield Task("fp8", "", arch, (BRAIN, HALF)[j % 2], *shape, "prefill")
        yield Task("int8", "", arch, (BRAIN, HALF)[j % 2], *((128, 64, 256, 128)[j], 4, 512), "prefill")
        yield Task("int8_both", "", arch, (HALF, BRAIN)[j % 2], *((128, 4, 512) if arch != 89 else shape), "prefill")
    for arch in (90, 100):
        yield Task("int8", "int8", arch, BRAIN, 128, 4, 7, options=(("softcap", 30.0), ("window", 1024)), centered=True)
        yield Task("int8", "", arch, BRAIN, 128, 4, 512, "prefill", mask=torch.bool)
        yield Task("int8_both", "", arch, HALF, 64, 4, 512, "prefill", mask=torch.bool)
        yield Task("fp8_e4m3", "fp8_e4m3", arch, BRAIN, 128, 4, 512, mask=BRAIN)
    yield Task("fp8", "", 100, BRAIN, 128, 4, 512, "prefill")


def reports(wanted: list[Task]) -> Iterator[dict[str, Any]]:
    """What was compiled; kernels that many tasks share, once for each target."""
    seen: set[tuple[str, int, bool]] = set()
    for task in wanted:
        about = {"call": task.call, "formats": f"{task.keys}/{task.values}", "dtype": str(task.dtype)[6:], "width": task.width,
                 "rows": task.group * task.length}  # fmt: skip
        for name, compiled, options in build(task):
            if name == "merge" or name.endswith(" sums"):
                if (kind := (name, task.arch, options.get("TURN", 1) > 1)) in seen:
                    continue
                seen.add(kind)
            yield about | facts(name, compiled, options, task.arch)


HEADINGS = (("kernel", 19), ("formats", 22), ("arch", 5), ("dtype", 9), ("width", 6), ("rows", 6), ("registers", 10),
            ("spills", 7), ("shared", 8), ("copied", 7), ("loop", 6), ("elements", 9))  # fmt: skip


def main() -> None:
    """``--table`` for people; ``--part 0/2`` for the even half of the tasks."""
    wanted = list(tasks())
    if "--part" in sys.argv:
        part, parts = map(int, sys.argv[sys.argv.index("--part") + 1].split("/"))
        wanted = wanted[part::parts]
    table = "--table" in sys.argv
    if table:
        print("".join(f"{h:>{w}}" for h, w in HEADINGS) + "  matrix instructions")
    for fact in reports(wanted):
        if not table:
            print(json.dumps(fact), flush=True)
            continue
        print("".join(f"{fact[h]:>{w}}" for h, w in HEADINGS) + "  " + " ".join(fact["matrix"]), flush=True)


if __name__ == "__main__":
    main()
