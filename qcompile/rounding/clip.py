"""Ranges of groups by trying: each end is clipped where the layer's outputs are nearer to the float ones then.

The last step of AWQ (Lin et al. 2024, section 3.2 and its code), with two ends of a range instead of one, and with errors of
outputs that count what other columns do: Σ ‖x(ŵ − w)ᵀ‖² = tr(δ H δᵀ) over all columns, H = XᵀX, δ = ŵ − w.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch
import torch.nn.functional as F

from ..formats import reference
from .layers import Layer

CENTRE, REACH = 0.85, 3
"""Shares of either end of a range that are tried first: this, and so many steps more and less."""

STEPS = (0.05, 0.02, 0.008, 0.003)
"""Steps of one sweep over all columns after another, each around what the last one chose. Which weights fall to which side
of a code's edge changes with the finest of them: with H they are chosen so that errors answer each other."""


def clipped(layer: Layer, factors: torch.Tensor, hessian: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The layer's float32 matrix ``[N, K]`` with the weights over their ``factors`` ``[K]`` clipped in each group, and the mean
    share of the ranges' ends that is left. ``hessian`` ``[K, K]``: Σ x xᵀ. Columns that share scales are chosen together,
    given all others; in the first sweep, errors of those still to come count as none."""
    spec = layer.scheme.format
    weight = layer.matrix.to(torch.float32) / factors
    n, k = weight.shape
    width, group = spec.whole_groups if spec.period else k, spec.period or k
    scaled_hessian = hessian * factors * factors[:, None]
    shares, off = weight.new_full((n, -(-k // group), 2), CENTRE), torch.zeros_like(weight)
    for step in STEPS:
        for start in range(0, k, width):
            here, groups = slice(start, min(start + width, k)), slice(start // group, (start + width) // group)
            gram = scaled_hessian[here, here]
            pull = off @ scaled_hessian[:, here] - off[:, here] @ gram
            part = replace(layer, matrix=weight[:, here])
            shares[:, groups], off[:, here] = _best(part, gram, pull, shares[:, groups], step)
    return _clip(weight, shares, group) * factors, float(shares.mean())


def _best(
    layer: Layer, hessian: torch.Tensor, pull: torch.Tensor, centre: torch.Tensor, step: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of columns ``[N, B]``: the shares ``[N, groups, 2]`` around ``centre`` of the least δ_g H_gg δ_gᵀ + 2 δ_g · ``pull`` of
    each group g, and the errors δ. ``pull`` ``[N, B]``: the other columns' errors times H."""
    n, width = layer.matrix.shape
    group = layer.scheme.format.period or width
    spec = replace(layer.scheme.format, shrinks=())  # ranges as they are
    gram, pulls = _blocks(hessian, group), _groups(pull, group)
    least = pull.new_full((n, len(gram), 1), torch.inf)
    shares, errors = centre, torch.zeros_like(pulls)
    for low, high in product(range(-REACH, REACH + 1), repeat=2):
        ends = (centre + step * pull.new_tensor([low, high])).clamp_max(1.0)
        made, _ = reference.fake(spec, _clip(layer.matrix, ends, group), layer.name)
        off = _groups(made - layer.matrix, group)
        turned = (off.transpose(0, 1) @ gram).transpose(0, 1)
        error = ((turned + 2 * pulls) * off).sum(-1, keepdim=True)
        better = error < least
        shares, errors = torch.where(better, ends, shares), torch.where(better, off, errors)
        least = torch.where(better, error, least)
    return shares, errors.reshape(n, -1)[:, :width]


def _groups(matrix: torch.Tensor, group: int) -> torch.Tensor:
    """``[N, K]`` → ``[N, groups, group]``, the last one padded with zeros."""
    return F.pad(matrix, (0, -matrix.shape[1] % group)).view(len(matrix), -1, group)


def _blocks(hessian: torch.Tensor, group: int) -> torch.Tensor:
    """The blocks ``[groups, group, group]`` on the diagonal of ``hessian`` ``[K, K]``, the last one padded with zeros."""
    parts = [hessian[at : at + group, at : at + group] for at in range(0, len(hessian), group)]
    return torch.stack([F.pad(p, (0, group - len(p), 0, group - len(p))) for p in parts])


def _clip(weight: torch.Tensor, shares: torch.Tensor, group: int) -> torch.Tensor:
    """``weight`` ``[N, K]`` clipped to ``shares`` ``[N, groups, 2]`` of the ends of each group's range."""
    groups = _groups(weight, group)
    low, high = groups.amin(-1, keepdim=True) * shares[..., :1], groups.amax(-1, keepdim=True) * shares[..., 1:]
    return torch.minimum(torch.maximum(groups, low), high).view(len(weight), -1)[:, : weight.shape[1]]
