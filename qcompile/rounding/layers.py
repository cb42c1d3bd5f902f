"""A layer to pack, and a packed one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..formats import FormatSpec, Scheme, reference
from ..formats.spec import TILE_N
from .seen import CHUNK_ELEMENTS, outputs, relative_error


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

    def error(self, layer: Layer, sample: torch.Tensor) -> float:
        """‖ŷ − y‖ / ‖y‖ of the outputs of ``layer`` for inputs ``sample`` ``[R, K]``. A chunk of the weight's rows is wide at a
        time."""
        wanted, got = sample.new_empty(2, len(sample), len(layer.matrix))
        for start, part in decoded_rows(self.scheme.format, self.planes, *layer.matrix.shape):
            here = slice(start, start + len(part))
            wanted[:, here], got[:, here] = outputs(sample, layer.matrix[here], part, self.scheme.activations, self.factors)
        return relative_error(wanted, got)


def decoded(spec: FormatSpec, planes: Sequence[torch.Tensor], n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """The ``[N, K]`` weight in ``dtype``, made in row chunks, since decoding works in float32."""
    out = torch.empty(n, k, dtype=dtype, device=planes[0].device)
    for start, part in decoded_rows(spec, planes, n, k):
        out[start : start + len(part)] = part
    return out


def decoded_rows(spec: FormatSpec, planes: Sequence[torch.Tensor], n: int, k: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, float32 rows) of the ``[N, K]`` weight, about :data:`CHUNK_ELEMENTS` weights at a time."""
    step = max(1, CHUNK_ELEMENTS // k // TILE_N) * TILE_N
    for start in range(0, n, step):
        count = min(step, n - start)
        yield start, reference.decode(spec, reference.tile_rows(spec, planes, start, count), count, k)
