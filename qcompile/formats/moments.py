"""Sums over groups of weights, which least squares for scales need, for several candidates at once.

One order of addition, neighbours in pairs and then their sums in pairs, whatever computes them: PyTorch here, or the C++ of
``codegen/include/moments.cpp``, which gives the same bits. Pairwise sums also round less (Higham 1993).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from .algebra import finite_range, gen_table, linear_gen
from .codes import cells_of, nearest_gen
from .spec import FormatSpec

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Rounding:
    """How the value of the code nearest to v is found: ``table[(v − low) · factor]``, or, without a table, v − ``shift`` rounded
    to even, + ``shift``; between ``low`` and ``high``."""

    low: float
    high: float
    shift: float = 0.0
    factor: float = 0.0
    table: torch.Tensor | None = None

    @staticmethod
    def of(spec: FormatSpec) -> Rounding | None:
        """None for linear codes with a step other than 1, which only PyTorch rounds."""
        (low, high), linear = finite_range(gen_table(spec)), linear_gen(spec)
        if linear is None:
            table = cells_of(spec)
            return Rounding(0.0, len(table) - 1.0, low, (len(table) - 1) / (high - low), table)
        return Rounding(low, high, linear[1] - round(linear[1])) if linear[0] == 1.0 else None


class Native(Protocol):
    """What computes the same bits as PyTorch for tensors on CPUs, or gives None where it cannot."""

    def moments(
        self, rounding: Rounding, x: torch.Tensor, w: torch.Tensor | None, inverse: torch.Tensor, offset: torch.Tensor | None
    ) -> Three | None:
        """:func:`moments`."""

    def search(
        self, rounding: Rounding, x: torch.Tensor, w: torch.Tensor | None, sums: torch.Tensor, starts: torch.Tensor,
        shares: torch.Tensor, planes: tuple[int, ...],
    ) -> torch.Tensor | None:  # fmt: skip
        """Scale and offset ``[2, groups]`` that :mod:`qcompile.formats.search` finds from ``starts`` ``[2, groups]``.

        ``sums`` ``[3, groups]``: Σ w·x², Σ w·x and Σ w. ``shares`` ``[2, candidates]``: a candidate's scale is the start's times
        the first, its offset the start's plus the start's scale times the second. ``planes``: how scale and offset are rounded
        (numbers of :data:`FLOATS`, 0: not at all), whether there is an offset, its sign (0: either), and whether a scale may
        have either sign.
        """


FLOATS = {"f32": 1, "bf16": 2, "f16": 3}
"""Numbers of the dtypes that native code rounds scales to."""

_native: list[Callable[[], Native]] = []


def use(native: Callable[[], Native]) -> None:
    """Has :func:`moments` and the search ask what ``native`` returns."""
    _native[:] = [native]


def native_for(spec: FormatSpec, x: torch.Tensor) -> tuple[Native, Rounding] | None:
    """What computes for ``x``, and how it is to round; None: PyTorch."""
    rounding = Rounding.of(spec) if _native and x.device.type == "cpu" else None
    return (_native[0](), rounding) if rounding is not None else None


def moments(
    spec: FormatSpec, x: torch.Tensor, w: torch.Tensor | None, inverse: torch.Tensor, offset: torch.Tensor | None
) -> Three:
    """Σ w·gen·x, Σ w·gen and Σ w·gen² of each group and candidate: float32 ``[candidates, groups]``.

    gen is the value of the code nearest to (x − ``offset``) · ``inverse``, both ``[candidates, groups]`` (offset None: 0), for
    float32 ``x [groups, group]``; ``w`` of the same shape, None: 1.
    """
    native = native_for(spec, x)
    found = native[0].moments(native[1], x, w, inverse, offset) if native is not None else None
    if found is not None:
        return found
    columns, weights = x.t().contiguous(), None if w is None else w.t().contiguous()
    each = [_moments(spec, columns, weights, inverse[i], None if offset is None else offset[i]) for i in range(len(inverse))]
    return tuple(torch.stack(one) for one in zip(*each, strict=True))  # type: ignore[return-value]


def _moments(
    spec: FormatSpec, x: torch.Tensor, w: torch.Tensor | None, inverse: torch.Tensor, offset: torch.Tensor | None
) -> Three:
    gen = nearest_gen(spec, (x - offset).mul_(inverse) if offset is not None else x * inverse)
    weighted = gen if w is None else gen * w
    return total(weighted * x), total(weighted), total(weighted * gen)


def total(terms: torch.Tensor) -> torch.Tensor:
    """Σ over dimension 0, in pairs of neighbours, then pairs of these."""
    while len(terms) > 1:
        even = len(terms) // 2 * 2
        pairs = terms[0:even:2] + terms[1:even:2]
        terms = pairs if even == len(terms) else torch.cat([pairs, terms[even:]])
    return terms[0]
