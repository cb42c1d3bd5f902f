"""What Triton's interpreter lacks or gets wrong, made right where it runs kernels (``TRITON_INTERPRET=1``), so that they compute
on a CPU in the types that a GPU multiplies: bfloat16 arithmetic, casts between floats, byte permutes."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.language.extra.cuda import libdevice
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from .triton_table import HIDE

FLOATS = {tl.float32: torch.float32, tl.float16: torch.float16, tl.bfloat16: torch.bfloat16,
          tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}  # fmt: skip
SIGNED = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@functools.cache
def correct() -> None:
    """Corrects the interpreter of this process."""
    _correct_bfloat16()
    _correct_casts()
    _correct_permutes()
    _correct_indices()


def _correct_bfloat16() -> None:
    """Sums, differences and products of bfloat16 numbers round as hardware does, and matrix products of them are exact; the
    interpreter takes their bits for integers. Triton 3.6 does not know numbers of that type at all."""
    original, product = InterpreterBuilder.binary_op, InterpreterBuilder.create_dot

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if lhs.get_element_ty() != tl.bfloat16 or op not in (np.add, np.subtract, np.multiply):
            return original(self, lhs, rhs, op)
        with np.errstate(over="ignore"):
            wide = op(widened(lhs.data), widened(rhs.data))
        rounded = torch.from_numpy(np.array(wide)).to(torch.bfloat16).view(torch.int16).numpy()
        return TensorHandle(rounded.view(np.uint16), lhs.dtype.scalar)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (TensorHandle(widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return product(self, a, b, *rest)

    def get_bf16(self: Any, value: float) -> Any:
        return self.create_fp_trunc(self.get_fp32(value), tl.bfloat16)

    InterpreterBuilder.binary_op = binary_op
    InterpreterBuilder.create_dot = create_dot
    if not hasattr(InterpreterBuilder, "get_bf16"):
        InterpreterBuilder.get_bf16 = get_bf16


def widened(bits: np.ndarray) -> np.ndarray:
    """float32 numbers of bfloat16 ones given as uint16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _correct_casts() -> None:
    """Casts between floats round to the nearest, ties to even, and saturate in 8 bits, as hardware."""
    original = interpreter._convert_float

    def convert(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if source not in FLOATS or target not in FLOATS:
            return original(data, source, target, rounding)
        old, new = FLOATS[source], FLOATS[target]
        bits = np.ascontiguousarray(data).view(f"int{8 * old.itemsize}" if old.itemsize > 1 else "uint8")
        x = torch.from_numpy(bits.copy()).view(old).float()
        if new.itemsize == 1:
            x = x.clamp(-torch.finfo(new).max, torch.finfo(new).max)
        return x.to(new).view(SIGNED[new.itemsize]).numpy().view(f"uint{8 * new.itemsize}").reshape(data.shape)

    interpreter._convert_float = convert


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


def _correct_permutes() -> None:
    """The byte permute of kernels that use tables, and the literal that the only PTX in them hides: the interpreter has neither
    library functions nor PTX."""

    def word(x: Any) -> Any:
        number = isinstance(x, int) or hasattr(x, "value")
        return np.uint32(int(getattr(x, "value", x)) & 0xFFFFFFFF) if number else x.handle.data.view(np.uint32)

    def byte_perm(a: Any, b: Any, selector: Any) -> Any:
        tensor = next(x for x in (a, b, selector) if isinstance(x, tl.tensor))
        found = prmt(*np.broadcast_arrays(*map(word, (a, b, selector))))
        return tl.tensor(TensorHandle(found.view(np.int32), tl.int32), tensor.type)

    def assembled(asm: str, constraints: str, args: Any, *rest: Any, **named: Any) -> Any:
        return args[0] * 0 + args[1] if asm == HIDE else original(asm, constraints, args, *rest, **named)

    original = tl.inline_asm_elementwise
    libdevice.byte_perm = byte_perm
    tl.inline_asm_elementwise = assembled


def _correct_indices() -> None:
    """Tensors may bound loops: the interpreter of Triton 3.6 makes a number of an array in a way that numpy 2.4 refuses."""
    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
