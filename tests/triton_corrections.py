"""Checks of :mod:`qcompile.codegen.triton_interpreter` itself; of a process in which Triton interprets kernels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from qcompile.codegen.triton_interpreter import correct, prmt

Case = tuple[str, float, float]
"""What was done, the error, and its limit."""


def checked_bfloat16() -> Iterator[Case]:
    """Against PyTorch's bfloat16."""
    a, b = (torch.randn(4096) * 2.0 ** torch.randint(-130, 100, (4096,)) for _ in range(2))
    a, b = a.to(torch.bfloat16), b.to(torch.bfloat16)
    handles = [TensorHandle(t.view(torch.int16).numpy().view(np.uint16), tl.bfloat16) for t in (a, b)]
    for op, want in ((np.add, a + b), (np.subtract, a - b), (np.multiply, a * b)):
        got = InterpreterBuilder.binary_op(None, *handles, op).data
        wrong = (torch.from_numpy(got.view(np.int16)) != want.view(torch.int16)).sum()
        yield op.__name__, float(wrong), 0.5
    a, b = (torch.randn(16, 32).to(torch.bfloat16) for _ in range(2))
    left, right = (TensorHandle(t.contiguous().view(torch.int16).numpy().view(np.uint16), tl.bfloat16) for t in (a, b.mT))
    total = TensorHandle(np.ones((16, 16), np.float32), tl.float32)
    got = torch.from_numpy(InterpreterBuilder.create_dot(None, left, right, total, None, 0).data)
    yield "dot", float((got - a.double() @ b.double().mT - 1).abs().max()), 1e-5


def checked_permutes() -> Iterator[Case]:
    """On the examples of the PTX manual's table and a few more."""
    a, b = np.uint32(0x83028180), np.uint32(0x07060504)
    known = {0x3210: 0x83028180, 0x7654: 0x07060504, 0x6543: 0x06050483, 0x0123: 0x80810283, 0xB888: 0xFFFFFFFF,
             0xCA10: 0x00008180, 0x6240: 0x06020480, 0xFFFF3210: 0x83028180}  # fmt: skip
    for selector, want in known.items():
        got = prmt(*(np.array([v], np.uint32) for v in (a, b, selector)))
        yield hex(selector), float(int(got[0]) != want), 0.5


def checked_casts() -> Iterator[Case]:
    """Values whose mantissa carries, ties, and what does not fit."""
    one = np.array([7.85, 0.0703125, 1.0625, 1.1875, -3000.0, 2.0**-10, 3 * 2.0**-10], np.float32)
    want = [8.0, 0.0703125, 1.0, 1.25, -448.0, 0.0, 2.0**-8]
    got = torch.from_numpy(interpreter._convert_float(one, tl.float32, tl.float8e4nv, None)).view(torch.float8_e4m3fn).float()
    yield "e4m3", float((got - torch.tensor(want)).abs().max()), 0.0
    brain = torch.from_numpy(interpreter._convert_float(one, tl.float32, tl.bfloat16, None).view(np.int16)).view(torch.bfloat16)
    yield "bfloat16", float((brain.float() - torch.from_numpy(one).bfloat16().float()).abs().max()), 0.0


def checks() -> Iterator[Case]:
    correct()
    yield from checked_bfloat16()
    yield from checked_permutes()
    yield from checked_casts()
