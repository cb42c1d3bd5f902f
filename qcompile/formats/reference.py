"""The oracle: quantize, pack and decode in plain PyTorch, from the declaration alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import FormatError, WeightError
from .algebra import affine, gen_table, torch_function
from .layout import check_planes, pack_plane, unpack_plane
from .spec import ROW, Codebook, FormatSpec, Plane

CHUNK_ELEMENTS = 1 << 20
"""Weights quantized at a time, so that float32 working memory is a few megabytes and stays in the processor's caches."""

FITTED_BITS = 4
"""Codes of at most this many bits get scales by least squares; with 8 bits, min–max loses nothing worth the time."""

SHRINKS = (1.0, 0.85)
"""Shares of a group's range that are tried: clipping a few outliers narrows the steps of all other weights."""


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
    importance = None
    if cols != k and spec.period != ROW:
        # A padded tail repeats the group's last weight, so that it changes neither its minimum nor its maximum, and has no
        # importance, so that it does not change the least squares either.
        weight = torch.cat([weight, weight[:, -1:].expand(n, cols - k)], dim=1)
        importance = (torch.arange(cols, device=weight.device) < k).to(torch.float32).view(-1, group)
    groups = weight.reshape(n, -1, group)
    entries = spec.quantizer(spec, groups) if spec.quantizer else nearest(spec, groups, importance)
    return {p.name: entries[p.name].reshape(n, -1).to(_entry_dtype(p)) for p in spec.planes}


def _entry_dtype(plane: Plane) -> torch.dtype:
    if plane.is_code:
        return torch.int8 if plane.dtype == "i8" else torch.uint8
    return plane.storage_dtype


def nearest(spec: FormatSpec, groups: torch.Tensor, importance: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Round-to-nearest for formats of one code plane, one scale and at most one offset plane.

    ``groups`` is float32 ``[N, G, period]``, or any other shape with the period last. Scales are those of :func:`fit`;
    they are rounded to their stored dtype before the codes are chosen. Raises :class:`FormatError` for other formats.
    """
    entries = fit(spec, groups, importance)
    scale_plane, offset_plane = scale_and_offset(spec)
    offset = entries[offset_plane.name] if offset_plane else 0.0
    entries[spec.codes[0].name] = nearest_code(spec, groups.sub(offset).div_(entries[scale_plane.name]))
    return entries


def fit(
    spec: FormatSpec, groups: torch.Tensor, importance: torch.Tensor | None = None, shrinks: Sequence[float] = SHRINKS
) -> dict[str, torch.Tensor]:
    """Scale and offset of each group, as read back from storage: float32 ``[..., 1]`` by plane name.

    The start is min–max: without an offset the smallest scale that reaches both ends of the group; with one, scale and
    offset that map its minimum and maximum onto the codes' range. For groups of codes of at most :data:`FITTED_BITS`
    bits, the range is also shrunk to each share of ``shrinks``, its codes taken, and scale and offset refined to the least
    squares for them; what has the smallest Σ ``importance``·(w − ŵ)² over the group stands, so that no group is worse than
    under min–max. ``importance`` is float32, not negative, of a shape that broadcasts to ``groups`` (None: all equal).
    """
    ends = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    entries = _reach(spec, ends, 1.0)
    if spec.period == ROW or spec.codes[0].bits > FITTED_BITS:
        return entries
    names, codes = list(entries), _gen_of(spec, groups, entries)
    least = _error(groups, codes, list(entries.values()), importance)
    for shrink in shrinks:
        if shrink != 1.0:
            start = _reach(spec, ends, shrink)
            codes = _gen_of(spec, groups, start)
        else:
            start = entries
        refined = _least_squares(spec, groups, codes, start, importance)
        error = _error(groups, codes, list(refined.values()), importance)
        better = error < least
        least = torch.where(better, error, least)
        entries = {name: torch.where(better, refined[name], entries[name]) for name in names}
    return entries


def scale_and_offset(spec: FormatSpec) -> tuple[Plane, Plane | None]:
    """The planes that multiply ``gen`` and that are added (None: nothing is). Raises :class:`FormatError` unless there is
    one code plane, one scale and at most one offset plane, which is what round-to-nearest can serve."""
    form = affine(spec)
    scales, offsets = form.coeff.free_symbols, form.offset.free_symbols
    if len(spec.codes) != 1 or form.coeff not in scales or len(offsets) > 1 or (offsets and form.offset not in offsets):
        raise FormatError(f"format {spec.name!r}: round-to-nearest needs one code plane, one scale and at most one offset "
                          f"plane, found value = ({form.coeff})*({form.gen}) + {form.offset}; give quantizer=")  # fmt: skip
    planes = {p.name: p for p in spec.planes}
    return planes[form.coeff.name], planes[form.offset.name] if offsets else None


def _reach(spec: FormatSpec, ends: tuple[torch.Tensor, torch.Tensor], shrink: float) -> dict[str, torch.Tensor]:
    """Scale, and offset if there is one, that map ``shrink`` times the range of a group (its ``ends``: least and greatest
    weight) onto the range of the codes."""
    scale_plane, offset_plane = scale_and_offset(spec)
    table = gen_table(spec)
    finite = table[torch.isfinite(table)]
    low, high = float(finite.min()), float(finite.max())
    wmin, wmax = ends
    if offset_plane is None:
        reach = torch.maximum(wmax / high, wmin / low) if low < 0 else wmax / high
        scale = _stored(scale_plane, reach.clamp_min(0) * shrink)
        offset = None
    else:
        scale = _stored(scale_plane, (wmax - wmin) * (shrink / (high - low)))
        offset = _stored(offset_plane, (wmax + wmin) / 2 - scale * (low + high) / 2)
    # A group of equal values needs no scale: any positive one decodes it exactly through code 0 or the offset.
    entries = {scale_plane.name: torch.where(scale > 0, scale, torch.ones_like(scale))}
    if offset_plane is not None and offset is not None:
        entries[offset_plane.name] = offset
    return entries


def _gen_of(spec: FormatSpec, groups: torch.Tensor, entries: dict[str, torch.Tensor]) -> torch.Tensor:
    """``gen`` of the codes nearest to ``groups`` under scale and offset ``entries`` (in this order): float32, same shape."""
    scale, *offset = entries.values()
    wanted = (groups - offset[0]).div_(scale) if offset else groups / scale
    table = gen_table(spec)
    if _is_unit_steps(spec, table):
        # What gen_values makes of nearest_code, without the way through integers.
        shift = 0.0 if spec.codes[0].dtype == "i8" else float(table[0])
        return wanted.sub_(shift).round_().add_(shift).clamp_(float(table.min()), float(table.max()))
    return gen_values(spec, nearest_code(spec, wanted))


def _least_squares(
    spec: FormatSpec, groups: torch.Tensor, gen: torch.Tensor, start: dict[str, torch.Tensor],
    importance: torch.Tensor | None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Stored scale and offset that minimize Σ importance·(w − scale·gen − offset)²; ``start`` where that has no solution."""
    scale_plane, offset_plane = scale_and_offset(spec)
    weighted = gen if importance is None else gen * importance
    square, product = _dot(weighted, gen), _dot(weighted, groups)
    mean_gen = mean = torch.zeros((), device=groups.device)
    if offset_plane is not None:
        total = groups.shape[-1] if importance is None else importance.sum(-1, keepdim=True).clamp_min(1e-30)
        mean_gen = weighted.sum(-1, keepdim=True) / total
        mean = (groups if importance is None else groups * importance).sum(-1, keepdim=True) / total
        square, product = square - total * mean_gen.square(), product - total * mean_gen * mean
    old = start[scale_plane.name]
    scale = _stored(scale_plane, product / square.clamp_min(1e-30))
    scale = torch.where((scale > 0) & (square > 1e-6) & torch.isfinite(scale), scale, old)
    if offset_plane is None:
        return {scale_plane.name: scale}
    return {scale_plane.name: scale, offset_plane.name: _stored(offset_plane, mean - scale * mean_gen)}


def _error(
    groups: torch.Tensor, gen: torch.Tensor, entries: Sequence[torch.Tensor], importance: torch.Tensor | None
) -> torch.Tensor:
    """Σ importance·(w − scale·gen − offset)² over each group: ``[..., 1]``."""
    difference = torch.addcmul(-groups, gen, entries[0])
    if len(entries) > 1:
        difference += entries[1]
    return _dot(difference if importance is None else difference * importance, difference)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum(-1, keepdim=True)


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


def gen_values(spec: FormatSpec, codes: torch.Tensor) -> torch.Tensor:
    """float32 ``gen`` of ``codes`` as :func:`nearest_code` gives them."""
    table = gen_table(spec)
    if _is_unit_steps(spec, table):
        return codes.to(torch.float32).add_(0.0 if spec.codes[0].dtype == "i8" else float(table[0]))
    return table.to(torch.float32).to(codes.device)[codes.view(torch.uint8).int()]


def _is_unit_steps(spec: FormatSpec, table: torch.Tensor) -> bool:
    """Whether ``gen`` is the code plus a constant."""
    return affine(spec).integer and torch.equal(table.sort().values.diff(), torch.ones(len(table) - 1, dtype=torch.float64))


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
