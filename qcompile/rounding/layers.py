"""A layer to pack, and a packed one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..formats import FormatSpec, Scheme, reference
from ..formats.spec import TILE_N
from .seen import CHUNK_ELEMENTS, output_error


@dataclass(frozen=True)
class Layer:
    """A linear layer to pack: its ``name``, for messages, its ``scheme`` and its float ``matrix`` ``[N, K]``."""

    name: str
    scheme: Scheme
    matrix: torch.Tensor


@dataclass(frozen=True)
class Found:
    """A packed layer: stored ``planes`` in the format of ``scheme``, which may be another variant than was asked for, the
    ``method`` that found them, and what else a reader should know (``note``)."""

    scheme: Scheme
    planes: Sequence[torch.Tensor]
    method: str
    note: str = ""

    @property
    def factors(self) -> torch.Tensor | None:
        """Float32 ``[K]``: what inputs are multiplied by, of a scaled format."""
        return self.planes[-1] if self.scheme.format.scaled else None

    def decoded(self, shape: Sequence[int]) -> torch.Tensor:
        """The float32 weight of ``shape`` ``[N, K]``."""
        n, k = shape
        return decoded(self.scheme.format, self.planes, n, k, torch.float32)

    def error(self, layer: Layer, sample: torch.Tensor) -> float:
        """‖ŷ − y‖ / ‖y‖ of the outputs of ``layer`` for inputs ``sample`` ``[R, K]``."""
        return output_error(sample, layer.matrix, self.decoded(layer.matrix.shape), self.scheme.activations, self.factors)


def decoded(spec: FormatSpec, planes: Sequence[torch.Tensor], n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """The ``[N, K]`` weight in ``dtype``, made in row chunks, since decoding works in float32."""
    out = torch.empty(n, k, dtype=dtype, device=planes[0].device)
    step = max(1, CHUNK_ELEMENTS // k // TILE_N) * TILE_N
    for start in range(0, n, step):
        part = out[start : start + step]
        part.copy_(reference.decode(spec, reference.tile_rows(spec, planes, start, len(part)), len(part), k))
    return out
