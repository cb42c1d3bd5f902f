"""Packed weights inside DTensors: each process packs, holds and multiplies by its own part.

A DTensor may wrap a :class:`~qcompile.tensor.QuantizedTensor`: PyTorch then divides the work and sums or gathers results as it
does for float weights, and the products run on packed planes.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from .errors import ShardError
from .formats import FormatSpec
from .sharding import COLUMN, ROW, share
from .tensor import QuantizedTensor


def as_dtensor(value: object) -> Any:
    """``value`` if it is a DTensor, else None; where nothing has imported DTensors there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return value if module is not None and isinstance(value, module.DTensor) else None


def packed_in(value: object) -> QuantizedTensor | None:
    """The packed weight that ``value`` is, or that is this process's part of it; None for all else."""
    whole = as_dtensor(value)
    local = value if whole is None else whole._local_tensor
    return local if isinstance(local, QuantizedTensor) else None


def part_to_pack(value: torch.Tensor, spec: FormatSpec, transposed: bool, layer: str) -> torch.Tensor:
    """The part of a float weight ``value`` that this process packs in ``spec``: all of it, or a DTensor's own.

    Raises :class:`ShardError` where groups or tiles of the whole weight would lie in two parts: each part would be another
    weight than that of one process.
    """
    whole = as_dtensor(value)
    if whole is None:
        return value
    n, k = whole.shape[::-1] if transposed else whole.shape
    for dim, devices in _divided(whole, layer):
        n, k = share(spec, n, k, COLUMN if (dim == 0) != transposed else ROW, devices, layer)
    local: torch.Tensor = whole.to_local()
    return local


def why_not(value: torch.Tensor) -> str | None:
    """Why a weight cannot be packed part by part, if it cannot."""
    if as_dtensor(value) is None or value.dim() == 2:
        return None
    return "a stack of experts that is divided among devices; divide a copy that is not a DTensor, or keep it whole"


def _divided(whole: Any, layer: str) -> list[tuple[int, int]]:
    """(dimension, parts) of each division of a DTensor."""
    found = []
    for placement, devices in zip(whole.placements, whole.device_mesh.shape, strict=True):
        if type(placement).__name__ == "Shard":
            found.append((placement.dim % whole.dim(), devices))
        elif not placement.is_replicate():
            raise ShardError(f"{layer}: its DTensor is placed as {placement}, and packed weights can be Shard(dim) or "
                             "Replicate(); leave the layer in floating point")  # fmt: skip
    return found


def parameter_like(value: torch.Tensor, packed: nn.Parameter) -> nn.Parameter:
    """``packed``; where ``value`` is a DTensor, one of its mesh, placements and shape, of which ``packed`` is this one's part."""
    whole = as_dtensor(value)
    return packed if whole is None else wrapped(packed, whole.device_mesh, whole.placements, whole.shape, whole.stride())


def wrapped(local: torch.Tensor, mesh: Any, placements: Any, shape: torch.Size, stride: tuple[int, ...]) -> nn.Parameter:
    """A parameter over the parts of all processes, of which ``local`` is this one's."""
    from torch.distributed.tensor import DTensor

    whole = DTensor.from_local(local.detach(), mesh, placements, run_check=False, shape=shape, stride=stride)
    return nn.Parameter(whole, requires_grad=False)
