"""The gradient of a weight through what it is rounded to: Ŵ = s·gen + o, codes found by rounding, s and o by least squares.

Rounding counts as the identity where a format does not cut W off and as a constant where it does (the clipped straight-through
estimator; Bengio et al. 2013, Choi et al. 2018), and scales as what they are, functions of the weights of their group, so that the
gradient of a scale (Esser et al., "Learned Step Size Quantization", 2020) goes to the weights that it follows from.
"""

from __future__ import annotations

import torch

from .algebra import affine, zero_points
from .codes import reach
from .search import has_search
from .spec import FormatSpec


def gradient(
    spec: FormatSpec, grad: torch.Tensor, weight: torch.Tensor, made: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """∂L/∂W ``[N, K]`` from ``grad`` = ∂L/∂Ŵ, ``weight`` = W and ``made`` = Ŵ, all ``[N, K]``, in grad's dtype.

    ``scales``, float32 ``[1 or 2, N, groups]``: coeff, and the offset where the format has one, as
    :func:`~qcompile.formats.reference.fake` returns them.
    """
    (n, k), group = weight.shape, spec.period or weight.shape[1]
    whole, parts = k // group, []
    for columns, groups in ((slice(0, whole * group), slice(0, whole)), (slice(whole * group, k), slice(whole, whole + 1))):
        if columns.start < columns.stop:
            three = (t[:, columns].reshape(n, groups.stop - groups.start, -1).to(torch.float32) for t in (grad, weight, made))
            parts.append(_of_groups(spec, *three, *scales[:, :, groups, None]).reshape(n, -1))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).to(grad.dtype)


def _of_groups(
    spec: FormatSpec, grad: torch.Tensor, x: torch.Tensor, made: torch.Tensor, s: torch.Tensor, o: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """:func:`gradient` of ``[n, groups, size]``; s and o ``[n, groups, 1]``.

    In range ŵ = x + s·(gen − (x − o)/s) with a constant bracket, beyond it ŵ = s·gen + o. So with D = ∂L/∂ŵ the scale gets
    S = Σ D·(ŵ − x)/s + Σ' D·gen and the offset O = Σ' D, Σ' over what is cut off. Least squares are s = Σ c·x / Σ c², c the
    deviation of gen from its mean g, and o = mean(x) − s·g; without an offset of its own, c = ŵ/s and o = 0.
    """
    low, high = reach(spec)
    inverse = torch.where(s != 0, 1 / s, 0.0)
    at = (x - o) * inverse
    kept = ((at >= low) & (at <= high)) | (s == 0)
    direct = torch.where(kept, grad, 0.0)
    if not follows(spec):
        return direct
    free = 0.0 if zero_points(spec) is not None else o
    gen = (made - free) * inverse
    of_scale = (grad * torch.where(kept, (made - x) * inverse, gen)).sum(-1, keepdim=True)
    square, size = (gen * gen).sum(-1, keepdim=True), x.shape[-1]
    if not isinstance(free, torch.Tensor):
        return direct + of_scale * _over(gen, square)
    of_offset = (grad - direct).sum(-1, keepdim=True)
    mean = torch.where(free != 0, gen.sum(-1, keepdim=True) / size, 0.0)
    of_offset = torch.where(free != 0, of_offset, 0.0)
    return direct + (of_scale - of_offset * mean) * _over(gen - mean, square - size * mean * mean) + of_offset / size


def follows(spec: FormatSpec) -> bool:
    """Whether each group's scale is found by least squares over weights of its own, so that gradients reach it; else (min–max,
    scales that rows share, a quantizer of the user's own) scales count as constants."""
    return has_search(spec) and any(p.rows == 1 and p.per == spec.period for p in spec.scales)


def _over(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where(b > 1e-30, a / b, 0.0)
