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
from triton.language.extra.cuda import libdevice
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from qcompile.codegen import tiles
from qcompile.codegen.triton import TritonKernels, Variant, interpreted, triton_kernels
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


def prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """PTX ``prmt.b32`` in its default mode: nibble i of the selector names byte i of the result among the bytes of a (0…3)
    and b (4…7); a nibble of 8 and more gives the sign of that byte in all its bits."""
    source = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(selector.shape, np.uint32)
    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = (source >> (nibble & 7).astype(np.uint64) * np.uint64(8)).astype(np.uint32) & np.uint32(255)
        signs = np.where(byte >= 128, np.uint32(255), np.uint32(0))
        result |= np.where(nibble >= 8, signs, byte) << np.uint32(8 * i)
    return result


def correct_permutes() -> None:
    """Gives the interpreter, which has neither library functions nor PTX, the byte permute of kernels that use tables, and
    the literal that the only PTX in them hides."""

    def word(x):  # type: ignore[no-untyped-def]
        number = isinstance(x, int) or hasattr(x, "value")
        return np.uint32(int(getattr(x, "value", x)) & 0xFFFFFFFF) if number else x.handle.data.view(np.uint32)

    def byte_perm(a, b, selector):  # type: ignore[no-untyped-def]
        tensor = next(x for x in (a, b, selector) if isinstance(x, tl.tensor))
        found = prmt(*np.broadcast_arrays(*map(word, (a, b, selector))))
        return tl.tensor(TensorHandle(found.view(np.int32), tl.int32), tensor.type)

    def hidden(_asm, _constraints, args, **_):  # type: ignore[no-untyped-def]
        return args[0] * 0 + args[1]

    libdevice.byte_perm = byte_perm
    tl.inline_asm_elementwise = hidden


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
    """Every kernel that can multiply, in the types that the interpreter computes correctly."""
    printer = kernels.printer
    if rows <= 3 and printer.streams:
        yield Variant(tiles.gemv_tile(printer.group, printer.granule, 512), printer.wide, "float32")
    tile = tiles.product_tile("dot", rows, 90, printer.granule)
    if printer.fused:
        yield interpreted(Variant(tile, "float16" if printer.exact16 else "float32", "float16"))
        if not printer.exact16 and rows == 16:
            yield interpreted(Variant(tile, "float16", "float16"))
    if rows == 16 or not printer.fused:
        yield Variant(tiles.decode_tile(), printer.wide, "float32")
    if rows == 3 and dtype == torch.float32 and printer.exact16 and printer.fused:
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
    """Weights decoded to bfloat16 are exact, or rounded values of tables: the product with unit vectors gives them back."""
    spec = kernels.scheme.format
    n, k = 24, 256
    planes = all_codes(spec, n, k)
    want = reference.decode(spec, planes, n, k)
    tile = replace(tiles.product_tile("dot", 64, 90, kernels.printer.granule), rows=64)
    got = kernels.linear(torch.eye(k), planes, None, n, variant=Variant(tile, "bfloat16", "float32")).t()
    floor = float(want.abs().max()) / 64 if affine(spec).offset != 0 else 1e-30
    yield "unit vectors", apart(got, want, floor), 1e-6 if kernels.printer.exact16 else 2.0**-8


def corrected_bfloat16(_: TritonKernels) -> Iterator[Case]:
    """The correction itself, against PyTorch's bfloat16."""
    a, b = (torch.randn(4096) * 2.0 ** torch.randint(-130, 100, (4096,)) for _ in range(2))
    a, b = a.to(torch.bfloat16), b.to(torch.bfloat16)
    handles = [TensorHandle(t.view(torch.int16).numpy().view(np.uint16), tl.bfloat16) for t in (a, b)]
    for op, want in ((np.add, a + b), (np.subtract, a - b), (np.multiply, a * b)):
        got = InterpreterBuilder.binary_op(None, *handles, op).data
        wrong = (torch.from_numpy(got.view(np.int16)) != want.view(torch.int16)).sum()
        yield op.__name__, float(wrong), 0.5


def emulated_permute(_: TritonKernels) -> Iterator[Case]:
    """The emulation itself, on the examples of the PTX manual's table and a few more."""
    a, b = np.uint32(0x83028180), np.uint32(0x07060504)
    known = {0x3210: 0x83028180, 0x7654: 0x07060504, 0x6543: 0x06050483, 0x0123: 0x80810283, 0xB888: 0xFFFFFFFF,
             0xCA10: 0x00008180, 0x6240: 0x06020480, 0xFFFF3210: 0x83028180}  # fmt: skip
    for selector, want in known.items():
        got = prmt(*(np.array([v], np.uint32) for v in (a, b, selector)))
        yield hex(selector), float(int(got[0]) != want), 0.5


def run(check: str, function, scheme: Scheme) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    for case, error, limit in function(triton_kernels(scheme)):
        print(json.dumps({"check": check, "case": f"{scheme.label} {case}", "error": error, "limit": limit}), flush=True)


SHAPED = ("int4_g128", "int8", "two_level", "fp8_e4m3", "six_bits", "Q4_K", "nf4")
"""Formats for checks of what does not depend on them: shapes of x, splits, orders of operands."""


def main() -> None:
    torch.set_num_threads(1)
    correct_bfloat16()
    correct_permutes()
    run("correction", corrected_bfloat16, Scheme(cases.formats()[0]))
    run("correction", emulated_permute, Scheme(cases.formats()[0]))
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
            run("old mma", old_mma, scheme)


if __name__ == "__main__":
    sys.exit(main())
