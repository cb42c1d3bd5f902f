"""``qcompile.parallelize_module``: tensor parallelism of a model whose weights are packed already."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .dtensor import packed_in, wrapped
from .errors import ShardError
from .owners import Owners, unwrapped
from .recorder import recorder_of
from .sharding import COLUMN, ROW, shard, split_of
from .tensor import QuantizedTensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def parallelize_module(model: nn.Module, mesh: DeviceMesh, plan: Any = None) -> nn.Module:
    """Divides a packed ``model`` among the processes of a ``mesh`` of one dimension, in place, and returns it.

    ``plan``: as ``torch.distributed.tensor.parallel.parallelize_module`` takes it, a style or styles by module name. None: by the
    roles of the layers that :func:`qcompile.quantize_` found: q, k, v, gate, up and the head by output features, o and down by
    input features. Each process keeps its part of the codes and scales, unchanged; groups and tiles of 16 rows stay whole.
    Weights in floating point are divided by PyTorch. The result runs eagerly and under ``torch.compile``.

    Raises :class:`~qcompile.errors.ShardError`, naming the layer and its sizes, for weights that cannot be divided so, for
    attention heads that cannot, and where there is no plan and no role.
    """
    from torch.distributed.tensor.parallel import parallelize_module as torchs

    root = unwrapped(model)
    if mesh.ndim != 1:
        raise ShardError(f"parallelize_module: the mesh has {mesh.ndim} dimensions; give one of them: mesh['tp']")
    styles = plan if plan is not None else plan_by_roles(root, mesh.size())
    for name, module, style in _styled(root, styles):
        _divide(name, module, style, mesh)
    torchs(root, mesh, styles)
    return model


def plan_by_roles(model: nn.Module, devices: int) -> dict[str, Any]:
    """Styles by module name from the roles that quantizing ``model`` found. Raises :class:`ShardError` without any, or where
    heads of keys and values cannot be divided among ``devices``."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    config = getattr(model, "config", None)
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None) or devices
    if heads % devices:
        raise ShardError(f"parallelize_module: {heads} heads of keys and values cannot be divided among {devices} devices; "
                         "take a number that divides them, or give a plan that leaves k_proj and v_proj whole")  # fmt: skip
    styles: dict[str, Any] = {}
    for site in recorder_of(Owners().path(model)[0]).sites():
        split = split_of(site.roles) if site.is_linear else None
        if split == ROW:
            styles[site.name] = RowwiseParallel()
        elif split == COLUMN:
            styles[site.name] = ColwiseParallel(output_layouts=Replicate() if "lm_head" in site.roles else None)
    if not styles:
        raise ShardError("parallelize_module: no layer of the model has a known role; pack it with qcompile.quantize_ first, or "
                         "give a plan: {'layers.*.up_proj': ColwiseParallel(), …}")  # fmt: skip
    return styles


def _styled(root: nn.Module, styles: Any) -> Iterator[tuple[str, nn.Module, Any]]:
    """Modules that a plan names, as PyTorch reads names: globs, part by part."""
    if not isinstance(styles, Mapping):
        yield "", root, styles
        return
    for name, module in root.named_modules():
        parts = name.split(".")
        for pattern, style in styles.items():
            globs = pattern.split(".")
            if len(globs) == len(parts) and all(map(fnmatch, parts, globs)):
                yield name, module, style


def _divide(name: str, module: nn.Module, style: Any, mesh: DeviceMesh) -> None:
    """Exchanges the packed weights of a module for this process's parts of them; those are what PyTorch then finds divided."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    for own, value in list(module.named_parameters(recurse=False)):
        tensor: torch.Tensor = value
        if not isinstance(tensor, QuantizedTensor):
            if packed_in(tensor) is not None:
                raise ShardError(f"{name}.{own}: is divided already; parallelize_module takes models of whole packed weights")
            continue
        layer = f"{name}.{own}" if name else own
        if not isinstance(style, (ColwiseParallel, RowwiseParallel)) or not isinstance(module, (nn.Linear, nn.Embedding)):
            raise ShardError(f"{layer}: {type(style).__name__} of a {type(module).__name__} does not tell how to divide a packed "
                             "weight; take ColwiseParallel or RowwiseParallel of a Linear or Embedding")  # fmt: skip
        by_rows = isinstance(style, ColwiseParallel) == isinstance(module, nn.Linear)
        part = shard(tensor, COLUMN if by_rows else ROW, mesh.get_local_rank(), mesh.size(), layer)
        placements = [Shard(0 if by_rows else 1)]
        module._parameters[own] = wrapped(part, mesh, placements, tensor.shape, tensor.stride())
