"""Runs the attention kernels under Triton's interpreter and compares them with float64; a process of its own.

Prints one JSON object for each case: ``check``, ``case``, ``error``, ``limit``. ``tests/test_triton_attention.py`` starts it.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import functools
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton_attention_sums as sums
import triton_corrections as corrections
from triton_attention_reference import (
    Case,
    attention,
    cache_of,
    empty_planes,
    garbage,
    in_eighths,
    ranged,
    repacked,
    rows_of,
    spec_of,
    turned_in_eighths,
)

from qcompile.codegen.triton_attend_codes import KINDS, group_of
from qcompile.codegen.triton_attend_tiles import AttendTile
from qcompile.codegen.triton_attention import triton_attention, triton_prefill
from qcompile.formats import FormatSpec, Scheme, get, reference
from qcompile.formats.layout import center_of
from qcompile.formats.turning import turned

WRITTEN = ("fp8_e4m3", "fp8_e5m2", "int8", "int8_g64", "int4_g32", "int4_sym_g32", "int4_zp_g32", "nf4_g32", "fp4_g32",
           "int3_g32", "row_zero", "byte_zero", "six_sym", "fp6", "fp8_e3m4", "odd_zero")  # fmt: skip


# write ----------------------------------------------------------------------------------------------------------------


def written(spec: FormatSpec, dim: int, length: int, paged: bool) -> Iterator[Case]:
    """New tokens in the middle of a cache: planes exactly those of the rule, all else untouched, and the error not much above
    that of scales found by search."""
    batch, heads, page = 2, 2, 16 if paged else 48
    start = torch.tensor([5, 13])
    table = torch.randperm(8)[:6].view(2, 3).int() if paged else None
    planes = [empty_planes(spec, 8 if paged else batch, heads, page, dim) for _ in range(2)]
    new = [torch.randn(batch, length, heads, dim).transpose(1, 2) * torch.rand(batch, heads, length, 1) * f for f in (1.0, 30.0)]
    new = [in_eighths(x) for x in new]
    new[0][0, 0, 0] = 0.0
    held = [turned_in_eighths(spec, x) for x in new]
    triton_attention(Scheme(spec), Scheme(spec)).write(planes[0], planes[1], new[0], new[1], start, table)
    at = [[(int(table[b, t // page]) if table is not None else b, t % page) for t in range(start[b], start[b] + length)]
          for b in range(batch)]  # fmt: skip
    unequal, untouched, error, best = 0, True, 0.0, 0.0
    for side, x in zip(planes, held, strict=True):
        for b, h in itertools.product(range(batch), range(heads)):
            packed = [repacked(torch.stack([rows_of(p)[i, h, j] for i, j in at[b]])) for p in side]
            unequal += sum(int((a[:, :, :] != w).sum()) for a, w in zip(packed, ranged(spec, x[b, h]), strict=True))
            error += float((reference.decode(spec, packed, length, dim) - x[b, h]).square().sum())
            best += float((reference.decode(spec, reference.quantize(spec, x[b, h]), length, dim) - x[b, h]).square().sum())
        for plane in side:
            kept = torch.ones(plane.shape[0], page, dtype=torch.bool)
            for i, j in itertools.chain(*at):
                kept[i, j] = False
            rest = rows_of(plane).transpose(1, 2)[kept]
            untouched &= torch.equal(rest.nan_to_num(7.0), garbage(rest.shape, plane.dtype).nan_to_num(7.0))
    name = f"{spec.name} D={dim} L={length} paged={paged}"
    yield f"{name}: planes of the rule", float(unequal), 0.0
    yield f"{name}: others untouched", float(not untouched), 0.0
    yield f"{name}: error over that of a search", math.sqrt(error / best), 1.35


def unusual(name: str) -> Iterator[Case]:
    """What is not finite stays visible, tokens without room go nowhere, and such a sequence is NaN when it is read."""
    spec = spec_of(name)
    kernels = triton_attention(Scheme(spec), Scheme(spec))
    planes = [torch.zeros(2, 1, *spec.part_shape(p, 32, 64), dtype=p.dtype) for p in spec.parts]
    new = torch.randn(2, 1, 20, 64)
    for i, value in enumerate((math.nan, math.inf, -math.inf)):
        new[1, 0, 4 + i, 7] = value
    kernels.write(planes, planes, new, new, torch.tensor([20, 0]))
    decoded = [turned(spec, reference.decode(spec, [p[b, 0] for p in planes], 32, 64)) for b in range(2)]
    bad = decoded[1][4:7, 7].isnan().all() and decoded[1][[*range(4), *range(7, 32)]].isfinite().all()
    yield f"{name} not finite", float(not bad), 0.0
    apart = (decoded[0][20:] - new[0, 0, :12]).norm() / new[0, 0, :12].norm()
    yield f"{name} no room", float(apart) + float((decoded[1][20:] - decoded[0][0]).abs().max()), 0.2
    read = kernels.attend(torch.randn(2, 1, 1, 64), planes, planes, torch.tensor([39, 3]), 40, 64)
    yield f"{name} too long", float(not (read[0].isnan().all() and read[1].isfinite().all())), 0.0


# attend ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attend:
    """One call: formats, shape, and options; ``kept`` tokens of each sequence, ``tile`` to choose a kernel."""

    keys: str
    values: str
    dtype: torch.dtype
    dim: int = 64
    heads: int = 2
    group: int = 2
    length: int = 1
    kept: tuple[int, ...] = (37, 90)
    page: int = 0
    mask: str = ""
    causal: bool = True
    softcap: float = 0.0
    window: int = 0
    scale: float | None = None
    value_dim: int = 0
    tile: AttendTile | None = None
    centered: bool = False


FEW, MANY = AttendTile(True, 16, 2, 4, 2), AttendTile(False, 32, 4, 4, 2)
HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
BASE = Attend("int8", "int8", FLOAT)
CALLS = (
    *(Attend(f, f, dtype, 64, length=length) for f in (*WRITTEN[:-1], "mxfp4") for dtype, length in ((FLOAT, 1), (HALF, 3))),
    *(Attend(f, f, dtype, 128, length=17, tile=MANY)
      for f, dtype in zip(WRITTEN, itertools.cycle((HALF, BRAIN, FLOAT)), strict=False)),
    Attend("fp6_blocks", "two_scales", HALF, 128, length=17, tile=MANY),
    *(Attend("int8", "fp8_e4m3", dtype, dim, length=length) for dim, length in ((72, 3), (80, 1), (96, 17), (256, 1))
      for dtype in (HALF, BRAIN)),
    Attend("int4_g32", "nf4_g32", HALF, 72), Attend("row_zero", "row_zero", HALF, 72, length=17, tile=MANY),
    Attend("int8", "int8", HALF, 256, length=17, tile=MANY), Attend("int8", "int8", FLOAT, 512),
    Attend("int8", "int4_g32", HALF, 96, value_dim=64), Attend("mxfp4", "int8_g64", HALF, 80, length=3, tile=MANY),
    *(replace(BASE, length=length, mask=mask, tile=tile)
      for mask in ("padding", "bool", "short", "float", "float16", "least", "none", "heads")
      for length, tile in ((1, FEW), (17, MANY))),
    *(replace(BASE, length=length, causal=causal, window=window, tile=tile) for length, tile in ((3, FEW), (17, MANY))
      for causal in (True, False) for window in (0, 1, 20)),
    replace(BASE, length=3, softcap=1.5, scale=0.5), replace(BASE, length=17, softcap=20.0, tile=MANY, keys="row_zero"),
    replace(BASE, length=3, softcap=2.0, mask="float", window=9), replace(BASE, scale=2.0),
    *(replace(BASE, keys=f, values=f, page=page, length=length, kept=(37, 90), dtype=HALF)
      for f, page, length in (("fp8_e4m3", 16, 1), ("int4_g32", 32, 3), ("int8_g64", 48, 17))),
    replace(BASE, page=16, length=3, tile=replace(FEW, tiles=4)), replace(BASE, group=1, heads=3),
    replace(BASE, group=8, heads=1),
    replace(BASE, kept=(1, 700), group=4, tile=FEW), replace(BASE, kept=(40, 700), page=16, length=5, tile=MANY),
    replace(BASE, kept=(300, 700), window=64, group=4, tile=FEW), replace(BASE, kept=(16, 16), length=16, causal=True),
    *(replace(BASE, keys=keys, softcap=3.0, dtype=dtype, length=length, dim=dim, page=16, tile=tile, centered=True)
      for keys, dtype, length, dim, tile in (("int8", FLOAT, 3, 72, FEW), ("fp8_e4m3", HALF, 17, 64, MANY),
                                             ("int4_zp_g32", BRAIN, 1, 96, FEW), ("row_zero", FLOAT, 17, 64, MANY))),
)  # fmt: skip
ROUNDING = {HALF: 2e-3, BRAIN: 6e-3, FLOAT: 1e-5}
"""Relative error (Frobenius) allowed where scales leave the products: rounding of probabilities and of the output."""

IN_16_BITS = {HALF: 2e-3, BRAIN: 6e-3, FLOAT: 5e-3}
"""The same where they do not: keys and values are rounded to 16 bits too, for float32 queries to bfloat16."""


def mask_of(kind: str, batch: int, heads: int, length: int, tokens: int) -> torch.Tensor | None:
    """A mask of a kind; True: may attend."""
    allowed = torch.rand(batch, heads, length, tokens) < 0.7
    if kind == "padding":
        return allowed[:, :1, :1]
    if kind == "bool":
        allowed[0, 0, 0] = False
        return allowed
    if kind == "short":
        return allowed[:1, :1, :, : tokens - 20]
    if kind in ("float", "float16", "heads"):
        bias = torch.randn(batch, heads, length, tokens).masked_fill(~allowed, -torch.inf)
        return bias.half() if kind == "float16" else bias[:1, :, :1] if kind == "heads" else bias
    if kind == "least":
        return torch.zeros(batch, 1, length, tokens).masked_fill(~allowed[:, :1], torch.finfo(FLOAT).min)
    return torch.zeros(batch, 1, 1, tokens, dtype=torch.bool) if kind == "none" else None


def packed_here(dtype: torch.dtype) -> Iterator[Case]:
    """``sdpa``: keys and values packed and read at once, keys without their mean."""
    made = [torch.randn(2, heads, tokens, 64).to(dtype) for heads, tokens in ((4, 9), (2, 30), (2, 30))]
    made[1][..., 5] += 40.0
    kernels, center = triton_attention(Scheme(get("fp8_e4m3")), Scheme(get("int8"))), center_of(made[1])
    sides = []
    for s, x in zip(kernels.formats, (made[1] - center, made[2]), strict=True):
        held = turned(s, x).float().flatten(0, 1)
        sides.append(turned(s, torch.stack([reference.decode(s, ranged(s, rows), 30, 64) for rows in held])).view_as(x))
    sides[0] = sides[0] + center
    for causal, softcap in itertools.product((True, False), (0.0, 2.0)):
        want = attention(made[0], *sides, [30, 30], torch.arange(9).expand(2, -1), None, causal, 0.2, softcap, 0)
        got = kernels.sdpa(*made, None, causal, 0.2, softcap)
        yield f"sdpa causal={causal} softcap={softcap}", float((got.double() - want).norm() / want.norm()), ROUNDING[dtype]
    for name, kind in (("fp8_e4m3", "fp8"), ("int8", "int8"), ("fp8_e3m4", "int8_both")):  # products in 8 bits
        scheme, where = Scheme(get(name)), torch.arange(9).expand(2, -1)
        want = attention(*made, [30, 30], where, None, False, 0.2, 0.0, 0)
        got = triton_attention(scheme, scheme).sdpa(*made, None, False, 0.2, 0.0)
        assert torch.equal(got, triton_prefill(kind).prefill(*made, causal=False, scale=0.2))
        yield f"sdpa in {kind}", float((got.double() - want).norm() / want.norm()), LIMITS[kind]["normal"]


def attended(call: Attend) -> Iterator[Case]:
    keys, values = spec_of(call.keys), spec_of(call.values)
    batch, value_dim = len(call.kept), call.value_dim or call.dim
    longest = max(call.kept)
    page = call.page or -(-longest // 16) * 16
    table = None
    if call.page:
        count = -(-longest // page)
        table = torch.randperm(batch * count + 2)[: batch * count].view(batch, count).int()
    k, v = (torch.randn(batch, call.heads, longest, d) for d in (call.dim, value_dim))
    caches = [cache_of(s, x, page, table, 2, list(call.kept)) for s, x in ((keys, k), (values, v))]
    if table is not None:
        for b, count in enumerate(call.kept):
            table[b, -(-count // page) :] = 2**30  # what a table holds behind a sequence is never followed
    query = torch.randn(batch, call.length, call.heads * call.group, call.dim).transpose(1, 2).to(call.dtype)
    start = torch.tensor(call.kept) - call.length
    mask = mask_of(call.mask, batch, call.heads * call.group, call.length, longest)
    center = torch.randn(batch, call.heads, 1, call.dim) if call.centered else None
    got = triton_attention(Scheme(keys), Scheme(values)).attend(
        query, caches[0].planes, caches[1].planes, start, longest, value_dim, mask, table, call.causal, call.scale,
        call.softcap, call.window, center, tile=call.tile)  # fmt: skip
    position = start[:, None] + torch.arange(call.length)
    held = caches[0].decoded if center is None else caches[0].decoded + center.to(caches[0].decoded.dtype)
    want = attention(query, held, caches[1].decoded, list(call.kept), position, mask, call.causal, call.scale, call.softcap,
                     call.window)  # fmt: skip
    exact = all(s.period == 0 for s in (keys, values))
    limit = ROUNDING[call.dtype] if exact else IN_16_BITS[call.dtype]
    shape = (batch, call.heads * call.group, call.length, value_dim)
    sound = tuple(got.shape) == shape and got.dtype == call.dtype and bool(torch.isfinite(got).all())
    zeros = bool((got[(want == 0).all(-1)] == 0).all())
    difference = float((got.double() - want).norm() / max(float(want.norm()), 1e-3))
    yield f"{call}", difference if sound and zeros else math.inf, limit


# prefill --------------------------------------------------------------------------------------------------------------


def shaped(kind: str, dim: int, length: int, tokens: int, group: int) -> list[torch.Tensor]:
    """Queries, keys and values: normal; with a mean; with channels and single entries far out; with one entry in a thousand ten
    times as wide; with channels that are wide in queries and narrow in keys or the reverse, and two that are 0."""
    made = [torch.randn(2, 2 * group if i == 0 else 2, length if i == 0 else tokens, dim) for i in range(3)]
    if kind == "mean":
        made[1] += 3.0
        made[2] += 1.0
    if kind == "outliers":
        channel = torch.arange(dim)
        made[0] = made[0] * (1 + 3 * (channel % 23 == 3)) + 10 * torch.randn(made[0].shape) * (torch.rand(made[0].shape) < 1e-3)
        made[1] = made[1] + 20 * (channel % 19 == 5) + 10 * torch.randn(made[1].shape) * (torch.rand(made[1].shape) < 1e-3)
        made[2] = made[2] * (1 + 10 * (channel % 17 == 1))
    if kind == "unequal":
        width = torch.exp2(2 * torch.randn(dim))
        made[0], made[1] = made[0] * width * (torch.arange(dim) != 3), made[1] / width * (torch.arange(dim) != 5)
    if kind == "rare":
        made = [x + 10 * torch.randn(x.shape) * (torch.rand(x.shape) < 1e-3) for x in made]
    return made


LIMITS = {"int8": dict.fromkeys(("normal", "mean", "outliers", "rare", "unequal"), 1e-2),
          "int8_both": {"normal": 2.2e-2, "mean": 2.2e-2, "outliers": 3e-2, "rare": 3e-2, "unequal": 2.2e-2},
          "fp8": {"normal": 6e-2, "mean": 3e-2, "outliers": 6.5e-2, "rare": 7e-2, "unequal": 7e-2}}  # fmt: skip
"""e4m3 rounds every number by 2.6% (root mean square), alike in probabilities and values, and scores of normal numbers by 3.7%
of their deviation: 5.2% of an output whose values have no mean. int8 keeps scores to 0.8%, and as much again is lost to values
and to probabilities in int8, whose steps are those of the largest of a block."""


def prefilled(kind: str) -> Iterator[Case]:
    kernels = triton_prefill(kind)
    options: tuple[tuple[int, int, int, int, str, dict[str, Any]], ...] = (
        (64, 33, 70, 2, "normal", {}), (128, 70, 130, 1, "normal", {"causal": False}), (72, 20, 50, 2, "normal", {"start": 30}),
        (80, 50, 50, 2, "mean", {}), (64, 40, 150, 2, "outliers", {"causal": False}), (128, 33, 64, 1, "outliers", {"start": 31}),
        (96, 30, 100, 1, "normal", {"window": 20, "start": 70}), (64, 20, 40, 2, "normal", {"softcap": 3.0, "scale": 0.2}),
        (64, 20, 40, 2, "mean", {"mask": "bool", "causal": False}), (64, 20, 70, 2, "normal", {"mask": "float"}),
        (256, 17, 40, 1, "normal", {}), (64, 40, 300, 2, "rare", {"causal": False}), (128, 70, 300, 1, "rare", {"start": 230}),
        (128, 20, 70, 1, "normal", {"value_dim": 24, "start": 50}), (32, 20, 70, 1, "outliers", {"value_dim": 96, "start": 50}),
        (512, 17, 40, 1, "normal", {}), (64, 40, 150, 2, "unequal", {"causal": False}), (80, 70, 70, 1, "unequal", {}),
    )  # fmt: skip
    for dim, length, tokens, group, shape, given in options:
        inputs = shaped(shape, dim, length, tokens, group)
        if width := given.get("value_dim"):
            inputs[2] = shaped(shape, width, length, tokens, group)[2]
        mask = mask_of(given.get("mask", ""), 2, 2 * group, length, tokens)
        settings: dict[str, Any] = {"causal": True, "scale": None, "softcap": 0.0, "window": 0} | given | {"mask": mask}
        first, _ = settings.pop("start", 0), settings.pop("value_dim", 0)
        got = kernels.prefill(*inputs, start=first, **settings)
        position = (first + torch.arange(length)).expand(2, -1)
        want = attention(*inputs, [tokens] * 2, position, **settings)
        zeros = bool((got[(want == 0).all(-1)] == 0).all())
        error = float((got.double() - want).norm() / want.norm())
        yield f"{kind} D={dim} L={length} T={tokens} {shape} {given}", error if zeros else math.inf, LIMITS[kind][shape]
    for dtype in (HALF, BRAIN):
        inputs = [x.to(dtype) for x in shaped("normal", 64, 20, 40, 1)]
        want = attention(*inputs, [40] * 2, torch.arange(20).expand(2, -1), None, True, None, 0.0, 0)
        yield f"{kind} {dtype}", float((kernels.prefill(*inputs).double() - want).norm() / want.norm()), LIMITS[kind]["normal"]


def drawn(kind: str) -> Iterator[Case]:
    """Numbers far out, over four draws of each of four sizes of heads."""
    for dim, shape in itertools.product((32, 64, 128, 256), ("rare", "outliers")):
        lost = whole = 0.0
        for _ in range(4):
            inputs = shaped(shape, dim, 64, 300, 2)
            want = attention(*inputs, [300] * 2, torch.arange(64).expand(2, -1), None, False, None, 0.0, 0)
            lost += float((triton_prefill(kind).prefill(*inputs, causal=False).double() - want).square().sum())
            whole += float(want.square().sum())
        yield f"{kind} D={dim} {shape} draws", math.sqrt(lost / whole), {"int8": 9e-3, "int8_both": 2.2e-2, "fp8": 6.5e-2}[kind]


def far_out(kind: str) -> Iterator[Case]:
    """Numbers far out at a size that calls have, one draw each; and a query that is not finite, which changes no other."""
    for dim, shape in ((64, "rare"), (64, "outliers")):
        inputs = [x[:1].half() for x in shaped(shape, dim, 1024, 1024, 1)]
        want = attention(*inputs, [1024], torch.arange(1024).expand(1, -1), None, False, None, 0.0, 0)
        error = float((triton_prefill(kind).prefill(*inputs, causal=False).double() - want).norm() / want.norm())
        yield f"{kind} D={dim} {shape} 1024 tokens", error, LIMITS[kind][shape]
    inputs = shaped("normal", 64, 20, 40, 1)
    inputs[0][0, 0, 7, 9] = math.inf
    want = attention(*inputs, [40] * 2, torch.arange(20).expand(2, -1), None, False, None, 0.0, 0)
    others = torch.arange(20) != 7
    got, want = triton_prefill(kind).prefill(*inputs, causal=False)[:, :, others], want[:, :, others]
    yield f"{kind} beside one not finite", float((got.double() - want).norm() / want.norm()), LIMITS[kind]["normal"]


def emulated(kind: str) -> Iterator[Case]:
    """Kernels against their own arithmetic, over three blocks of tokens."""
    for dim in (32, 64, 256):
        query, k, v = shaped("mean", dim, 20, 96, 1)
        got = triton_prefill(kind).prefill(query, k, v, causal=False, tile=AttendTile(False, 32, 2, 4, 2))
        want = _in_codes(kind, query, k, v)
        error = float((got.double() - want).norm() / want.norm())
        yield f"{kind} D={dim} as it is meant", error, 1e-4 if kind == "fp8" else 5e-4


def _in_codes(kind: str, query: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of all queries over all tokens, 32 of them to a block, in the codes of ``kind``."""
    dim = query.shape[3]
    turn = torch.eye(dim)
    if kind != "fp8":
        turn = functools.reduce(torch.kron, [torch.tensor([[1.0, 1.0], [1.0, -1.0]])] * (dim.bit_length() - 1)) / dim**0.5

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return (x.float().to(torch.float8_e4m3fn) if kind == "fp8" else x.round()).double()

    def coded(x: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
        unit = x.abs().amax(axes, keepdim=True) / (448.0 if kind == "fp8" else 127.0)
        return rounded(x / unit) * unit.double()

    def brain(x: torch.Tensor) -> torch.Tensor:
        return x.to(BRAIN).to(x.dtype)

    def middle(x: torch.Tensor) -> torch.Tensor:
        return brain((x.amax(4, keepdim=True) + x.amin(4, keepdim=True)) * (0.5 if kind == "int8" else 0.0))

    keys, factors = k - k.mean(2, keepdim=True), torch.ones(1)
    if kind != "fp8":
        factors = (keys.square().mean(2, keepdim=True) / query.square().mean(2, keepdim=True)) ** 0.25
    near, keys, values = (query * factors) @ turn, (keys / factors) @ turn, (v - v.mean(2, keepdim=True)) @ turn
    near = near * (dim**-0.5 / math.log(2))
    near, keys = (x.unflatten(3, (-1, group_of(dim) if kind == "int8" else dim)) for x in (near, keys))
    a, b = middle(near), middle(keys)
    sides = [(coded(near - a, (4,)), coded(keys - b, (4,))), (brain((near - a).double().sum(4, True)), b.double()),
             (a.double(), brain(keys.double().sum(4, True)))]  # fmt: skip
    scores = sum((x.flatten(3) @ y.flatten(3).mT for x, y in sides), torch.zeros((), dtype=torch.float64))
    scores = scores.unflatten(3, (3, 32))
    tops, most = scores.amax(4, keepdim=True), 256.0 if kind == "fp8" else 127.0
    tops = tops.cummax(3).values if kind == "int8" else tops
    p, weights = (scores - tops).exp2(), (tops - tops.amax(3, keepdim=True)).exp2()
    if kind == "int8":
        near, blocks = brain(p), brain(v).double().unflatten(2, (3, 32))
    else:
        near, blocks = rounded(p * most) / most, coded(values.unflatten(2, (3, 32)), (3, 4))
    x = torch.einsum("bhlcn,bhcnd->bhld", near * weights, blocks) / (p * weights).sum((3, 4))[..., None]
    return x if kind == "int8" else x @ turn.double() + v.mean(2, keepdim=True)


def run(check: str, found: Iterator[Case]) -> None:
    torch.manual_seed(0)
    for case, error, limit in found:
        print(json.dumps({"check": check, "case": case, "error": error, "limit": limit}), flush=True)


def main() -> None:
    torch.set_num_threads(1)
    run("correction", corrections.checks())
    for i, name in enumerate(WRITTEN):
        for dim, length, paged in ((64, 17, False), (64, 3, True), (72, 1 + 8 * (i % 2), i % 2 == 0)):
            run("write", written(spec_of(name), dim, length, paged))
    for name in ("fp8_e4m3", "int8", "int4_g32", "int4_zp_g32"):
        run("write", unusual(name))
    for call in CALLS:
        run("attend", attended(call))
    run("attend", packed_here(HALF))
    checks: tuple[tuple[str, Callable[[str], Iterator[Case]]], ...] = (("prefill", prefilled), ("emulation", emulated))
    for check, function in checks:
        for kind in KINDS:
            run(check, function(kind))
    for kind in KINDS:
        run("prefill", drawn(kind))
        run("prefill", far_out(kind))
    run("sums", sums.summed())


if __name__ == "__main__":
    sys.exit(main())
