"""Attention kernels of the CPU over packed keys and values, against float64 attention over what the planes decode to."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qcompile import kv_cache, ops
from qcompile.codegen.cpp_attention import CpuAttention, cpu_attention
from qcompile.errors import FormatError, LayoutError, OptionError
from qcompile.formats import Scheme, get, register_scheme
from qcompile.formats.layout import pages
from qcompile.formats.reference import decode
from qcompile.formats.turning import turned
from qcompile.kv_cache import KVCache
from qcompile.paged_cache import PagedKVCache

PAIRS = (
    ("fp8_e4m3", "fp8_e4m3"), ("int8", "int8"), ("int4_g32", "int4_g32"), ("fp8_e5m2", "int4_zp_g32"), ("nf4_g32", "int8_g32"),
    ("fp8_e3m4", "fp8_e3m4"),
)  # fmt: skip
"""Formats of keys and values: a scale for each token, for groups; offsets, zero points, tables."""

ROUNDING = {torch.float32: 2e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Allowed relative error (Frobenius): rounding of the result, and of float32 sums."""


def scheme(name: str) -> Scheme:
    found = Scheme(get(name))
    register_scheme(found)
    return found


def stored(name: str, planes: list[torch.Tensor], dim: int) -> torch.Tensor:
    """What planes decode to: [pages, heads, tokens, dim]."""
    count, heads, tiles = planes[0].shape[:3]
    flat = [[decode(get(name), [p[i, h] for p in planes], 16 * tiles, dim) for h in range(heads)] for i in range(count)]
    return torch.stack([torch.stack(row) for row in flat])


def decoded(name: str, planes: list[torch.Tensor], dim: int) -> torch.Tensor:
    """What planes hold, turned back: float64 [pages, heads, tokens, dim]."""
    return turned(get(name), stored(name, planes, dim))


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor, mask: torch.Tensor | None = None, causal: bool = True,
    scale: float | None = None, softcap: float = 0.0, window: int = 0,
) -> torch.Tensor:  # fmt: skip
    """float64 attention of q [B, Hq, L, D] at positions start[b] … over k, v [B, H, T, D], of which start[b] + L tokens count."""
    group, length, tokens = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q.double() @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        part = mask[..., :tokens]
        part = torch.nn.functional.pad(part, (0, tokens - part.shape[-1]), value=False if mask.dtype == torch.bool else -math.inf)
        scores = scores.masked_fill(~part, -math.inf) if mask.dtype == torch.bool else scores + part.double()
    at, token = start[:, None] + torch.arange(length), torch.arange(tokens)
    seen = token < (start[:, None, None] + length)
    if causal:
        seen = seen & (token <= at[..., None])
    if window:
        seen = seen & (token > at[..., None] - window)
    scores = scores.masked_fill(~seen[:, None], -math.inf)
    return torch.nan_to_num(scores.softmax(-1)) @ v


def relative(out: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((out.double() - wanted).norm() / wanted.norm())


def filled(keys: str, values: str, k: torch.Tensor, v: torch.Tensor, room: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    batch, heads = k.shape[:2]
    made = tuple(pages(get(f), batch, heads, room, x.shape[-1], x.device) for f, x in ((keys, k), (values, v)))
    cpu_attention(scheme(keys), scheme(values)).write(made[0], made[1], k, v, torch.zeros(batch, dtype=torch.int64))
    return made[0], made[1]


def masks(batch: int, heads: int, length: int, tokens: int) -> dict[str, torch.Tensor | None]:
    some = torch.rand(batch, 1, length, tokens) < 0.7
    some[..., 0] = True
    return {
        "none": None, "bool": some, "bool of one row": some[:1, :, :1], "strided": some.mT.contiguous().mT,
        "float": torch.randn(batch, heads, length, tokens), "half": torch.randn(1, 1, length, tokens).half(),
        "infinite": torch.where(some, 0.0, -math.inf),
        "least": torch.where(some, 0.0, torch.finfo(torch.bfloat16).min).bfloat16(),
        "short": some[..., : tokens - 9], "long": torch.ones(batch, 1, length, tokens + 40, dtype=torch.bool),
    }  # fmt: skip


@pytest.mark.parametrize("keys,values", PAIRS)
@pytest.mark.parametrize("length", [1, 3, 17, 70])
def test_attend(keys: str, values: str, length: int) -> None:
    torch.manual_seed(length)
    batch, heads, tokens = 2, 2, 83
    start = torch.tensor([tokens - length, max(0, 60 - length)])
    for dim, value_dim, group in ((64, 64, 1), (128, 96, 4), (72, 40, 3), (256, 256, 2)):
        k, v = torch.randn(batch, heads, tokens, dim), torch.randn(batch, heads, tokens, value_dim)
        planes = filled(keys, values, k, v, 112)
        wide = decoded(keys, planes[0], dim)[:, :, :tokens], decoded(values, planes[1], value_dim)[:, :, :tokens]
        kernels = cpu_attention(scheme(keys), scheme(values))
        for dtype, allowed in ROUNDING.items():
            q = torch.randn(batch, length, heads * group, dim).to(dtype).transpose(1, 2)
            for settings in ({}, {"causal": False}, {"window": 9}, {"scale": 0.3, "softcap": 2.0}):
                out = kernels.attend(q, *planes, start, tokens, value_dim, **settings)  # type: ignore[arg-type]
                assert out.dtype == dtype and out.shape == (batch, heads * group, length, value_dim)
                assert relative(out, reference(q, *wide, start, **settings)) <= allowed, (dim, dtype, settings)  # type: ignore[arg-type]
            center = torch.randn(batch, heads, 1, dim)
            out = kernels.attend(q, *planes, start, tokens, value_dim, softcap=2.0, center=center)
            assert relative(out, reference(q, wide[0] + center.double(), wide[1], start, softcap=2.0)) <= allowed, (dim, dtype)


@pytest.mark.parametrize("length", [1, 19])
def test_masks(length: int) -> None:
    torch.manual_seed(0)
    k, v = torch.randn(2, 2, 83, 64), torch.randn(2, 2, 83, 64)
    planes = filled("int8", "int8", k, v, 96)
    wide = [decoded("int8", p, 64)[:, :, :83] for p in planes]
    start = torch.full((2,), 83 - length)
    for name, mask in masks(2, 4, length, 83).items():
        q = torch.randn(2, 4, length, 64)
        out = cpu_attention(scheme("int8"), scheme("int8")).attend(q, *planes, start, 83, 64, mask)
        assert relative(out, reference(q, *wide, start, mask)) <= ROUNDING[torch.float32], name


def test_a_query_that_sees_nothing_gives_zeros() -> None:
    k = torch.randn(1, 1, 32, 64)
    planes = filled("int8", "int8", k, k, 32)
    mask = torch.ones(1, 1, 2, 32, dtype=torch.bool)
    mask[:, :, 1] = False
    q = torch.randn(1, 1, 2, 64)
    out = cpu_attention(scheme("int8"), scheme("int8")).attend(q, *planes, torch.tensor([30]), 32, 64, mask)
    assert out[0, 0, 0].abs().sum() > 0 and (out[0, 0, 1] == 0).all()


def test_the_number_of_threads_changes_nothing() -> None:
    torch.manual_seed(0)
    k, v, q = torch.randn(1, 2, 5000, 64), torch.randn(1, 2, 5000, 64), torch.randn(1, 4, 1, 64)
    planes = filled("fp8_e4m3", "fp8_e4m3", k, v, 5008)
    kernels, before = cpu_attention(scheme("fp8_e4m3"), scheme("fp8_e4m3")), torch.get_num_threads()
    outs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(kernels.attend(q, *planes, torch.tensor([4999]), 5000, 64))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("isa", ["avx2", "generic"])
@pytest.mark.parametrize("dim", [72, 128])
def test_other_instruction_sets(isa: str, dim: int) -> None:
    torch.manual_seed(0)
    k, v, q = torch.randn(1, 2, 50, dim), torch.randn(1, 2, 50, dim), torch.randn(1, 6, 3, dim)
    kernels = CpuAttention(scheme("int4_g32"), scheme("fp8_e4m3"), isa)
    planes = [pages(get(f), 1, 2, 64, dim, torch.device("cpu")) for f in ("int4_g32", "fp8_e4m3")]
    kernels.write(*planes, k, v, torch.tensor([0]))
    wide = decoded("int4_g32", planes[0], dim)[:, :, :50], decoded("fp8_e4m3", planes[1], dim)[:, :, :50]
    out = kernels.attend(q, *planes, torch.tensor([47]), 50, dim)
    assert relative(out, reference(q, *wide, torch.tensor([47]))) <= ROUNDING[torch.float32]


# Writing -----------------------------------------------------------------------------------------------------------------

STEPS = {"fp8_e3m4": 2.0**-5, "fp8_e4m3": 2.0**-4, "fp8_e5m2": 2.0**-3, "int8": 1 / 254, "int8_g32": 1 / 254, "nf4_g32": 0.16,
         "int4_g32": 1 / 30, "int4_zp_g32": 1 / 30, "int8_g64": 1 / 254}  # fmt: skip
"""Largest error of an element: of itself for floats, of its group's range (absolute maximum for symmetric ones) for others."""


@pytest.mark.parametrize("name", STEPS)
def test_write_rounds_to_nearest(name: str) -> None:
    torch.manual_seed(0)
    spec, k = get(name), torch.randn(1, 2, 40, 128)
    k[0, 0, 3] = 0.0
    k[0, 1, 5, 7] = 300.0
    found = stored(name, filled(name, name, k, k, 48)[0], 128)[:, :, :40].double()
    group = next(p.per for p in spec.scales if p.name == "scale" or p.name == "absmax") or 128
    wide = turned(spec, k).unflatten(-1, (-1, group))
    error = (found.unflatten(-1, (-1, group)) - wide).abs()
    most = wide.abs().amax(-1, keepdim=True)
    if name.startswith("fp8"):
        least = 2.0**-7 / 30 if name == "fp8_e3m4" else 2.0**-9 / 448
        assert (error <= STEPS[name] * wide.abs() + most * least * 1.01 + 2e-7 * most).all()
    else:
        span = wide.amax(-1, keepdim=True).clamp_min(0) - wide.amin(-1, keepdim=True).clamp_max(0)
        whole = span if "_g32" in name and name.startswith("int4") else most
        coarse = 2 if name == "int4_zp_g32" else 1  # zero points are rounded too
        assert (error <= STEPS[name] * coarse * (2 if name == "int8" else 1) * whole * 1.02 + most * 0.006).all()
    assert (found[0, 0, 3] == 0).all()


@pytest.mark.parametrize("name", ["fp8_e4m3", "int8", "int4_g32", "int4_zp_g32"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_visible(name: str, bad: float) -> None:
    k = torch.randn(1, 1, 16, 64)
    k[0, 0, 3, 5] = bad
    found = decoded(name, filled(name, name, k, k, 16)[0], 64)[0, 0]
    assert found[3, 5].isnan() and found[[0, 1, 2, *range(4, 16)]].isfinite().all()


@pytest.mark.parametrize("first", [1, 20])
def test_tokens_arrive_in_any_portions(first: int) -> None:
    """The first, whose mean keys are stored without, being the same."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 2, 60, 64), torch.randn(2, 2, 60, 64)
    whole, parts = KVCache("int4"), KVCache("int4")
    whole.append(k[:, :, :first], v[:, :, :first])
    whole.append(k[:, :, first:], v[:, :, first:])
    for a, b in ((0, first), (first, first + 17), (first + 17, 58), (58, 60)):
        parts.append(k[:, :, a:b].to(torch.float32), v[:, :, a:b])
    for one, other in zip(whole.keys + whole.values, parts.keys + parts.values, strict=True):
        assert torch.equal(one, other)


# Caches ------------------------------------------------------------------------------------------------------------------


def test_caches_that_grow_and_caches_with_a_capacity_agree() -> None:
    torch.manual_seed(0)
    growing, fixed = KVCache(("fp8", "int8")), KVCache({"keys": "fp8", "values": "int8"}, capacity=700)
    for length in (300, 1, 1, 340):
        k, v, q = torch.randn(2, 2, length, 64), torch.randn(2, 2, length, 64), torch.randn(2, 4, length, 64)
        growing.append(k, v)
        fixed.append(k, v)
        assert torch.equal(growing.attend(q), fixed.attend(q))
    assert growing.length == int(fixed.length) == 642
    growing.crop(2)
    fixed.crop(2)
    growing.select(torch.tensor([1, 1, 0]))
    fixed.select(torch.tensor([1, 1, 0]))
    q = torch.randn(3, 4, 1, 64)
    assert torch.equal(growing.attend(q), fixed.attend(q)) and growing.length == 640
    growing.clear()
    fixed.clear()
    assert growing.length == int(fixed.length) == 0 and growing.nbytes == 0


def test_a_window_is_all_that_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Portions of any length: bit for bit as if all tokens were kept."""
    monkeypatch.setattr(kv_cache, "GROWTH", 16)
    whole, part = KVCache("fp8"), KVCache("fp8", window=40)
    for length in (130, 1, 1, 17, *[1] * 90, 64, 3, *[7] * 20):
        q, k, v = (torch.randn(2, heads, length, 32) for heads in (4, 2, 2))
        whole.append(k, v), part.append(k, v)
        assert torch.equal(whole.attend(q, window=40), out := part.attend(q)) and torch.equal(part.attend(q, window=40), out)
        assert torch.equal(whole.attend(q, window=9), part.attend(q, window=9))
        assert part.dropped + part.length == whole.length and part.length >= min(whole.length, 40)
        assert length > 100 or part.room <= 40 + 15 + length + 40 + 20 + 15
    assert part.dropped > 300 and part.nbytes < whole.nbytes / 4


def test_what_left_the_window_cannot_be_had_again() -> None:
    """Unless what may be forgotten is said to be revocable."""
    x = torch.randn(1, 1, 200, 32)
    cache = KVCache("fp8", window=20)
    cache.append(x, x)
    cache.append(x[:, :, :60], x[:, :, :60])
    with pytest.raises(LayoutError, match="of the 19 before them, in the window of the next, 11 are held; set revocable"):
        cache.crop(int(cache.length) - 11)
    cache.revocable = True
    for _ in range(5):
        cache.append(x, x)
        cache.crop(199)
    cache.append(x, x)
    cache.crop(200)
    assert cache.dropped + cache.length == 265


@pytest.mark.parametrize("capacity", [None, 64])
def test_the_window_of_a_cache_is_that_of_its_attention(capacity: int | None) -> None:
    cache, whole = KVCache("fp8", capacity, window=20), KVCache("fp8")
    q, k, v = (torch.randn(1, 2, 50, 32) for _ in range(3))
    cache.append(k, v), whole.append(k, v)
    assert torch.equal(cache.attend(q), whole.attend(q, window=20)) and not torch.equal(cache.attend(q), whole.attend(q))
    for window, text in ((0, "all"), (21, "21")):
        with pytest.raises(OptionError, match=f"its window is 20 tokens, and attention is to see {text}; make it"):
            cache.attend(q, window=window)


def test_half_the_bytes() -> None:
    cache = KVCache("fp8")
    k = torch.randn(1, 8, 8192, 128, dtype=torch.bfloat16)
    cache.append(k, k)
    assert cache.nbytes <= 0.52 * 2 * k.nbytes
    small = KVCache("int4")
    small.append(k, k)
    assert small.nbytes <= 0.32 * 2 * k.nbytes


def test_pages_are_as_good_as_one_piece() -> None:
    torch.manual_seed(0)
    cache, lengths = PagedKVCache(40, 2, 64, page=32), (100, 7, 33)
    whole = {}
    names = [cache.add() for _ in lengths]
    for _ in range(3):  # in turns, so that pages of sequences interleave
        for name, length in zip(names, lengths, strict=True):
            k, v = torch.randn(1, 2, length, 64), torch.randn(1, 2, length, 64)
            cache.append([name], k, v)
            whole.setdefault(name, KVCache("fp8")).append(k, v)
    q = torch.randn(3, 4, 5, 64)
    out = cache.attend(names, q)
    for i, name in enumerate(names):
        assert torch.equal(out[i : i + 1], whole[name].attend(q[i : i + 1]))
    free = len(cache.free)
    cache.remove(names[0])
    assert len(cache.free) == free + 10
    with pytest.raises(LayoutError, match=r"pages of 32 tokens are needed, .* are free"):
        cache.append([names[1]], torch.randn(1, 2, 4000, 64), torch.randn(1, 2, 4000, 64))
    with pytest.raises(LayoutError, match="comes twice"):
        cache.append([names[1]] * 2, torch.randn(2, 2, 1, 64), torch.randn(2, 2, 1, 64))
    assert cache.lengths[names[1]] == 21 and torch.equal(cache.attend(names[1:2], q[1:2]), out[1:2])


def test_what_does_not_fit_is_refused() -> None:
    cache = KVCache("fp8", capacity=20)
    k = torch.randn(1, 2, 20, 64)
    cache.append(k, k)
    with pytest.raises(LayoutError, match="larger capacity"):
        cache.append(torch.randn(1, 2, 13, 64), torch.randn(1, 2, 13, 64))
    with pytest.raises(LayoutError, match="one cache for each batch"):
        KVCache("fp8", capacity=40).append(torch.randn(1, 2, 3, 64), torch.randn(1, 2, 4, 64))
    with pytest.raises(FormatError, match="cannot hold keys and values"):
        KVCache("Q4_K")
    with pytest.raises(LayoutError, match="larger capacity"):
        bad = torch.tensor([[7]], dtype=torch.int32)
        ops.kv_write(cache.keys, cache.values, k, k, torch.tensor([0]), bad, cache.schemes[0].key, cache.schemes[1].key)


def test_e5m2_is_warned_of_with_what_it_costs() -> None:
    kv_cache._warn_of_short_mantissa.cache_clear()
    with pytest.warns(UserWarning, match=r"fp8_e5m2 keeps normal values to 2\d\.\d dB; fp8_e3m4 keeps them to 3\d\.\d dB"):
        KVCache("fp8_e5m2")


# Accuracy ----------------------------------------------------------------------------------------------------------------


def outliers(*shape: int) -> torch.Tensor:
    """Normal, with three channels of twenty times the size, as real keys have, and rare single values."""
    x = torch.randn(*shape)
    x[..., [3, 17, 40]] *= 20
    return torch.where(torch.rand(shape) < 1e-3, 30 * x, x)


def heavy(*shape: int) -> torch.Tensor:
    """Normal, and one number of a thousand by ten more (FlashAttention-3, arXiv:2407.08608)."""
    return torch.randn(*shape) + torch.where(torch.rand(shape) < 1e-3, 10 * torch.randn(*shape), 0.0)


@pytest.mark.parametrize("kind,made,bound", [
    ("fp8", torch.randn, 2.2e-2), ("int8", torch.randn, 1e-2), ("fp8", outliers, 3e-2),
    ("fp8_e4m3", torch.randn, 4e-2), ("fp8_e4m3", outliers, 5e-2),
])  # fmt: skip
def test_error_does_not_grow_with_length(kind: str, made: Callable[..., torch.Tensor], bound: float) -> None:
    """Against float64 attention over the keys and values themselves."""
    torch.manual_seed(0)
    worst = {}
    for length in (1, 40, 1000, 32768):
        k, v, q = made(1, 2, length, 64), made(1, 2, length, 64), torch.randn(1, 64, 1, 64)
        cache = KVCache(kind)
        cache.append(k, v)
        worst[length] = relative(cache.attend(q), reference(q, k.double(), v.double(), torch.tensor([length - 1])))
    assert max(worst.values()) <= bound, worst
    assert worst[32768] <= 1.3 * max(worst[40], worst[1000]), worst


@pytest.mark.parametrize("kind,bound", [("fp8", 3e-2), ("int8", 1e-2), ("int4", 0.15)])
@pytest.mark.parametrize("length", [1, 40, 1000, 32768])
def test_numbers_far_out_set_no_others_step(kind: str, bound: float, length: int) -> None:
    """Over three draws of queries, keys and values."""
    torch.manual_seed(0)
    outs, exact = [], []
    for _ in range(3):
        k, v, q = heavy(1, 4, length, 64), heavy(1, 4, length, 64), heavy(1, 32, 1, 64)
        cache = KVCache(kind)
        cache.append(k, v)
        outs.append(cache.attend(q))
        exact.append(reference(q, k.double(), v.double(), torch.tensor([length - 1])))
    assert relative(torch.cat(outs), torch.cat(exact)) <= bound


def far_from_zero(*shape: int) -> torch.Tensor:
    """Normal around a vector of hundreds in some channels, as keys are that a projection with a bias makes."""
    away = torch.zeros(shape[1], 1, shape[3])
    away[0, :, [3, 17]] = torch.tensor([200.0, -90.0])
    away[1, :, 40] = 150.0
    return torch.randn(*shape) + away


def caches(kind: str, batch: int) -> dict[str, Callable[..., torch.Tensor]]:
    """A function of k, v, q, and attention's settings for every kind of cache: tokens 0 … 99 and then one by one."""

    def ask(cache: KVCache) -> Callable[..., torch.Tensor]:
        def called(k: torch.Tensor, v: torch.Tensor, q: torch.Tensor, **settings: Any) -> torch.Tensor:
            for a, b in ((0, 100), *((t, t + 1) for t in range(100, k.shape[2]))):
                cache.append(k[:, :, a:b], v[:, :, a:b])
            return cache.attend(q, **settings)

        return called

    def pages(k: torch.Tensor, v: torch.Tensor, q: torch.Tensor, **settings: Any) -> torch.Tensor:
        cache = PagedKVCache(40, 2, 64, formats=kind)
        names = [cache.add() for _ in range(batch)]
        for a, b in ((0, 100), *((t, t + 1) for t in range(100, k.shape[2]))):
            cache.append(names, k[:, :, a:b], v[:, :, a:b])
        return cache.attend(names, q, **settings)

    return {"growing": ask(KVCache(kind)), "fixed": ask(KVCache(kind, capacity=200)), "paged": pages}


@pytest.mark.parametrize("settings", [{}, {"softcap": 5.0}, {"softcap": 2.0, "window": 60}])
@pytest.mark.parametrize("kind,bound", [("fp8", 2.2e-2), ("int8", 1.2e-2), ("int4", 0.14)])
def test_what_all_keys_have_in_common_costs_nothing(kind: str, bound: float, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    k, v, q = far_from_zero(2, 2, 120, 64), torch.randn(2, 2, 120, 64), torch.randn(2, 4, 1, 64)
    if settings:
        q[..., [3, 17, 40]] *= 0.02  # so that caps still tell scores apart
    exact = reference(q, k.double(), v.double(), torch.tensor([119, 119]), **settings)
    outs = {name: ask(k, v, q, **settings) for name, ask in caches(kind, 2).items()}
    assert all(relative(out, exact) <= bound for out in outs.values()), {n: relative(o, exact) for n, o in outs.items()}
    assert torch.equal(outs["growing"], outs["fixed"]) and torch.equal(outs["growing"], outs["paged"])
    if "window" not in settings:
        key = scheme(kv_cache.ALIASES.get(kind, kind)).key
        out = ops.sdpa(q, k, v, None, False, 64**-0.5, settings.get("softcap", 0.0), key, key)
        assert relative(out, exact) <= bound


def test_who_is_selected_takes_the_center_along() -> None:
    torch.manual_seed(0)
    k, v, q = far_from_zero(2, 2, 50, 64), torch.randn(2, 2, 50, 64), torch.randn(2, 4, 1, 64)
    k[1] += 20
    for cache in (KVCache("int8"), KVCache("int8", capacity=64)):
        cache.select(torch.tensor([1, 0, 1]))  # nothing yet
        cache.append(k, v)
        before = cache.attend(q, softcap=3.0)
        cache.select(torch.tensor([1, 0, 1]))
        assert torch.equal(cache.attend(q[[1, 0, 1]], softcap=3.0), before[[1, 0, 1]])
        cache.clear()
        cache.append(k[[0, 1, 0], :, :3], v[[0, 1, 0], :, :3])
        assert not cache.center.any()


def test_one_key_that_is_not_finite_spoils_no_other() -> None:
    k, v = torch.randn(1, 2, 40, 64), torch.randn(1, 2, 40, 64)
    k[0, 0, 3, 5] = math.inf
    cache = KVCache("fp8")
    cache.append(k, v)
    held = decoded("fp8_e3m4", cache.keys, 64)[:, :, :40]
    assert held[0, 0, 3, 5].isnan() and held.isnan().any(-1).sum() == 1 and cache.center.isfinite().all()


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("length", [32768, 131072])
def test_a_needle_is_found(kind: str, length: int) -> None:
    """A key that its query points at among ``length`` others: bf16 attention gives its value, and so does the cache."""
    torch.manual_seed(1)
    k, v = torch.randn(1, 1, length, 64), torch.randn(1, 1, length, 64)
    needles = torch.randint(0, length - 1, (8,))
    q = k[0, 0, needles] * 4
    cache = KVCache(kind)
    cache.append(k.bfloat16(), v.bfloat16())
    for i, needle in enumerate(needles):
        found = cache.attend(q[i].view(1, 1, 1, 64).bfloat16())[0, 0, 0].float()
        exact = (q[i].bfloat16().float() @ k[0, 0].bfloat16().float().T / 8).softmax(0) @ v[0, 0].bfloat16().float()
        assert torch.cosine_similarity(exact, v[0, 0, needle], dim=0) > 0.99
        assert torch.cosine_similarity(found, v[0, 0, needle], dim=0) > 0.98
        assert (found @ v[0, 0].T).argmax() == needle
