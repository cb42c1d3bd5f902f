"""The gradient of a weight through what it is rounded to: Ŵ = s·gen + o, codes found by rounding, s and o from the weights.

Rounding counts as the identity where a format does not cut W off and as a constant where it does (the clipped
straight-through estimator; Bengio et al. 2013, Choi et al. 2018), and scales as what they are, functions of the weights of
their group, so that the gradient of a scale (Esser et al., "Learned Step Size Quantization", 2020) goes to the weights that
it follows from.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .algebra import affine, finite_range, gen_table, zero_points
from .codes import reach
from .search import has_search
from .spec import FormatSpec


@dataclass(frozen=True)
class Dependence:
    """How Ŵ depends on W: ``reach``, between which codes W is not cut off; ``ends``, least and greatest gen; whether scales
    follow from their group by least ``squares``, from its ``range``, or neither; whether an offset is ``free``, no multiple
    of s."""

    reach: tuple[float, float]
    ends: tuple[float, float]
    squares: bool
    range: bool
    free: bool


@functools.cache
def dependence(spec: FormatSpec) -> Dependence:
    """Scales that rows share, of a quantizer of the user's own, and of a range widened to whole steps, count as constants."""
    with _disable_current_modes():  # a backward is traced with fake tensors, of which nothing may be kept
        stepped = zero_points(spec) is not None
        own = spec.quantizer is None and any(p.rows == 1 and p.per == spec.period for p in spec.scales)
        return Dependence(reach(spec), finite_range(gen_table(spec)), own and has_search(spec),
                          own and not has_search(spec) and not stepped, affine(spec).offset != 0 and not stepped)  # fmt: skip


def gradient(
    spec: FormatSpec, grad: torch.Tensor, weight: torch.Tensor, made: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """∂L/∂W ``[N, K]`` from ``grad`` = ∂L/∂Ŵ, ``weight`` = W and ``made`` = Ŵ, all float ``[N, K]``, in grad's dtype; computed
    in float32.

    ``made`` and ``scales`` as :func:`~qcompile.formats.reference.fake` returns them.
    """
    (n, k), group = weight.shape, spec.period or weight.shape[1]
    whole, parts = k // group, []
    for columns, groups in ((slice(0, whole * group), slice(0, whole)), (slice(whole * group, k), slice(whole, whole + 1))):
        if columns.start < columns.stop:
            three = (t[:, columns].reshape(n, groups.stop - groups.start, -1).to(torch.float32) for t in (grad, weight, made))
            parts.append(_of_groups(spec, *three, *scales[:, :, groups, None]).reshape(n, -1))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).to(grad.dtype)


def _of_groups(
    spec: FormatSpec, grad: torch.Tensor, x: torch.Tensor, made: torch.Tensor, s: torch.Tensor, o: torch.Tensor | None = None
) -> torch.Tensor:
    """:func:`gradient` of ``[n, groups, size]``; s and o (None: 0) ``[n, groups, 1]``.

    With D = ∂L/∂ŵ: in range ŵ = x + s·(gen − (x − o)/s) with a constant bracket, beyond it ŵ = s·gen + o. So the scale gets
    S = Σ D·(ŵ − x)/s + Σ' D·gen and the offset O = Σ' D, Σ' over what is cut off.
    """
    on = dependence(spec)
    inverse = torch.where(s != 0, 1 / s, 0.0)
    at = (x if o is None else x - o) * inverse
    kept = ((at >= on.reach[0]) & (at <= on.reach[1])) | (s == 0)
    direct = torch.where(kept, grad, 0.0)
    if not on.squares and not on.range:
        return direct
    o = o if on.free else None  # a multiple of s: ŵ = s·(gen − zero)
    gen = (made if o is None else made - o) * inverse
    of_scale = (grad * torch.where(kept, (made - x) * inverse, gen)).sum(-1, keepdim=True)
    of_offset = None if o is None else (grad - direct).sum(-1, keepdim=True)
    if on.range:
        return direct + _range(on.ends, of_scale, of_offset, x, s)
    return direct + _squares(of_scale, of_offset, gen, None if o is None else o != 0)


def _squares(
    of_scale: torch.Tensor, of_offset: torch.Tensor | None, gen: torch.Tensor, free: torch.Tensor | None
) -> torch.Tensor:
    """What reaches the weights of a group by least squares: s = Σ c·x / Σ c² with c = gen, or, beside an offset that is
    ``free``, c = gen less its mean g, and o = Σ x / size − s·g. (An offset of 0 may not have another sign, and stays.)"""
    square, size = (gen * gen).sum(-1, keepdim=True), gen.shape[-1]
    if of_offset is None or free is None:
        return of_scale * _over(gen, square)
    mean, of_offset = torch.where(free, gen.sum(-1, keepdim=True) / size, 0.0), torch.where(free, of_offset, 0.0)
    return (of_scale - of_offset * mean) * _over(gen - mean, square - size * mean * mean) + of_offset / size


def _range(
    codes: tuple[float, float], of_scale: torch.Tensor, of_offset: torch.Tensor | None, x: torch.Tensor, s: torch.Tensor
) -> torch.Tensor:
    """What reaches the ends of a group's range: s = (max − min)/(high − low) and o = (max + min)/2 − s·(low + high)/2, ``codes``
    reaching from low to high; without an offset s is proportional to the weight of largest magnitude. Ties share."""
    if of_offset is None:
        size = x.abs()
        return of_scale * s * _over(_shared(size == size.amax(-1, keepdim=True)), x)
    low, high = codes
    of_scale, of_offset = (of_scale - of_offset * ((low + high) / 2)) / (high - low), of_offset / 2
    top, bottom = (_shared(x == end(x, -1, keepdim=True)) for end in (torch.amax, torch.amin))
    return (of_offset + of_scale) * top + (of_offset - of_scale) * bottom


def _shared(hit: torch.Tensor) -> torch.Tensor:
    return hit / hit.sum(-1, keepdim=True)


def _over(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where(b.abs() > 1e-30, a / b, 0.0)
