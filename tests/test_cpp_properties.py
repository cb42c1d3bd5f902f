"""Generated CPU kernels on shapes, strides, groups and formats that hypothesis makes up, against the reference."""

from __future__ import annotations

import functools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.formats import Scheme, get, reference
from qcompile.formats.spec import FormatSpec
from qcompile.kernels import for_scheme

NAMES = ("int2_g32", "int3_sym_g96", "int4_g36", "int5_g64", "int6_sym_g48", "int8_g40", "int4_zp_g128_order", "Q3_K", "Q5_K",
         "mxfp4", "nvfp4", "nf4_g80", "fp8_e5m2_b128")  # fmt: skip
"""Groups of all kinds: powers of two or not, blocks of rows, two levels."""

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@functools.cache
def weight(name: str, n: int, k: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Stored planes of a random weight, and what they stand for in float64."""
    spec: FormatSpec = get(name)
    generator = torch.Generator().manual_seed(n * 1000 + k)
    planes = reference.quantize(spec, torch.randn(n, k, generator=generator))
    return planes, reference.decode(spec, planes, n, k).double()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(NAMES), rows=st.integers(0, 70), n=st.integers(1, 80), k=st.integers(1, 600),
    dtype=st.sampled_from(list(UNIT_ROUNDOFF)), stride=st.integers(0, 3), biased=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_and_stride(
    name: str, rows: int, n: int, k: int, dtype: torch.dtype, stride: int, biased: bool, seed: int
) -> None:
    """Allowed: rounding of y, float32 sums, and weights rounded to bfloat16 where many rows make that worth while."""
    planes, exact = weight(name, n, k)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k + stride, generator=generator).to(dtype)[:, stride:]
    bias = torch.randn(n, generator=generator).to(dtype) if biased else None
    y = for_scheme(Scheme(get(name)), "cpu").linear(x, planes, bias, n)
    wide = x.double()
    want = wide @ exact.t() + (bias.double() if bias is not None else 0.0)
    rounding = 6 * 0.4 * 2.0**-8 * (wide.square() @ exact.square().t()).sqrt() if dtype == torch.bfloat16 else 0.0
    allowed = UNIT_ROUNDOFF[dtype] * want.abs() + 1e-6 * torch.outer(wide.norm(dim=1), exact.norm(dim=1)) + 1e-6 + rounding
    assert y.shape == (rows, n) and y.dtype == dtype and bool(((y.double() - want).abs() <= allowed).all())
