"""Ranges of groups by trying: each end is clipped where the layer's outputs are nearer to the float ones then.

The last step of AWQ (Lin et al. 2024, section 3.2 and its code), with two ends of a range instead of one, and with errors of
outputs that count what other columns do: Σ ‖x(ŵ − w)ᵀ‖² = tr(δ H δᵀ) over all columns, H = XᵀX, δ = ŵ − w.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from ..formats import reference
from .layers import Layer, decoded

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Shares of the low and of the high end of a range that are tried."""

SWEEPS = 2
"""Times that all columns are gone over: in the first, errors of those still to come count as none."""


def clipped(layer: Layer, factors: torch.Tensor, hessian: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The layer's float32 matrix ``[N, K]`` with the weights over their ``factors`` ``[K]`` clipped in each group, and the share
    of groups that are. ``hessian`` ``[K, K]``: Σ x xᵀ. Columns that share scales are chosen together, given all others."""
    spec = layer.scheme.format
    weight = layer.matrix.to(torch.float32) / factors
    n, k = weight.shape
    width = spec.whole_groups if spec.period else k
    scaled_hessian = hessian * factors * factors[:, None]
    chosen, off = weight.clone(), torch.zeros_like(weight)
    changed = total = 0
    for _ in range(SWEEPS):
        changed = total = 0
        for start in range(0, k, width):
            here = slice(start, min(start + width, k))
            others = off.clone()
            others[:, here] = 0
            part = replace(layer, matrix=weight[:, here])
            chosen[:, here], off[:, here], share = _best(part, scaled_hessian[here, here], others @ scaled_hessian[:, here])
            changed, total = changed + int((share < 1).any(-1).sum()), total + share[..., 0].numel()
    return chosen * factors, changed / total


def _best(layer: Layer, hessian: torch.Tensor, pull: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of columns ``[N, B]``: the weights clipped, their errors δ, and the shares ``[N, groups, 2]`` of the least
    δ_g H_gg δ_gᵀ + 2 δ_g · ``pull`` of each group g. ``pull`` ``[N, B]``: the other columns' errors times H."""
    n, width = layer.matrix.shape
    group = layer.scheme.format.period or width
    gram, pulls = _blocks(hessian, group), _groups(pull, group)
    least = pull.new_full((n, len(gram), 1), torch.inf)
    share, errors, weights = pull.new_ones((n, len(gram), 2)), torch.zeros_like(pulls), torch.zeros_like(pulls)
    for low in CLIPS:
        for high in CLIPS:
            ends = pull.new_tensor([low, high])
            tried = _clip(layer.matrix, ends, group)
            off = _groups(_rounded(layer, tried) - layer.matrix, group)
            error = ((torch.einsum("ngi,gij->ngj", off, gram) + 2 * pulls) * off).sum(-1, keepdim=True)
            better = error < least
            share, errors = torch.where(better, ends, share), torch.where(better, off, errors)
            weights = torch.where(better, _groups(tried, group), weights)
            least = torch.where(better, error, least)
    return weights.view(n, -1)[:, :width], errors.view(n, -1)[:, :width], share


def _rounded(layer: Layer, weight: torch.Tensor) -> torch.Tensor:
    """``weight`` to the nearest values of the layer's format, ranges as they are."""
    spec, (n, k) = replace(layer.scheme.format, shrinks=()), weight.shape
    return decoded(spec, reference.quantize(spec, weight, layer.name), n, k, torch.float32)


def _groups(matrix: torch.Tensor, group: int) -> torch.Tensor:
    """``[N, K]`` → ``[N, groups, group]``, the last one padded with zeros."""
    return F.pad(matrix, (0, -matrix.shape[1] % group)).view(len(matrix), -1, group)


def _blocks(hessian: torch.Tensor, group: int) -> torch.Tensor:
    """The blocks ``[groups, group, group]`` on the diagonal of ``hessian`` ``[K, K]``, the last one padded with zeros."""
    parts = [hessian[at : at + group, at : at + group] for at in range(0, len(hessian), group)]
    return torch.stack([F.pad(p, (0, group - len(p), 0, group - len(p))) for p in parts])


def _clip(weight: torch.Tensor, share: torch.Tensor, group: int) -> torch.Tensor:
    """``weight`` ``[N, K]`` clipped to ``share`` ``[2]`` of the ends of each group's range."""
    groups = _groups(weight, group)
    low, high = groups.amin(-1, keepdim=True) * share[0], groups.amax(-1, keepdim=True) * share[1]
    return torch.minimum(torch.maximum(groups, low), high).view(len(weight), -1)[:, : weight.shape[1]]
