"""The oracle: quantize, pack and decode in plain PyTorch, from the declaration alone."""

from __future__ import annotations

import torch

from ..errors import FormatError, WeightError
from .algebra import affine, gen_table, torch_function
from .layout import check_planes, pack_plane, unpack_plane
from .spec import ROW, Codebook, FormatSpec, Plane

CHUNK_ELEMENTS = 1 << 22
"""Weights quantized at a time, so that the float32 working memory is a few dozen megabytes."""


def quantize(spec: FormatSpec, weight: torch.Tensor, layer: str = "weight") -> list[torch.Tensor]:
    """Quantizes a float ``[N, K]`` weight; returns the stored planes in spec order.

    Rows are worked on in chunks, so peak memory is the planes plus one chunk. Raises :class:`WeightError` for a
    weight that is not a 2-D float tensor or has NaN or infinite values.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise WeightError(f"{layer}: expected a 2-D float weight [N, K], found {weight.dtype} {list(weight.shape)}")
    n, k = weight.shape
    shapes = {p.name: spec.plane_shape(p, n, k) for p in spec.planes}
    stored = {p.name: torch.empty(shapes[p.name], dtype=p.storage_dtype, device=weight.device) for p in spec.planes}
    step = max(16, CHUNK_ELEMENTS // max(k, 1) // 16 * 16)
    for start in range(0, n, step):
        chunk = weight[start : start + step].to(torch.float32)
        if not torch.isfinite(chunk).all():
            raise WeightError(f"{layer}: the weight has NaN or infinite values (rows {start} to {start + len(chunk) - 1}); "
                              "repair the checkpoint, or leave this layer in float by a policy rule")  # fmt: skip
        entries = entries_of(spec, chunk)
        tiles = slice(start // 16, -(-(start + len(chunk)) // 16))
        for p in spec.planes:
            part = stored[p.name][tiles]
            part.copy_(pack_plane(p, entries[p.name], (part.shape[0], *shapes[p.name][1:])))
    return [stored[p.name] for p in spec.planes]


def entries_of(spec: FormatSpec, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Plane entries (codes uint8/int8 ``[N, K']``, scales ``[N, K'/per]``) of a float32 ``[N, K]`` weight, K padded to K'."""
    n, k = weight.shape
    cols = spec.padded(n, k)[1]
    group = spec.period or k
    if cols != k and spec.period != ROW:
        # A padded tail repeats the group's last weight, so that it changes neither its minimum nor its maximum.
        weight = torch.cat([weight, weight[:, -1:].expand(n, cols - k)], dim=1)
    entries = (spec.quantizer or nearest)(spec, weight.reshape(n, -1, group))
    return {p.name: entries[p.name].reshape(n, -1).to(_entry_dtype(p)) for p in spec.planes}


def _entry_dtype(plane: Plane) -> torch.dtype:
    if plane.is_code:
        return torch.int8 if plane.dtype == "i8" else torch.uint8
    return plane.storage_dtype


def nearest(spec: FormatSpec, groups: torch.Tensor) -> dict[str, torch.Tensor]:
    """Round-to-nearest for formats of one code plane, one scale and at most one offset plane.

    ``groups`` is float32 ``[N, G, period]``. Without an offset the scale is the smallest that reaches both ends of the
    group; with one, scale and offset map the group's minimum and maximum onto the codes' range. Scales are rounded to
    their stored dtype before the codes are chosen. Raises :class:`FormatError` for other formats.
    """
    form = affine(spec)
    scales, offsets = form.coeff.free_symbols, form.offset.free_symbols
    if len(spec.codes) != 1 or len(scales) != 1 or len(offsets) > 1 or (offsets and form.offset not in offsets):
        raise FormatError(f"format {spec.name!r}: round-to-nearest needs one code plane, one scale and at most one offset "
                          f"plane, found value = ({form.coeff})*({form.gen}) + {form.offset}; give quantizer=")  # fmt: skip
    table = gen_table(spec)
    finite = table[torch.isfinite(table)]
    low, high = float(finite.min()), float(finite.max())
    wmin, wmax = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    planes = {p.name: p for p in spec.planes}
    scale_plane = planes[next(iter(scales)).name]
    entries: dict[str, torch.Tensor] = {}
    if offsets:
        scale = _stored(scale_plane, (wmax - wmin) / (high - low))
        offset_plane = planes[next(iter(offsets)).name]
        offset = _stored(offset_plane, (wmax + wmin) / 2 - scale * (low + high) / 2)
        entries[offset_plane.name] = offset
    else:
        reach = torch.maximum(wmax / high, wmin / low) if low < 0 else wmax / high
        scale, offset = _stored(scale_plane, reach.clamp_min(0)), torch.zeros(())
    # A group of equal values needs no scale: any positive one decodes it exactly through code 0 or the offset.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    entries[scale_plane.name] = scale
    wanted = groups.sub(offset).div_(scale)
    entries[spec.codes[0].name] = nearest_code(spec, wanted)
    return entries


def _stored(plane: Plane, values: torch.Tensor) -> torch.Tensor:
    """``values`` as they will be read back from ``plane``: rounded to its dtype, in float32."""
    return values.to(plane.storage_dtype).to(torch.float32)


def nearest_code(spec: FormatSpec, wanted: torch.Tensor) -> torch.Tensor:
    """Codes whose ``gen`` is nearest to ``wanted`` (float32, any shape, overwritten), saturating at both ends."""
    table, plane = gen_table(spec), spec.codes[0]
    book = _whole_codebook(spec)
    if affine(spec).integer and torch.equal(
        table.sort().values.diff(), torch.ones(len(table) - 1, dtype=torch.float64)
    ):
        shift = table[0] if plane.dtype != "i8" else 0.0
        wanted.sub_(float(shift)).round_()
        wanted.clamp_(*((-128, 127) if plane.dtype == "i8" else (0, len(table) - 1)))
        return wanted.to(torch.int8 if plane.dtype == "i8" else torch.uint8)
    finite = torch.isfinite(table)
    if book is not None and book.cast is not None:
        wanted.clamp_(float(table[finite].min()), float(table[finite].max()))
        return wanted.to(book.cast).view(torch.uint8)
    values, patterns = table[finite].sort()
    patterns = torch.arange(len(table), dtype=torch.uint8)[finite][patterns].to(wanted.device)
    middle = ((values[1:] + values[:-1]) / 2).to(torch.float32).to(wanted.device)
    return patterns[torch.bucketize(wanted, middle)]


def _whole_codebook(spec: FormatSpec) -> Codebook | None:
    """The codebook, when ``gen`` is exactly one lookup in it."""
    gen, code = affine(spec).gen, spec.codes[0].name
    return next((b for b in spec.codebooks if str(gen) == f"{b.name}({code})"), None)


def decode(
    spec: FormatSpec, planes: list[torch.Tensor], n: int, k: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The ``[N, K]`` weight that stored ``planes`` stand for, evaluated in float32 and rounded once to ``dtype``.

    Raises :class:`~qcompile.errors.LayoutError` when the planes do not belong to an N×K weight of this format.
    """
    check_planes(spec, planes, n, k)
    cols = spec.padded(n, k)[1]
    wide = []
    for plane, tensor in zip(spec.planes, planes, strict=True):
        entries = unpack_plane(plane, tensor, n)
        wide.append(entries if plane.is_code else entries.repeat_interleave(cols if plane.per == ROW else plane.per, 1))
    value = torch_function(spec, spec.value, tuple(p.name for p in spec.planes))(*wide)
    return value[:, :k].to(dtype).contiguous()


def sqnr(spec: FormatSpec, planes: list[torch.Tensor], weight: torch.Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB, 10·log10(Σ w² / Σ (w − ŵ)²), of stored ``planes`` against ``weight`` [N, K].

    Worked in row chunks, sums in float64. Infinite when the format holds the weight exactly.
    """
    n, k = weight.shape
    signal = noise = 0.0
    step = max(16, CHUNK_ELEMENTS // max(k, 1) // 16 * 16)
    for start in range(0, n, step):
        chunk = weight[start : start + step].to(torch.float32)
        tiles = slice(start // 16, -(-(start + len(chunk)) // 16))
        decoded = decode(spec, [p[tiles] for p in planes], len(chunk), k)
        signal += float(chunk.square().sum(dtype=torch.float64))
        noise += float(chunk.sub(decoded).square_().sum(dtype=torch.float64))
    if noise == 0.0:
        return float("inf")
    return float(10 * torch.log10(torch.tensor(max(signal, 1e-300) / noise, dtype=torch.float64)))
