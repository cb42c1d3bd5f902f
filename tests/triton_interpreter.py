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
import triton.language as tl
import triton_cases as cases
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from qcompile.codegen import tiles
from qcompile.codegen.triton import TritonKernels, Variant, interpreted, triton_kernels
from qcompile.codegen.triton_launch import Call
from qcompile.formats import ROW, FormatSpec, Scheme, reference
from qcompile.formats.algebra import gen_table
from qcompile.formats.layout import pack_plane

SHAPES = (  # rows, N, K, dtype, bias: no N a multiple of a tile, no K of a step
    (1, 40, 200, torch.float16, True),
    (3, 72, 416, torch.float32, False),
    (16, 33, 520, torch.bfloat16, True),
    (65, 40, 264, torch.float16, False),
)
ROUNDING = {torch.float16: 1e-3, torch.bfloat16: 6e-3, torch.float32: 2e-6}
"""Relative error (Frobenius) allowed: rounding of the output, which the interpreter truncates for bfloat16."""

Case = tuple[str, float, float]


def correct_bfloat16() -> None:
    """Makes the interpreter's bfloat16 add, subtract and multiply round as hardware does; it takes the bits for integers."""
    original = InterpreterBuilder.binary_op

    def binary_op(self, lhs, rhs, op):  # type: ignore[no-untyped-def]
        if lhs.get_element_ty() != tl.bfloat16 or op not in (np.add, np.subtract, np.multiply):
            return original(self, lhs, rhs, op)
        with np.errstate(over="ignore"):
            wide = op(widened(lhs.data), widened(rhs.data))
        rounded = torch.from_numpy(np.array(wide)).to(torch.bfloat16).view(torch.int16).numpy()
        return TensorHandle(rounded.view(np.uint16), lhs.dtype.scalar)

    InterpreterBuilder.binary_op = binary_op


def widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def all_codes(spec: FormatSpec, n: int, k: int) -> list[torch.Tensor]:
    """Planes of an N×K weight in which every code that stands for a value occurs, with random scales.

    Scales are small where values are large, so that sums fit float16.
    """
    cols = spec.padded(n, k)[1]
    table = gen_table(spec) if len(spec.codes) == 1 else torch.tensor([32.0])
    finite = torch.isfinite(table)
    size = max(float(table[finite].abs().max()), 8.0) / 8
    at = torch.arange(n)[:, None] * 37 + torch.arange(cols)[None, :] * (1 + torch.arange(n)[:, None] % 3 * 2)
    planes = []
    for i, p in enumerate(spec.planes):
        if p.is_code:
            code = (at >> (2 * i) if len(spec.codes) > 1 else at) % 2**p.bits
            if not finite.all():
                code = torch.where(finite[code], code, 0)
            entries = code.to(torch.uint8)
            entries = entries.view(torch.int8) if p.dtype == "i8" else entries
        else:
            entries = (torch.rand(n, 1 if p.per == ROW else cols // p.per) + 0.5) / size
        planes.append(pack_plane(p, entries, spec.plane_shape(p, n, k)))
    return planes


def relative(y: torch.Tensor, want: torch.Tensor) -> float:
    if not torch.isfinite(y).all():
        return float("inf")
    return float((y.double() - want).norm() / want.norm())


def decoding(kernels: TritonKernels) -> Iterator[Case]:
    spec = kernels.scheme.format
    n, k = 24, 600
    planes = all_codes(spec, n, k)
    want = reference.decode(spec, planes, n, k)
    got = kernels.decode(planes, n, k, torch.float32)
    # Two hoisted factors may round once more than the expression as written.
    yield "float32", float(((got - want).abs() / want.abs().clamp_min(1e-6)).max()), 2e-7
    half = kernels.decode(planes, n, k, torch.float16)
    yield "float16", float((half.float() - want.half().float()).abs().max()), 2e-3 * float(want.abs().max())


def variants(kernels: TritonKernels, rows: int, dtype: torch.dtype) -> Iterator[Variant]:
    """Every kernel that can multiply, in the types that the interpreter computes correctly."""
    printer, period = kernels.printer, kernels.scheme.format.period
    if rows <= 3:
        yield Variant(tiles.gemv_tile(printer.group, period, 512), printer.wide, "float32")
    tile = tiles.product_tile("dot", rows, 90, period)
    yield interpreted(Variant(tile, "float16" if printer.exact16 else "float32", "float16"))
    if rows == 16:
        yield Variant(tiles.decode_tile(printer.group, period), printer.wide, "float32")
    if rows == 3 and dtype == torch.float32 and printer.exact16:
        yield Variant(tiles.FLOAT32_ROWS, "float16", "float16", terms=2)


def products(kernels: TritonKernels) -> Iterator[Case]:
    spec = kernels.scheme.format
    for rows, n, k, dtype, with_bias in SHAPES:
        planes = all_codes(spec, n, k)
        weight = reference.decode(spec, planes, n, k).double()
        x = torch.randn(rows, k).to(dtype)
        bias = torch.randn(n).to(dtype) if with_bias else None
        want = x.double() @ weight.t() + (bias.double() if bias is not None else 0)
        for variant in variants(kernels, rows, dtype):
            limit = ROUNDING[dtype] * (2 if variant.tile.kernel == "decode" else 1)
            got = kernels.linear(x, planes, bias, n, variant=variant)
            yield f"{rows}x{n}x{k} {dtype} {variant.tile.kernel} terms={variant.terms}", relative(got, want), limit


def quantized(kernels: TritonKernels, x: torch.Tensor) -> torch.Tensor:
    """float64 x as the reference of dynamic quantization keeps it."""
    largest = 127.0 if kernels.scheme.activations == "int8" else 448.0
    top = x.float().abs().amax(1, keepdim=True)
    scaled = x.float() * torch.where(top > 0, largest / top, 0.0)
    codes = scaled.round() if largest == 127.0 else scaled.to(torch.float8_e4m3fn).float()
    return codes.double() * (top / largest).double()


def quantized_products(kernels: TritonKernels) -> Iterator[Case]:
    spec = kernels.scheme.format
    for rows, n, k, dtype, with_bias in SHAPES:
        planes = all_codes(spec, n, k)
        weight = reference.decode(spec, planes, n, k).double()
        x = (torch.randn(rows, k) * torch.rand(rows, 1) * 5).to(dtype)
        x[0] = 0.0 if rows > 1 else x[0]
        bias = torch.randn(n).to(dtype) if with_bias else None
        want = quantized(kernels, x) @ weight.t() + (bias.double() if bias is not None else 0)
        yield f"{rows}x{n}x{k} {dtype}", relative(kernels.linear(x, planes, bias, n), want), ROUNDING[dtype]
        if kernels.scheme.activations == "fp8":
            old = Variant(tiles.product_tile("dot", rows, 80, spec.period), "float16", "float32")
            got = kernels.linear(x, planes, bias, n, variant=old)
            yield f"{rows}x{n}x{k} {dtype} without fp8 units", relative(got, want), ROUNDING[dtype]


def shapes_of_x(kernels: TritonKernels) -> Iterator[Case]:
    """Leading dimensions, strides, no rows, a split along K, and the operand order of mma in old Tritons."""
    spec = kernels.scheme.format
    n, k = 40, 4096 + spec.k_multiple
    planes = all_codes(spec, n, k)
    weight = reference.decode(spec, planes, n, k).double()
    tile = tiles.product_tile("dot", 6, 90, spec.period)
    parts, _ = Call(kernels, interpreted(Variant(tile, "float16", "float16")), 90, n, k, k)._split(1, -(-k // 128), 6)
    yield "K is split", 0.0 if parts > 1 else 1.0, 0.5
    x = torch.randn(2, k, 3).transpose(1, 2)
    yield "strided", relative(kernels.linear(x, planes, None, n), x.double() @ weight.t()), ROUNDING[x.dtype] * 4
    one = torch.randn(k, 2)[:, 0]
    yield "one dimension", relative(kernels.linear(one, planes, None, n), one.double() @ weight.t()), ROUNDING[x.dtype] * 4
    empty = kernels.linear(torch.randn(0, 5, k), planes, None, n)
    yield "no rows", 0.0 if empty.shape == (0, 5, n) else 1.0, 0.5


def old_mma(kernels: TritonKernels) -> Iterator[Case]:
    quads, sums = tiles.quads, tiles.sum_load
    tiles.quads, tiles.sum_load = (lambda *_: True), (lambda *_: True)
    try:
        yield from products(kernels)
    finally:
        tiles.quads, tiles.sum_load = quads, sums


def bfloat16_elements(kernels: TritonKernels) -> Iterator[Case]:
    """Weights decoded to bfloat16 must be exact: the product with unit vectors gives each of them back."""
    spec = kernels.scheme.format
    n, k = 24, 256
    planes = all_codes(spec, n, k)
    want = reference.decode(spec, planes, n, k)
    tile = replace(tiles.product_tile("dot", 64, 90, spec.period), rows=64)
    got = kernels.linear(torch.eye(k), planes, None, n, variant=Variant(tile, "bfloat16", "float32")).t()
    yield "unit vectors", float(((got - want).abs() / want.abs().clamp_min(1e-6)).max()), 1e-6


def corrected_bfloat16(_: TritonKernels) -> Iterator[Case]:
    """The correction itself, against PyTorch's bfloat16."""
    a, b = (torch.randn(4096) * 2.0 ** torch.randint(-130, 100, (4096,)) for _ in range(2))
    a, b = a.to(torch.bfloat16), b.to(torch.bfloat16)
    handles = [TensorHandle(t.view(torch.int16).numpy().view(np.uint16), tl.bfloat16) for t in (a, b)]
    for op, want in ((np.add, a + b), (np.subtract, a - b), (np.multiply, a * b)):
        got = InterpreterBuilder.binary_op(None, *handles, op).data
        wrong = (torch.from_numpy(got.view(np.int16)) != want.view(torch.int16)).sum()
        yield op.__name__, float(wrong), 0.5


def run(check: str, function, scheme: Scheme) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    for case, error, limit in function(triton_kernels(scheme)):
        print(json.dumps({"check": check, "case": f"{scheme.label} {case}", "error": error, "limit": limit}), flush=True)


def main() -> None:
    torch.set_num_threads(1)
    correct_bfloat16()
    plain = [Scheme(spec) for spec in cases.formats()]
    run("correction", corrected_bfloat16, plain[0])
    for scheme in cases.schemes():
        if scheme.activations is not None:
            run("quantized", quantized_products, scheme)
            continue
        run("decode", decoding, scheme)
        run("product", products, scheme)
        if triton_kernels(scheme).printer.exact16:
            run("bfloat16", bfloat16_elements, scheme)
    for scheme in plain:
        if scheme.format.name in ("int4_g32", "int8", "two_level", "fp8_e4m3", "six_bits"):
            run("shape", shapes_of_x, scheme)
            run("old mma", old_mma, scheme)


if __name__ == "__main__":
    sys.exit(main())
