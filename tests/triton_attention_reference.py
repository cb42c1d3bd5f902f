"""What the attention programs compare with: private formats, caches packed by the reference, the rule that tokens are written
by, and attention in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton_cases as cases

from qcompile.formats import ROW, FormatSpec, Plane, get, reference, symbols
from qcompile.formats.algebra import codebook_of_gen, finite_range, gen_table, linear_gen
from qcompile.formats.codes import nearest_entry
from qcompile.formats.float import E8M0
from qcompile.formats.layout import pack_plane
from qcompile.formats.ranges import range_planes
from qcompile.formats.turning import turned, turned_together

Case = tuple[str, float, float]
Planes = list[torch.Tensor]

q, s, scale, zero = symbols("q s scale zero")
PRIVATE = {spec.name: spec for spec in (
    FormatSpec("byte_zero", (Plane("scale", "f16", 32), Plane("zero", "u8", 32), Plane("q", "u8")), value=scale * (q - zero)),
    FormatSpec("row_zero", (Plane("scale", "f32", ROW), Plane("zero", "f32", ROW), Plane("q", "u8")),
               value=scale * (q - 128) + zero),
    FormatSpec("six_sym", (Plane("scale", "f32", ROW), Plane("q", "u6")), value=scale * (q - 32)),
    FormatSpec("fp6", (Plane("scale", "f16", 32), Plane("q", "u6")), value=scale * cases.E2M3(q), codebooks=(cases.E2M3,)),
    FormatSpec("fp6_blocks", (Plane("s", "u8", 32), Plane("q", "u6")), value=E8M0(s) * cases.E2M3(q),
               codebooks=(E8M0, cases.E2M3)),
    FormatSpec("two_scales", (Plane("scale", "f32", ROW), Plane("s", "u3", 16), Plane("q", "u4")),
               value=scale * (s + 1) * (q - 8)),
    FormatSpec("odd_zero", (Plane("scale", "bf16", 32), Plane("zero", "u3", 32), Plane("q", "u3")), value=scale * (q - zero)),
)}  # fmt: skip

def spec_of(name: str) -> FormatSpec:
    return PRIVATE[name] if name in PRIVATE else get(name)


# Caches ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cache:
    """Packed tokens of one side: ``planes``, and the float64 tokens ``[B, H, T, D]`` that they stand for."""

    planes: Planes
    decoded: torch.Tensor


def garbage(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What a page may hold that nothing was written to: NaN for scales, and codes that are NaN in fp8."""
    if dtype.is_floating_point:
        return torch.full(shape, torch.nan).to(dtype)
    return torch.full(shape, 0x7F if dtype == torch.uint8 else 0x7F7F7F7F, dtype=dtype)


def empty_planes(spec: FormatSpec, pages: int, heads: int, page: int, dim: int) -> Planes:
    return [garbage((pages, heads, *spec.part_shape(p, page, dim)), p.dtype) for p in spec.parts]


def rows_of(plane: torch.Tensor) -> torch.Tensor:
    """``[pages, heads, tiles, along, 16]`` → ``[pages, heads, tokens, along]``."""
    return plane.transpose(3, 4).flatten(2, 3)


def cache_of(spec: FormatSpec, x: torch.Tensor, page: int, table: torch.Tensor | None, spare: int, kept: list[int]) -> Cache:
    """The reference's planes of tokens ``x`` [B, H, T, D]; what lies behind ``kept`` tokens of a sequence is garbage."""
    batch, heads, tokens, dim = x.shape
    pages = batch if table is None else spare + table.numel()
    planes = empty_planes(spec, pages, heads, page, dim)
    decoded = torch.zeros(batch, heads, tokens, dim, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            whole = reference.quantize(spec, x[b, h])
            decoded[b, h] = turned(spec, reference.decode(spec, whole, tokens, dim))
            for plane, part in zip(planes, whole, strict=True):
                for t in range(0, kept[b], page):
                    at = b if table is None else int(table[b, t // page])
                    count = min(page, kept[b] - t)
                    source = part.transpose(1, 2).flatten(0, 1)[t : t + count]
                    target = plane[at, h].transpose(1, 2)
                    for i in range(count):
                        target[i // 16, i % 16] = source[i]
    return Cache(planes, decoded)


# Writing and attending -----------------------------------------------------------------------------------------------


def stored_as(plane: Plane, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries of a float plane, and what is read back."""
    entries = value.to(plane.entry_dtype)
    return entries, entries.float()


def in_eighths(x: torch.Tensor) -> torch.Tensor:
    """``x`` rounded so that sums of 256 of them are exact in float32, in any order."""
    return torch.round(x * 8) / 8 + 0.0  # no negative zeros


def turned_in_eighths(spec: FormatSpec, x: torch.Tensor) -> torch.Tensor:
    """:func:`turned` as the kernels round it: exact sums, times the float32 nearest to what makes the matrix orthogonal."""
    each = turned_together(spec, x.shape[-1])
    return in_eighths(turned(spec, x) * each**0.5).float() * each**-0.5


def ranged(spec: FormatSpec, x: torch.Tensor) -> Planes:
    """The planes of rows ``x`` [n, D] by the rule that caches are written with: scales from the range of a group."""
    n, dim = x.shape
    width = spec.padded(n, dim)[1]
    groups = torch.zeros(n, width)
    groups[:, :dim] = x
    groups = groups.view(n, -1, spec.period or width)
    plane, offset = range_planes(spec)
    table = gen_table(spec)
    low, high = finite_range(table)
    least, greatest = groups.amin(2), groups.amax(2)
    if offset is None or offset.is_integer:
        least, greatest = least.clamp_max(0), greatest.clamp_min(0)
    ideal = torch.maximum(greatest / high, least / low) if offset is None else (greatest - least) / (high - low)
    ideal = torch.where(ideal > 0, ideal, 1.0)
    entries = {}
    entries[plane.name], factor = stored_as(plane, ideal)
    v = groups / factor[..., None]
    if offset is not None and offset.is_integer:
        point = (low - least / factor).clamp(0, 2**offset.bits - 1).round()
        entries[offset.name] = point.to(torch.uint8)
        v = v + point[..., None]
    elif offset is not None:
        entries[offset.name], added = stored_as(offset, least - low * factor)
        v = v + (-added / factor)[..., None]
    linear, book = linear_gen(spec), codebook_of_gen(spec)
    if linear is not None:
        codes = ((v - low) * (1 / linear[0])).clamp(0, 2**spec.code.bits - 1).round().int()
        codes = (codes ^ (128 if spec.code.dtype == "i8" else 0)).to(torch.uint8)
    elif book is not None and book.cast is not None:
        codes = v.clamp(low, high).to(book.cast).view(torch.uint8)
    else:
        codes = nearest_entry(table, v.contiguous(), book)
    entries[spec.code.name] = codes.view(n, width)
    return [part for p in spec.planes for part in pack_plane(spec, p, entries[p.name].view(n, -1), n, dim)]


def repacked(rows: torch.Tensor) -> torch.Tensor:
    """``[rows, along]`` → ``[tiles, along, 16]``, rows padded with zeros."""
    count = -(-len(rows) // 16) * 16
    full = rows.new_zeros(count, rows.shape[1])
    full[: len(rows)] = rows
    return full.view(-1, 16, rows.shape[1]).transpose(1, 2).contiguous()


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, total: list[int], position: torch.Tensor, mask: torch.Tensor | None,
    causal: bool, scale: float | None, softcap: float, window: int,
) -> torch.Tensor:  # fmt: skip
    """Softmax attention in float64; queries ``position`` [B, L], tokens below ``total[b]``; zeros where nothing is seen."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    token = torch.arange(k.shape[2])
    seen = (token < torch.tensor(total)[:, None])[:, None, None, :].expand(-1, 1, q.shape[2], -1).clone()
    if causal:
        seen &= (token[None, None] <= position[:, :, None])[:, None]
    if window:
        seen &= (token[None, None] > position[:, :, None] - window)[:, None]
    if mask is not None:
        short = k.shape[2] - mask.shape[-1]
        if mask.dtype == torch.bool:
            seen = seen & torch.nn.functional.pad(mask, (0, short))
        else:
            scores = scores + torch.nn.functional.pad(mask.double(), (0, short), value=-torch.inf)
    scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v
