"""Packed weights over several devices: who holds which rows or columns, cut only where planes can be cut.

A layer split by ``COLUMN`` has N / devices of its output features on each device, one split by ``ROW`` K / devices of its input
features; see Shoeybi et al., "Megatron-LM", 2019. Tiles of 16 rows, blocks of scales and groups stay whole.
"""

from __future__ import annotations

from collections.abc import Iterable

from .errors import ShardError
from .formats import FormatSpec
from .formats.layout import columns_multiple, columns_of
from .tensor import QuantizedTensor

COLUMN, ROW = "column", "row"

SPLITS = {
    "attention.q_proj": COLUMN,
    "attention.k_proj": COLUMN,
    "attention.v_proj": COLUMN,
    "attention.o_proj": ROW,
    "mlp.gate_proj": COLUMN,
    "mlp.up_proj": COLUMN,
    "mlp.down_proj": ROW,
    "lm_head": COLUMN,
}
"""How layers are split by their roles; all others are on every device."""


def split_of(roles: Iterable[str]) -> str | None:
    """How a layer of these ``roles`` is split; None: it is on every device."""
    found = {SPLITS.get(role) for role in roles}
    return found.pop() if len(found) == 1 else None


def step(spec: FormatSpec, split: str) -> int:
    """What a device's share must be a multiple of: output features (``COLUMN``) or input features (``ROW``)."""
    return spec.row_multiple if split == COLUMN else columns_multiple(spec)


def share(spec: FormatSpec, n: int, k: int, split: str, devices: int, layer: str) -> tuple[int, int]:
    """(N, K) of each device's part of an N×K weight. Raises :class:`ShardError` with the sizes where it cannot be cut so."""
    size, unit, what = (n, step(spec, split), "rows") if split == COLUMN else (k, step(spec, split), "columns")
    if split == ROW and spec.permuted:
        raise ShardError(f"{layer}: the columns of a {spec.name} weight are stored in another order, so they cannot be divided "
                         "among devices; pack it in a format without one, or split the layer by rows of the weight")  # fmt: skip
    if size % (devices * unit):
        whole = f"{size} = {devices} × {size / devices:g}"
        raise ShardError(f"{layer}: the {n}×{k} weight in {spec.name} has {whole} {what}; each of {devices} devices must get a "
                         f"multiple of {unit}, for tiles and groups stay whole: take another number of devices, a format with "
                         "smaller groups, or leave the layer whole")  # fmt: skip
    return (n // devices, k) if split == COLUMN else (n, k // devices)


def shard(weight: QuantizedTensor, split: str, rank: int, devices: int, layer: str = "weight") -> QuantizedTensor:
    """The part of ``weight`` that device ``rank`` holds, in memory of its own: the same codes and scales, none rounded again.

    Raises :class:`ShardError` with the sizes where groups or tiles would have to be cut.
    """
    spec = weight.scheme.format
    n, k = share(spec, *weight.nk, split, devices, layer)
    stored, columns = weight.planes[: len(spec.parts)], weight.planes[len(spec.parts) :]
    if split == COLUMN:
        planes = [plane.chunk(devices)[rank] for plane in stored] + columns
    else:
        planes = columns_of(spec, stored, rank * k, (rank + 1) * k)
        planes += [plane[rank * k : (rank + 1) * k] for plane in columns]
    return weight.with_planes([plane.clone() for plane in planes], (k, n) if weight.transposed else (n, k))
