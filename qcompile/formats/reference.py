"""The oracle: quantize, pack and decode in plain PyTorch, from the declaration alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..errors import FormatError, WeightError
from .algebra import affine, torch_function
from .codes import gen_values, nearest_code
from .layout import by_plane, check_planes, empty_parts, matrix_shape, pack_plane, unpack_plane
from .search import fit, inverted, whole_tensor
from .spec import ALL, ROW, TILE_N, FormatSpec
from .storage import Entries

CHUNK_ELEMENTS = 1 << 20
"""Weights quantized at a time, so that float32 working memory is a few megabytes and stays in the processor's caches."""


def quantize(
    spec: FormatSpec, weight: torch.Tensor, layer: str = "weight", importance: torch.Tensor | None = None,
    factors: torch.Tensor | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    """Quantizes a float ``[N, K]`` weight, or each matrix of a stack ``[E, N, K]`` by itself; returns the stored planes in spec
    order.

    ``importance``, float ``[K]``, not negative, weighs the squared error of each input's weights (None: all equal).
    ``factors``, float ``[K]``, positive, are those of a scaled format (None: 1): the weight over them is what is rounded.
    Rows are worked on in chunks, so peak memory is the planes plus one chunk. Raises :class:`WeightError` for a
    weight that is not a 2-D float tensor or has NaN or infinite values, :class:`FormatError` for a stack in a format with
    planes for columns.
    """
    if weight.dim() == 3:
        return _stacked(spec, weight, layer)
    check_weight(weight, layer)
    if importance is not None and (importance.shape != weight.shape[1:] or not (importance >= 0).all()):
        raise WeightError(f"{layer}: importance must be [{weight.shape[1]}] and not negative, found {list(importance.shape)}")
    n, k = weight.shape
    if factors is not None:
        _check_factors(spec, factors, k, layer)
        weight = weight.to(torch.float32) / factors
        importance = factors**2 if importance is None else importance * factors**2
    stored = empty_parts(spec, n, k, weight.device)
    fixed = whole_tensor_entries(spec, weight, layer)
    for start, chunk in chunks(spec, weight, layer, shared_rows(spec, weight, fixed)):
        entries = entries_of(spec, chunk, importance, fixed)
        tiles = slice(start // TILE_N, -(-(start + len(chunk)) // TILE_N))
        parts = [part for plane in spec.planes for part in pack_plane(spec, plane, entries[plane.name], len(chunk), k)]
        for whole, part in zip(stored, parts, strict=True):
            whole[tiles].copy_(part)
    return stored + columns(spec, k, weight.device, factors)


def check_weight(weight: torch.Tensor, layer: str) -> None:
    """Raises :class:`WeightError` for what is no matrix of floats."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise WeightError(f"{layer}: expected a 2-D float weight [N, K], found {weight.dtype} {list(weight.shape)}")


def shared_rows(spec: FormatSpec, weight: torch.Tensor, fixed: Entries) -> int | None:
    """Elements of a chunk where all rows must be in one, because they share an entry that is not ``fixed``; else None."""
    shared = any(p.rows == ALL and p.name not in fixed for p in spec.scales)
    return 2 * weight.numel() if shared else None


def _stacked(spec: FormatSpec, weight: torch.Tensor, layer: str) -> list[torch.Tensor]:
    """Planes of a stack of matrices, each quantized by itself: they share no scale, not even one for a whole tensor."""
    if spec.columns:
        raise FormatError(f"{layer}: {why_no_stack(spec)}; choose {spec.plain.name}")
    rows, k = matrix_shape(weight.shape)
    stored = empty_parts(spec, rows, k, weight.device)
    for i, matrix in enumerate(weight):
        for whole, part in zip(stored, quantize(spec, matrix, f"{layer}[{i}]"), strict=True):
            whole[i * len(part) : (i + 1) * len(part)] = part
    return stored


def why_no_stack(spec: FormatSpec) -> str | None:
    """Why ``spec`` cannot hold a stack of matrices, if it cannot."""
    if not spec.columns:
        return None
    return f"format {spec.name} keeps {' and '.join(spec.columns)} of the columns of one matrix; experts are several"


def matrix_of(planes: Sequence[torch.Tensor], count: int, index: int) -> list[torch.Tensor]:
    """Planes of matrix ``index`` of a stack of ``count``, as views."""
    return [p.unflatten(0, (count, -1))[index] for p in planes]


def columns(spec: FormatSpec, k: int, device: torch.device, factors: torch.Tensor | None = None) -> list[torch.Tensor]:
    """The tensors ``[K]`` that follow the parts of a weight: its columns in their own order, and ``factors`` (None: 1)."""
    stored = [torch.arange(k, dtype=torch.int32, device=device)] if spec.permuted else []
    if spec.scaled:
        stored.append(torch.ones(k, device=device) if factors is None else factors.to(device, torch.float32).clone())
    return stored


def _check_factors(spec: FormatSpec, factors: torch.Tensor, k: int, layer: str) -> None:
    if not spec.scaled:
        raise FormatError(f"{layer}: format {spec.name} has no factors for columns; use scaled({spec.name})")
    if factors.shape != (k,) or not (torch.isfinite(factors) & (factors > 0)).all():
        raise WeightError(f"{layer}: factors must be [{k}], positive and finite, found {list(factors.shape)}")


def chunks(
    spec: FormatSpec, weight: torch.Tensor, layer: str = "weight", elements: int | None = None
) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, float32 rows) of about ``elements`` weights (:data:`CHUNK_ELEMENTS`), never cutting rows that share scales.

    Raises :class:`WeightError` for NaN and infinite values.
    """
    whole = spec.row_multiple
    step = max(whole, (elements or CHUNK_ELEMENTS) // max(weight.shape[1], 1) // whole * whole)
    for start in range(0, len(weight), step):
        chunk = weight[start : start + step].to(torch.float32)
        if chunk.numel() and not all(map(torch.isfinite, torch.aminmax(chunk))):  # NaN if any is
            raise WeightError(f"{layer}: the weight has NaN or infinite values (rows {start} to {start + len(chunk) - 1}); "
                              "repair the checkpoint, or leave this layer in float by a policy rule")  # fmt: skip
        yield start, chunk


def whole_tensor_entries(spec: FormatSpec, weight: torch.Tensor, layer: str) -> Entries:
    """Entries of planes with one entry for the tensor: they need its range before the first chunk is quantized."""
    if not any(p.rows == ALL and p.per == ROW for p in spec.scales) or weight.numel() == 0:
        return {}
    ends = [(float(chunk.min()), float(chunk.max())) for _, chunk in chunks(spec, weight, layer)]
    return whole_tensor(spec, min(e[0] for e in ends), max(e[1] for e in ends))


def entries_of(
    spec: FormatSpec, weight: torch.Tensor, importance: torch.Tensor | None = None, fixed: Entries | None = None
) -> Entries:
    """Plane entries (codes ``[n, K']``, scales ``[rows, entries]``) of a float32 ``[n, K]`` weight, K padded to K' =
    ``spec.whole(K)``."""
    weight, importance = padded(spec, weight, importance)
    if spec.quantizer is not None:
        return _checked(spec, spec.quantizer(spec, weight), len(weight), weight.shape[1])
    found = fit(spec, weight, importance, fixed)
    return found.entries | {spec.code.name: codes_of(spec, weight, found.scale, found.offset)}


def _checked(spec: FormatSpec, entries: Entries, n: int, k: int) -> Entries:
    """What a user's quantizer gave, if it has every plane in its shape. Raises :class:`FormatError`."""
    for plane in spec.planes:
        found = tuple(entries[plane.name].shape) if plane.name in entries else None
        if found != (shape := spec.entry_shape(plane, n, k)):
            raise FormatError(f"format {spec.name!r}: its quantizer must give {list(shape)} entries of plane {plane.name!r} for "
                              f"a [{n}, {k}] weight, found {'none' if found is None else list(found)}")  # fmt: skip
    return entries


def padded(
    spec: FormatSpec, weight: torch.Tensor, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``weight`` with K padded to K' by its last column, so that no range changes, and an importance that is 0 there."""
    n, k = weight.shape
    cols = spec.whole(k)
    if cols == k:
        return weight, importance
    real = importance if importance is not None else torch.ones(k, device=weight.device)
    return torch.cat([weight, weight[:, -1:].expand(n, cols - k)], 1), torch.cat([real, real.new_zeros(cols - k)])


def codes_of(
    spec: FormatSpec, weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None
) -> torch.Tensor:
    """Codes ``[n, K']`` nearest to float32 ``weight`` under ``scale`` and ``offset`` ``[n, groups]``."""
    n, k = weight.shape
    groups = weight.view(n, -1, spec.period or k)
    wanted = groups - offset.unsqueeze(-1) if offset is not None else groups
    inverse = inverted(scale)
    return nearest_code(spec, wanted * inverse.unsqueeze(-1)).view(n, k)


def decode(
    spec: FormatSpec, planes: Sequence[torch.Tensor], n: int, k: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The ``[N, K]`` weight that stored ``planes`` stand for: coeff · gen + offset, evaluated in float32 from left to right
    and rounded once to ``dtype``.

    Raises :class:`~qcompile.errors.LayoutError` when the planes do not belong to an N×K weight of this format.
    """
    check_planes(spec, planes, n, k)
    grouped = by_plane(spec, planes)
    value = values_of(spec, {p.name: unpack_plane(p, grouped[p.name], n) for p in spec.planes})[0]
    return in_place(spec, value[:, :k], planes).to(dtype).contiguous()


def values_of(
    spec: FormatSpec, entries: Entries
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """float32 values ``[n, K']`` of plane ``entries`` with as many rows as the codes, and coeff and offset ``[n, groups]`` (None:
    0): coeff · gen + offset, from left to right."""
    codes = entries[spec.code.name]
    n, cols = codes.shape
    form, group = affine(spec), spec.period or cols
    wide = {p.name: entries[p.name].repeat_interleave((p.per or cols) // group, 1)[:, : cols // group] for p in spec.scales}
    names, offset = tuple(wide), None
    coeff = torch_function(spec, form.coeff, names)(*wide.values())
    value = gen_values(spec, codes).view(n, -1, group).mul_(coeff.unsqueeze(-1))
    if form.offset != 0:
        offset = torch_function(spec, form.offset, names)(*wide.values())
        value.add_(offset.unsqueeze(-1))
    return value.view(n, cols), coeff, offset


def fake(spec: FormatSpec, weight: torch.Tensor, layer: str = "weight") -> tuple[torch.Tensor, torch.Tensor]:
    """``decode(quantize(weight))`` of a float ``[N, K]`` weight in its dtype, bit for bit, and the scales in it: float32
    ``[1 or 2, N, groups]``, coeff and the offset where the format has one, from which :mod:`~qcompile.formats.surrogate`
    has the gradient.

    No plane is packed. Rows are worked on in chunks. Raises :class:`WeightError` as :func:`quantize` does.
    """
    check_weight(weight, layer)
    (n, k), fixed = weight.shape, whole_tensor_entries(spec, weight, layer)
    made = torch.empty(n, k, dtype=weight.dtype, device=weight.device)
    scales = torch.empty(scales_shape(spec, n, k), device=weight.device)
    for start, chunk in chunks(spec, weight, layer, shared_rows(spec, weight, fixed)):
        rows, entries = slice(start, start + len(chunk)), entries_of(spec, chunk, None, fixed)
        value, *found = values_of(spec, by_row(spec, entries))
        made[rows] = value[:, :k]
        for whole, part in zip(scales, found, strict=False):
            whole[rows] = part
    return made, scales


def scales_shape(spec: FormatSpec, n: int, k: int) -> tuple[int, int, int]:
    """Shape of the scales that :func:`fake` returns of an N×K weight."""
    return 1 + (affine(spec).offset != 0), n, spec.whole(k) // spec.period if spec.period else 1


def by_row(spec: FormatSpec, entries: Entries) -> Entries:
    """``entries`` with those that rows share repeated, so that each plane has as many rows as the codes."""
    n = len(entries[spec.code.name])
    shared = {p.name: entries[p.name].repeat_interleave(p.rows or n, 0)[:n] for p in spec.scales if p.rows != 1}
    return entries | shared


def in_place(spec: FormatSpec, stored: torch.Tensor, planes: Sequence[torch.Tensor]) -> torch.Tensor:
    """Float rows ``[..., K]`` that the parts stand for → those of the weight: columns put back, times their factors."""
    found = dict(zip(spec.columns, planes[len(spec.parts) :], strict=True))
    if spec.permuted:
        stored = torch.empty_like(stored).index_copy_(-1, found["order"].long(), stored)
    return (stored * found["factors"]).to(stored.dtype) if spec.scaled else stored


def prepared(spec: FormatSpec, x: torch.Tensor, planes: Sequence[torch.Tensor], reorder: bool = True) -> torch.Tensor:
    """Inputs ``[..., K]`` as the parts of a weight take them: times the factors of columns, and (``reorder``) in their order."""
    found = dict(zip(spec.columns, planes[len(spec.parts) :], strict=True))
    if spec.scaled:
        x = (x * found["factors"]).to(x.dtype)
    return x.index_select(-1, found["order"]) if spec.permuted and reorder else x


def tile_rows(spec: FormatSpec, planes: Sequence[torch.Tensor], start: int, count: int) -> list[torch.Tensor]:
    """Stored planes of rows ``start`` … ``start + count`` (start a multiple of 16), as views."""
    tiles = slice(start // TILE_N, -(-(start + count) // TILE_N))
    return [p[tiles] for p in planes[: len(spec.parts)]] + list(planes[len(spec.parts) :])


def sqnr(spec: FormatSpec, planes: Sequence[torch.Tensor], weight: torch.Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB, 10·log10(Σ w² / Σ (w − ŵ)²), of stored ``planes`` against ``weight`` [N, K] or
    [E, N, K].

    Worked in row chunks, sums in float64. Infinite when the format holds the weight exactly.
    """
    signal = noise = 0.0
    stack = weight if weight.dim() == 3 else weight[None]
    for i, matrix in enumerate(stack):
        own = matrix_of(planes, len(stack), i) if weight.dim() == 3 else planes
        for start, chunk in chunks(spec, matrix):
            decoded = decode(spec, tile_rows(spec, own, start, len(chunk)), len(chunk), weight.shape[-1])
            signal += float(chunk.square().sum(dtype=torch.float64))
            noise += float(chunk.sub(decoded).square_().sum(dtype=torch.float64))
    if noise == 0.0:
        return float("inf")
    return float(10 * torch.log10(torch.tensor(max(signal, 1e-300) / noise, dtype=torch.float64)))
