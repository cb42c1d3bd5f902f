"""Activations quantized per token, and weights as the 8-bit operands that go with them."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import FormatError
from ..formats.spec import ROW
from . import triton_text as text
from .triton_print import Printer, linear_gen, minifloat_gen, signed

FP8_TYPES = {(4, 3): "tl.float8e4nv", (5, 2): "tl.float8e5"}
ROUND = 1.5 * 2**23
"""Adding and taking away 1.5·2^23 rounds a float32 below 2^22 in size to the nearest integer, ties to even."""


def bytes8(printer: Printer, tag: str) -> Iterator[str]:
    """Lines that turn words into 8-bit operands ``b{s}{j}{tag}``: gen as int8, or the code as the fp8 that it is.

    Four bytes are computed at once in an int32. Sums of codes v ≤ 255 become v + offset by adding 128 + offset to every
    byte, which cannot carry, and turning the top bit. Raises :class:`FormatError` when gen does not fit.
    """
    linear, book = linear_gen(printer.spec), minifloat_gen(printer.spec)
    if linear is None and (book is None or book.minifloat not in FP8_TYPES):
        raise FormatError(f"format {printer.spec.name!r}: gen = {printer.form.gen} is neither an int8 nor an fp8 value, so it "
                          "cannot be multiplied by 8-bit activations; use activations=None")  # fmt: skip
    if linear is None:
        assert book is not None and book.minifloat is not None
        for j in range(4):
            byte = f"(q_{printer.spec.codes[0].name}_0{tag} >> {8 * j}).to(tl.int8)"
            yield f"b0{j}{tag} = {byte}.to({FP8_TYPES[book.minifloat]}, bitcast=True)"
        return
    top = sum(a * (2**p.bits - 1) for p, a in linear.weights)
    lift = int(linear.offset) + 128
    if linear.offset != int(linear.offset) or lift < 0 or top + lift > 255:
        raise FormatError(f"format {printer.spec.name!r}: gen = {printer.form.gen} leaves −128…127 or the integers; "
                          "use activations=None")  # fmt: skip
    yield from printer.biased(tag)
    for s in range(printer.slots):
        quad = printer.quad(linear, s, tag)
        if lift:
            quad = f"({quad}) + {signed(lift * 0x01010101)}"
        yield f"u{s}{tag} = ({quad}) ^ {signed(0x80808080)}"
        for j in range(4):
            yield f"b{s}{j}{tag} = (u{s}{tag} >> {8 * j}).to(tl.int8)"


def quantize(printer: Printer, name: str, activations: str) -> str:
    """Per row of x: scale = max|x| / largest, codes = round(x / scale) padded with zeros to KP, and their sums per period.

    A row of zeros has scale 0 and codes 0. e4m3 codes are rounded here (nearest, ties to even, subnormals included), so
    that storing them, as fp8 or as float16 on targets without it, is exact.
    """
    largest = 127.0 if activations == "int8" else 448.0
    arguments = "x_ptr, codes_ptr, scale_ptr, sum_ptr, K, KP, x_stride, " + text.constexprs("BLOCK")
    period = printer.spec.period
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
        *(["total = tl.zeros([BLOCK], tl.float32)"] if period == ROW else []),
        "for start in range(0, KP, BLOCK):",
        "    x = tl.load(x_ptr + row * x_stride + start + at, mask=start + at < K, other=0.0).to(tl.float32)",
        *text.indented(_rounded(activations), 1),
        "    tl.store(codes_ptr + row * KP + start + at, code.to(codes_ptr.dtype.element_ty), mask=start + at < KP)",
        *text.indented(_sums(printer), 1),
        *(["tl.store(sum_ptr + row, tl.sum(total, 0))"] if period == ROW and printer.form.offset != 0 else []),
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
    if printer.form.offset == 0:
        return
    period = printer.spec.period
    if period == ROW:
        yield "total += code"
        return
    yield f"sums = tl.sum(tl.reshape(code, [BLOCK // {period}, {period}]), 1)"
    yield f"entry = start // {period} + tl.arange(0, BLOCK // {period})"
    yield f"tl.store(sum_ptr + row * (KP // {period}) + entry, sums, mask=entry < KP // {period})"
