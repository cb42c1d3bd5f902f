"""Runs generated Triton kernels under Triton's interpreter and compares them with the reference; a process of its own.

Prints one JSON object for each case: ``check``, ``case``, ``error``, ``limit``. ``tests/test_triton.py`` starts it (Triton
cannot interpret and compile in one process) and asserts.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import json
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
import triton_cases as cases
import triton_corrections as corrections

from qcompile.codegen import tiles
from qcompile.codegen.triton import TYPES, TritonKernels, Variant, triton_kernels
from qcompile.codegen.triton_launch import Call
from qcompile.formats import FormatSpec, Scheme, affine, reference
from qcompile.formats.algebra import gen_table
from qcompile.formats.layout import pack_plane

SHAPES = (  # rows, N, K, dtype, bias: no N a multiple of a tile, no K of a step
    (1, 40, 200, torch.float16, True),
    (3, 72, 416, torch.float32, False),
    (16, 33, 520, torch.bfloat16, True),
    (65, 40, 264, torch.float16, False),
)
ROUNDING = {torch.float16: 1e-3, torch.bfloat16: 4e-3, torch.float32: 2e-6}
"""Relative error (Frobenius) allowed: rounding of the output, and of a decoded weight."""

IN_TERMS = 2.0**-18
"""The same of float32 in two bfloat16 terms: what is left of a number has its 18th bit at most."""

Case = tuple[str, float, float]


def all_codes(spec: FormatSpec, n: int, k: int, every_scale: bool = False) -> list[torch.Tensor]:
    """Planes of an N×K weight in which every code that stands for a value occurs, with random scales.

    Scales are small where values are large, so that sums fit float16, unless ``every_scale`` asks for all that integers
    stand for.
    """
    cols = spec.padded(n, k)[1]
    table = gen_table(spec)
    finite = torch.isfinite(table)
    size = float(table[finite].abs().max())
    for p in spec.scales:
        size *= 2**p.bits if p.is_integer else 1
    at = torch.arange(n)[:, None] * 37 + torch.arange(cols)[None, :] * (1 + torch.arange(n)[:, None] % 3 * 2)
    stored = []
    for p in spec.planes:
        if p.is_code:
            entries = torch.where(finite, torch.arange(len(table)), 0).to(torch.uint8)[at % 2**p.bits].view(p.entry_dtype)
        elif p.is_integer:
            shape = spec.entry_shape(p, n, k)
            entries = torch.randint(0, 2**p.bits, shape, dtype=torch.uint8)
            if not every_scale and any(len(b.values) == 256 for b in spec.codebooks):
                entries = entries % 16 + (112 - int(np.log2(size) - 8 * len(spec.scales)) if "E8M0" in str(spec.value) else 40)
            entries = entries.view(p.entry_dtype)
        else:
            entries = (torch.rand(spec.entry_shape(p, n, k)) + 0.5) / max(size / 8, 1)
        stored += pack_plane(spec, p, entries, n, k)
    return stored


def relative(y: torch.Tensor, want: torch.Tensor) -> float:
    if not torch.isfinite(y).all():
        return float("inf")
    return float((y.double() - want).norm() / want.norm())


def apart(got: torch.Tensor, want: torch.Tensor, floor: float = 1e-30) -> float:
    """The largest relative difference; NaN and infinity must be where they are wanted."""
    finite = torch.isfinite(want)
    if not torch.equal(torch.nan_to_num(got[~finite]), torch.nan_to_num(want[~finite])):
        return float("inf")
    difference = (got.double() - want.double()).abs() / want.double().abs().clamp_min(floor)
    return float(torch.nan_to_num(difference[finite], nan=torch.inf).max())


def decoding(kernels: TritonKernels) -> Iterator[Case]:
    spec = kernels.scheme.format
    n, k = 24, 600
    planes = all_codes(spec, n, k, every_scale=True)
    want = reference.decode(spec, planes, n, k)
    got = kernels.decode(planes, n, k, torch.float32)
    # Three hoisted factors may be multiplied in another order than the expression's.
    floor = float(torch.nan_to_num(want, posinf=0.0).abs().max()) / 64 if affine(spec).offset != 0 else 1e-30
    yield "float32", apart(got, want, floor), 2.5e-7
    half = kernels.decode(planes, n, k, torch.float16)
    finite = torch.isfinite(want.half())
    yield "float16", float((half.float() - want)[finite].abs().max()), 1e-3 * float(want[finite].abs().max())
    indices = torch.tensor([[3, 23, 0], [16, 3, 15]])
    rows = kernels.rows(planes, indices, n, k, torch.float32)
    yield "rows", 0.0 if torch.equal(rows.nan_to_num(), got[indices].nan_to_num()) else 1.0, 0.5


def selecting(kernels: TritonKernels) -> Iterator[Case]:
    """What GPUs without byte permutes run."""
    other = Selecting(kernels.scheme)
    spec, n, k = kernels.scheme.format, 24, 264
    planes = all_codes(spec, n, k)
    weight = reference.decode(spec, planes, n, k)
    x = token_rows(16, k, 127.0).half()
    if kernels.scheme.activations is None:
        yield "decode", apart(other.decode(planes, n, k, torch.float32), weight, float(weight.abs().max()) / 64), 2.5e-7
        x_seen = x.double()
    else:
        x_seen = quantized(kernels, x)
    yield "product", relative(other.linear(x, planes, None, n), x_seen @ weight.double().t()), 2e-3


class Selecting(TritonKernels):
    permutes = False


def variants(kernels: TritonKernels, rows: int, dtype: torch.dtype) -> Iterator[Variant]:
    """Every kernel that can multiply, in the types that GPUs take for activations of ``dtype``."""
    printer = kernels.printer
    if rows <= 3:
        yield Variant(tiles.gemv_tile(printer.group, printer.granule, 512), printer.wide, "float32")
    if printer.fused and dtype != torch.float32:
        yield Variant(tiles.product_tile("dot", rows, 90, printer.granule), TYPES[dtype], TYPES[dtype])
    if printer.fused and dtype == torch.float32 and printer.exact16:
        yield Variant(tiles.FLOAT32_ROWS, "bfloat16", "bfloat16", terms=2)
    if rows == 16 or not printer.fused:
        yield Variant(tiles.decode_tile(), printer.wide, TYPES[dtype])


def products(kernels: TritonKernels) -> Iterator[Case]:
    spec = kernels.scheme.format
    for rows, n, k, dtype, with_bias in SHAPES:
        planes = all_codes(spec, n, k)
        weight = reference.decode(spec, planes, n, k).double()
        x = torch.randn(rows, k).to(dtype)
        bias = torch.randn(n).to(dtype) if with_bias else None
        want = x.double() @ weight.t() + (bias.double() if bias is not None else 0)
        for variant in variants(kernels, rows, dtype):
            limit = IN_TERMS if variant.terms == 2 else ROUNDING[dtype] * (2 if variant.tile.kernel == "decode" else 1)
            got = kernels.linear(x, planes, bias, n, variant=variant)
            yield f"{rows}x{n}x{k} {dtype} {variant.tile.kernel} terms={variant.terms}", relative(got, want), limit


def quantized(kernels: TritonKernels, x: torch.Tensor) -> torch.Tensor:
    """float64 x as the reference of dynamic quantization keeps it."""
    largest = 127.0 if kernels.scheme.activations == "int8" else 448.0
    top = x.float().abs().amax(1, keepdim=True)
    scaled = x.float() * torch.where(top > 0, largest / top, 0.0)
    codes = scaled.round() if largest == 127.0 else scaled.to(torch.float8_e4m3fn).float()
    return codes.double() * (top / largest).double()


def token_rows(rows: int, k: int, largest: float) -> torch.Tensor:
    """x whose codes are exact quotients: with any other largest value, a quotient next to a tie is rounded by luck."""
    x = torch.randn(rows, k).clamp(-3, 3) * torch.rand(rows, 1)
    x[:, 0] = largest / 2.0 ** torch.randint(5, 7, (rows,)) * (1 if largest == 127.0 else 1 / 2)
    if rows > 1:
        x[0] = 0.0
    return x


def quantized_products(kernels: TritonKernels) -> Iterator[Case]:
    spec = kernels.scheme.format
    for rows, n, k, dtype, with_bias in SHAPES:
        planes = all_codes(spec, n, k)
        weight = reference.decode(spec, planes, n, k).double()
        x = token_rows(rows, k, 127.0 if kernels.scheme.activations == "int8" else 448.0).to(dtype)
        bias = torch.randn(n).to(dtype) if with_bias else None
        want = quantized(kernels, x) @ weight.t() + (bias.double() if bias is not None else 0)
        yield f"{rows}x{n}x{k} {dtype}", relative(kernels.linear(x, planes, bias, n), want), ROUNDING[dtype]
        if kernels.scheme.activations == "fp8":
            old = Variant(tiles.product_tile("dot", rows, 80, kernels.printer.granule), "float16", "float32")
            got = kernels.linear(x, planes, bias, n, variant=old)
            yield f"{rows}x{n}x{k} {dtype} without fp8 units", relative(got, want), ROUNDING[dtype]


def shapes_of_x(kernels: TritonKernels) -> Iterator[Case]:
    """Leading dimensions, strides, no rows, a split along K, and the operand order of mma in old Tritons."""
    spec = kernels.scheme.format
    n, k = 40, 4096 + spec.k_multiple
    planes = all_codes(spec, n, k)
    weight = reference.decode(spec, planes, n, k).double()
    tile = tiles.product_tile("dot", 6, 90, kernels.printer.granule)
    parts, _ = Call(kernels, Variant(tile, "float16", "float16"), 90, n, k, k)._split(1, -(-k // 128), 6)
    yield "K is split", 0.0 if parts > 1 else 1.0, 0.5
    x = torch.randn(2, k, 3).transpose(1, 2)
    yield "strided", relative(kernels.linear(x, planes, None, n), x.double() @ weight.t()), ROUNDING[x.dtype] * 4
    one = torch.randn(k, 2)[:, 0]
    yield "one dimension", relative(kernels.linear(one, planes, None, n), one.double() @ weight.t()), ROUNDING[x.dtype] * 4
    empty = kernels.linear(torch.randn(0, 5, k), planes, None, n)
    yield "no rows", 0.0 if empty.shape == (0, 5, n) else 1.0, 0.5


def experts(kernels: TritonKernels) -> Iterator[Case]:
    """Of four experts, rows padded to tiles, those that have rows; sorted rows and rows in any order."""
    spec, (count, n, k) = kernels.scheme.format, (4, 40, 128)
    planes = all_codes(spec, count * 48, k)
    weight = reference.decode(spec, planes, count * 48, k).double().view(count, 48, k)[:, :n]
    x = torch.randn(20, k)
    for case, groups, own in (
        ("sorted", torch.tensor([17, 17, 18, 20]), torch.tensor([0] * 17 + [2] + [3] * 2)),
        ("in any order", torch.arange(20) % 3, torch.arange(20) % 3),
        ("counted from the end", torch.full((20,), -1), torch.full((20,), 3)),
    ):
        want = torch.bmm(weight[own], x.double().unsqueeze(-1)).squeeze(-1)
        got = kernels.grouped(x, planes, groups, case == "sorted", count, n)
        yield case, relative(got, want), ROUNDING[x.dtype] * 4
    spare = kernels.grouped(x, planes, torch.tensor([1, 1, 1, 1]), True, count, n)
    yield "rows of no expert", float(spare[1:].abs().max()), 0.0


def old_mma(kernels: TritonKernels) -> Iterator[Case]:
    quads, sums = tiles.quads, tiles.sum_load
    tiles.quads, tiles.sum_load = (lambda *_: True), (lambda *_: True)
    try:
        yield from products(kernels)
    finally:
        tiles.quads, tiles.sum_load = quads, sums


def bfloat16_elements(kernels: TritonKernels) -> Iterator[Case]:
    """Weights decoded to bfloat16 are exact, or rounded values of tables: the product with unit vectors gives them back."""
    spec = kernels.scheme.format
    n, k = 24, 256
    planes = all_codes(spec, n, k)
    want = reference.decode(spec, planes, n, k)
    tile = replace(tiles.product_tile("dot", 64, 90, kernels.printer.granule), rows=64)
    got = kernels.linear(torch.eye(k), planes, None, n, variant=Variant(tile, "bfloat16", "float32")).t()
    floor = float(want.abs().max()) / 64 if affine(spec).offset != 0 else 1e-30
    yield "unit vectors", apart(got, want, floor), 1e-6 if kernels.printer.exact16 else 2.0**-8


def run(check: str, function, scheme: Scheme) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    for case, error, limit in function(triton_kernels(scheme)):
        print(json.dumps({"check": check, "case": f"{scheme.label} {case}", "error": error, "limit": limit}), flush=True)


SHAPED = ("int4_g128", "int8", "two_level", "fp8_e4m3", "six_bits", "Q4_K", "nf4")
"""Formats for checks of what does not depend on them: shapes of x, splits, orders of operands."""


def main() -> None:
    torch.set_num_threads(1)
    run("correction", lambda _: corrections.checks(), Scheme(cases.formats()[0]))
    for scheme in cases.schemes():
        kernels = triton_kernels(scheme)
        if kernels.printer.imports:
            run("select", selecting, scheme)
        if scheme.activations is not None:
            run("quantized", quantized_products, scheme)
            continue
        run("decode", decoding, scheme)
        run("product", products, scheme)
        if kernels.printer.fused:
            run("bfloat16", bfloat16_elements, scheme)
        if scheme.format.name in SHAPED:
            run("shape", shapes_of_x, scheme)
            run("experts", experts, scheme)
            run("old mma", old_mma, scheme)


if __name__ == "__main__":
    sys.exit(main())
