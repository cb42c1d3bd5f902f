"""What Triton's interpreter lacks: bfloat16 arithmetic, byte permutes, PTX. Emulated, and the emulation checked."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import triton.language as tl
from triton.language.extra.cuda import libdevice
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

Case = tuple[str, float, float]
"""What was done, the error, and its limit."""


def correct_bfloat16() -> None:
    """Makes the interpreter's bfloat16 add, subtract and multiply round as hardware does; it takes the bits for integers. Triton
    3.6 does not know numbers of that type at all."""
    original = InterpreterBuilder.binary_op

    def binary_op(self, lhs, rhs, op):  # type: ignore[no-untyped-def]
        if lhs.get_element_ty() != tl.bfloat16 or op not in (np.add, np.subtract, np.multiply):
            return original(self, lhs, rhs, op)
        with np.errstate(over="ignore"):
            wide = op(widened(lhs.data), widened(rhs.data))
        rounded = torch.from_numpy(np.array(wide)).to(torch.bfloat16).view(torch.int16).numpy()
        return TensorHandle(rounded.view(np.uint16), lhs.dtype.scalar)

    def get_bf16(self, value):  # type: ignore[no-untyped-def]
        return self.create_fp_trunc(self.get_fp32(value), tl.bfloat16)

    InterpreterBuilder.binary_op = binary_op
    if not hasattr(InterpreterBuilder, "get_bf16"):
        InterpreterBuilder.get_bf16 = get_bf16


def widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def correct_indices() -> None:
    """Lets tensors bound loops: the interpreter of Triton 3.6 makes a number of an array in a way that numpy 2.4 refuses."""
    original = interpreter._patch_lang_tensor

    def patched(tensor, scope):  # type: ignore[no-untyped-def]
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


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


def checked_bfloat16() -> Iterator[Case]:
    """The correction itself, against PyTorch's bfloat16."""
    a, b = (torch.randn(4096) * 2.0 ** torch.randint(-130, 100, (4096,)) for _ in range(2))
    a, b = a.to(torch.bfloat16), b.to(torch.bfloat16)
    handles = [TensorHandle(t.view(torch.int16).numpy().view(np.uint16), tl.bfloat16) for t in (a, b)]
    for op, want in ((np.add, a + b), (np.subtract, a - b), (np.multiply, a * b)):
        got = InterpreterBuilder.binary_op(None, *handles, op).data
        wrong = (torch.from_numpy(got.view(np.int16)) != want.view(torch.int16)).sum()
        yield op.__name__, float(wrong), 0.5


def checked_permutes() -> Iterator[Case]:
    """The emulation itself, on the examples of the PTX manual's table and a few more."""
    a, b = np.uint32(0x83028180), np.uint32(0x07060504)
    known = {0x3210: 0x83028180, 0x7654: 0x07060504, 0x6543: 0x06050483, 0x0123: 0x80810283, 0xB888: 0xFFFFFFFF,
             0xCA10: 0x00008180, 0x6240: 0x06020480, 0xFFFF3210: 0x83028180}  # fmt: skip
    for selector, want in known.items():
        got = prmt(*(np.array([v], np.uint32) for v in (a, b, selector)))
        yield hex(selector), float(int(got[0]) != want), 0.5


def checks() -> Iterator[Case]:
    """The emulations themselves."""
    yield from checked_bfloat16()
    yield from checked_permutes()
