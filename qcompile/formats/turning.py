"""Channels of keys and values, turned together before they are rounded in even steps.

A few channels or numbers far out set the step of all that share their scale. An orthogonal matrix over the channels spreads
them (QuaRot, arXiv:2404.00456): products of queries and keys stay as they are when both are turned, and sums of values are
turned back. Floats keep relative precision whatever lies beside them, and small channels would lose theirs.
"""

from __future__ import annotations

import torch

from .algebra import linear_gen
from .spec import FormatSpec

MOST = 256
"""Channels that are turned together at most."""


def turned_together(spec: FormatSpec, dim: int) -> int:
    """How many neighbouring ones of ``dim`` channels are turned together: the largest power of two up to :data:`MOST` that
    divides ``dim``; 1 (none) where the codes' values do not have even steps."""
    return min(dim & -dim, MOST) if linear_gen(spec) is not None else 1


def turned(spec: FormatSpec, x: torch.Tensor) -> torch.Tensor:
    """Keys or values ``x [..., D]`` (floats) as caches of ``spec`` hold them, in float64: every :func:`turned_together` channels
    times the Walsh–Hadamard matrix over the root of their number. Its own inverse."""
    each, wide = turned_together(spec, x.shape[-1]), x.double()
    half = 1
    while half < each:
        first, second = wide.unflatten(-1, (-1, 2, half)).unbind(-2)
        wide, half = torch.stack([first + second, first - second], -2).flatten(-3), 2 * half
    return wide / each**0.5
