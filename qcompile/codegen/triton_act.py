"""Activations quantized per token, and weights as the 8-bit operands that go with them."""

from __future__ import annotations

from collections.abc import Iterator

from ..formats.algebra import Affine, integer_gen
from ..formats.spec import ROW
from . import triton_table as table
from . import triton_text as text
from .triton_print import Printer, minifloat_gen
from .triton_words import signed

STEP = 128
"""Weights of a row that one step of a product covers, in as many products as it has scales."""

FP8_TYPES = {(4, 3): "tl.float8e4nv", (5, 2): "tl.float8e5"}
ROUND = 1.5 * 2**23
"""Adding and taking away 1.5·2^23 rounds a float32 below 2^22 in size to the nearest integer, ties to even."""


def blocks(printer: Printer) -> tuple[int, int]:
    """(products in one step, weights of a row in one product)."""
    size = min(printer.granule or STEP, STEP)
    return STEP // size, size


def is_integer(printer: Printer) -> bool:
    """Whether 8-bit operands are integers (else fp8)."""
    return integer_gen(printer.spec) is not None


def bytes_of(printer: Printer) -> tuple[int, tuple[int, ...]]:
    """(shift, int8 values by code) with ``gen = unit · (value + shift)``; the shift is 0 where gen's integers are int8."""
    found = integer_gen(printer.spec)
    assert found is not None
    low, high = min(found[1]), max(found[1])
    shift = 0 if low >= -128 and high <= 127 else low + 128
    return shift, tuple(v - shift for v in found[1])


def form8(printer: Printer) -> Affine:
    """coeff and offset for sums of products with :func:`bytes_of`: Σ x·gen = unit · (Σ x·value + shift · Σ x)."""
    form, found = printer.form, integer_gen(printer.spec)
    if found is None:
        return form
    unit, shift = found[0], bytes_of(printer)[0]
    return Affine(form.coeff * unit, form.gen / unit - shift, form.offset + form.coeff * (unit * shift), form.period)


def bytes8(printer: Printer, tag: str) -> Iterator[str]:
    """Lines that turn words into 8-bit operands ``b{s}{j}{tag}``: gen as int8, or the code as the fp8 that it is.

    Four bytes are computed at once in an int32. Sums of codes v ≤ 255 become v + offset by adding 128 + offset to every
    byte, which cannot carry, and turning the top bit; what is not linear is looked up in a byte table.
    """
    if not is_integer(printer):
        book = minifloat_gen(printer.spec)
        assert book is not None and book.minifloat is not None
        for j in range(4):
            byte = f"(q_{printer.spec.code.name}_0{tag} >> {8 * j}).to(tl.int8)"
            yield f"b0{j}{tag} = {byte}.to({FP8_TYPES[book.minifloat]}, bitcast=True)"
        return
    values = bytes_of(printer)[1]
    order = values[128:] + values[:128] if printer.spec.code.dtype == "i8" else values
    steps = {b - a for a, b in zip(order, order[1:], strict=False)}
    yield from printer.sources(tag)
    if len(steps) == 1 and min(steps) > 0:
        yield from _linear(printer, order[0], min(steps), tag)
    else:
        yield from table.bytes4(printer, values, tag)
    for s in range(printer.slots):
        for j in range(4):
            yield f"b{s}{j}{tag} = (v{s}{tag} >> {8 * j}).to(tl.int8)"


def _linear(printer: Printer, first: int, step: int, tag: str) -> Iterator[str]:
    """``v{s}{tag}``: first + step · code in each byte (code + 128 of i8). Bytes stay below 256, so none carries."""
    if printer.spec.code.dtype == "i8" and (first, step) == (-128, 1):
        yield f"v0{tag} = q_{printer.spec.code.name}_0{tag}"
        return
    yield from printer.biased(tag)
    for s in range(printer.slots):
        quad = f"u{s}{tag}" if len(printer.spec.code.parts) > 1 else f"({printer.quad(s, tag)})"
        if step != 1:
            quad = f"{quad} * {step}"
        if first == 0 and step * (2**printer.spec.code.bits - 1) < 128:
            yield f"v{s}{tag} = {quad}"
            continue
        lifted = f"{quad} + {signed((first + 128) * 0x01010101)}" if first != -128 else quad
        yield f"v{s}{tag} = ({lifted}) ^ {signed(0x80808080)}"


def quantize(printer: Printer, name: str, activations: str) -> str:
    """Per row of x: scale = max|x| / largest, codes = round(x / scale) padded with zeros to KP, and their sums per product.

    A row of zeros has scale 0 and codes 0. e4m3 codes are rounded here (nearest, ties to even, subnormals included), so
    that storing them, as fp8 or as float16 on targets without it, is exact.
    """
    largest = 127.0 if activations == "int8" else 448.0
    arguments = "x_ptr, codes_ptr, scale_ptr, sum_ptr, K, KP, x_stride, " + text.constexprs("BLOCK")
    sums = form8(printer).offset != 0
    body = [
        "row = tl.program_id(0).to(tl.int64)",
        "at = tl.arange(0, BLOCK)",
        "top = tl.zeros([BLOCK], tl.float32)",
        "for start in range(0, K, BLOCK):",
        "    x = tl.load(x_ptr + row * x_stride + start + at, mask=start + at < K, other=0.0).to(tl.float32)",
        "    top = tl.maximum(top, tl.abs(x))",
        "largest = tl.max(top, 0)",
        f"tl.store(scale_ptr + row, largest / {largest})",
        f"inverse = tl.where(largest > 0.0, {largest} / largest, 0.0)",
        *(["total = tl.zeros([BLOCK], tl.float32)"] if sums and printer.granule == ROW else []),
        "for start in range(0, KP, BLOCK):",
        "    x = tl.load(x_ptr + row * x_stride + start + at, mask=start + at < K, other=0.0).to(tl.float32)",
        *text.indented(_rounded(activations), 1),
        "    tl.store(codes_ptr + row * KP + start + at, code.to(codes_ptr.dtype.element_ty), mask=start + at < KP)",
        *text.indented(_sums(printer) if sums else (), 1),
        *(["tl.store(sum_ptr + row, tl.sum(total, 0))"] if sums and printer.granule == ROW else []),
    ]  # fmt: skip
    return text.kernel(name, arguments, body)


def _rounded(activations: str) -> Iterator[str]:
    yield "v = x * inverse"
    if activations == "int8":
        yield f"code = (v + {ROUND}) - {ROUND}"
        return
    # Steps of e4m3 are 2^(e−3) for a leading power 2^e ≥ 2^-6; the sum is rounded to a multiple of the step.
    yield "power = (v.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)"
    yield f"magic = tl.maximum(power, {2.0**-6}) * {ROUND / 8}"
    yield "code = (v + magic) - magic"


def _sums(printer: Printer) -> Iterator[str]:
    if printer.granule == ROW:
        yield "total += code"
        return
    size = blocks(printer)[1]
    yield f"sums = tl.sum(tl.reshape(code, [BLOCK // {size}, {size}]), 1)"
    yield f"entry = start // {size} + tl.arange(0, BLOCK // {size})"
    yield f"tl.store(sum_ptr + row * (KP // {size}) + entry, sums, mask=entry < KP // {size})"
