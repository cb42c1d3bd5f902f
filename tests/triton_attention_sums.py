"""Attention in e4m3 on matrix units that add with 14 bits, as Hopper's do, against the same that add exactly.

``wgmma`` brings the 32 products of a step and what they are added to to the largest exponent among them, and cuts what lies
below 14 bits (DeepSeek-V3, arXiv:2412.19437, section 3.5.2). Ours starts each block of tokens anew; what a kernel does that
leaves its sums in the matrix unit is shown beside it.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from triton_corrections import Case

from qcompile.codegen.triton_attend_prefill import TritonPrefill, source
from qcompile.codegen.triton_attend_tiles import AttendTile

BITS, STEP = 14, 32
TOKENS = (512, 8192)
TWO_LEVELS = "acc = acc * alpha[:, None] + tl.dot(p, tl.trans(v)) * beta[:, None]"
ONE_LEVEL = "acc = tl.dot(p, tl.trans(v), acc * (alpha / beta)[:, None]) * beta[:, None]"


def aligned(terms: np.ndarray) -> np.ndarray:
    """Σ over the first axis of ``terms``, each cut to :data:`BITS` bits of the largest of its sum."""
    exponents = np.frexp(np.abs(terms).max(0))[1]
    return np.ldexp(np.trunc(np.ldexp(terms, BITS - exponents)).sum(0), exponents - BITS)


@contextlib.contextmanager
def few_bits() -> Iterator[None]:
    """Products of 8-bit floats add as :func:`aligned`, STEP of them at once."""
    exact = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if a.dtype != tl.float8e4nv:
            return exact(self, a, b, d, *options)
        wide = [interpreter._convert_float(x.data, x.dtype, tl.float32, None).view(np.float32) for x in (a, b)]
        left, right = (x.astype(float) for x in wide)
        total = d.data.astype(float)
        for k in range(0, left.shape[1], STEP):
            products = left[:, k : k + STEP].T[:, :, None] * right[k : k + STEP][:, None, :]
            total = aligned(np.concatenate([total[None], products]))
        return TensorHandle(total.astype(np.float32), d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot
    try:
        yield
    finally:
        InterpreterBuilder.create_dot = exact


class OneLevel(TritonPrefill):
    """The kernel with its sums left in the matrix unit."""

    @functools.cached_property
    def sources(self) -> dict[str, str]:
        text = source(self.kind)
        assert text.count(TWO_LEVELS) == 1
        return {self.kind: text.replace(TWO_LEVELS, ONE_LEVEL)}


def lost(kernels: TritonPrefill, tokens: int) -> float:
    """What few bits cost, relative to the output: 16 queries give one token the half of their attention and many the rest, and
    values are like keys, so that what the many give does not cancel."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, n, 32, generator=generator) for n in (16, tokens))
    q[..., 0] = 8.0
    k[..., 0] = 0.0
    k[0, 0, 0, 0] = math.log(tokens) * 32**0.5 / 8.0
    call = functools.partial(kernels.prefill, q, k, k, causal=False, tile=AttendTile(False, 16, 4, 4, 2))
    exact = call()
    with few_bits():
        cut = call()
    return float((cut - exact).norm() / exact.norm())


def summed() -> Iterator[Case]:
    """Ours keeps its error over lengths; left in the matrix unit, sums of many tokens lose many times as much."""
    ours, left = ({n: lost(kernels, n) for n in TOKENS} for kernels in (TritonPrefill("fp8"), OneLevel("fp8")))
    few, many = TOKENS
    yield f"two levels, {few} tokens", ours[few], 1e-3
    yield f"two levels, {many} tokens", ours[many], 1e-3
    yield "two levels against one", ours[many] / left[many], 0.1
    yield f"one level, {few} tokens against {many}", left[few] / left[many], 0.2
