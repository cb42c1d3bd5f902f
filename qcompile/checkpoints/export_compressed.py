"""A packed layer as compressed-tensors has it; see :mod:`qcompile.checkpoints.compressed_tensors` for the layout."""

from __future__ import annotations

import json
from typing import Any

import torch

from ..errors import UnsupportedCheckpointError
from ..formats import ROW, FormatSpec, get
from ..formats.layout import by_plane
from ..tensor import QuantizedTensor
from .families import Integers, integers
from .weight import rows_of
from .words import from_nibbles, pack_stream

ACTIVATIONS = {"int8": "int", "fp8": "float"}


def compressed_layer(name: str, weight: QuantizedTensor) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(entry of ``config_groups`` without its targets, tensors by the end of their names) of a layer. Raises
    :class:`UnsupportedCheckpointError` naming the layer for a format that compressed-tensors has no equal of."""
    spec, (n, k) = weight.scheme.format, weight.nk
    planes = [p.cpu() for p in weight.planes]
    family = integers(spec)
    if family is not None and not family.permuted and not weight.transposed:
        layout, args, tensors = _integers(family, spec, planes, n, k)
    elif spec.fingerprint in _FLOATS and not weight.transposed:
        layout, args, tensors = _FLOATS[spec.fingerprint](spec, planes, n, k)
    else:
        raise UnsupportedCheckpointError(f"{name}: compressed-tensors has nothing equal to {spec.name}; it has integers with "
                                         "whole zero points or none ('int4_sym_g128', 'int4_zp_g128', 'int8'), fp8, nvfp4, mxfp4")
    return {"weights": args, "input_activations": _activations(weight), "format": layout}, tensors


def _activations(weight: QuantizedTensor) -> dict[str, Any] | None:
    if weight.scheme.activations is None:
        return None
    return _args(8, ACTIVATIONS[weight.scheme.activations], "token") | {"dynamic": True}


Made = tuple[str, dict[str, Any], dict[str, torch.Tensor]]


def _args(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": False, **more}


def _integers(family: Integers, spec: FormatSpec, planes: list[torch.Tensor], n: int, k: int) -> Made:
    entries = rows_of(spec, planes, 0, n)
    groups = 1 if family.group == ROW else -(-k // family.group)
    scale = entries["scale"][:, :groups]
    args = _args(family.bits, "int", "channel" if groups == 1 else "group", symmetric=not family.zeros,
                 group_size=None if groups == 1 else family.group)  # fmt: skip
    codes = entries[spec.code.name][:, :k]
    if spec.code.dtype == "i8":
        if groups == 1:
            return "int-quantized", args, {"weight": codes.contiguous(), "weight_scale": scale}
        codes = codes.view(torch.uint8) ^ 128
    tensors = {"weight_packed": pack_stream(codes, family.bits), "weight_scale": scale, "weight_shape": torch.tensor([n, k])}
    if family.zeros:
        zeros = entries["zero"][:, :groups]
        if int(zeros.max()) >= 2**family.bits:
            raise UnsupportedCheckpointError(f"a zero point of {int(zeros.max())} has no place in {family.bits} bits")
        tensors["weight_zero_point"] = pack_stream(zeros.t().contiguous(), family.bits).t()
    return "pack-quantized", args, tensors


def _fp8(spec: FormatSpec, planes: list[torch.Tensor], n: int, k: int) -> Made:
    entries = rows_of(spec, planes, 0, n)
    plane = spec.scales[0]
    scale = entries["scale"]
    if plane.rows == 0:
        args, scale = _args(8, "float", "tensor"), scale[:1].reshape(1)
    elif plane.rows == 1:
        args = _args(8, "float", "channel")
    else:
        args = _args(8, "float", "block", block_structure=[plane.rows, plane.per])
        scale = scale[:: plane.rows, : -(-k // plane.per)]
    return "float-quantized", args, {"weight": entries["q"][:, :k].contiguous().view(torch.float8_e4m3fn), "weight_scale": scale}


def _nvfp4(spec: FormatSpec, planes: list[torch.Tensor], n: int, k: int) -> Made:
    entries = rows_of(spec, planes, 0, n)
    top = by_plane(spec, planes)["top"][0].flatten()[:1]
    tensors = {"weight_packed": from_nibbles(entries["q"][:, :k]), "weight_scale": entries["s"][:, : k // 16].contiguous()
               .view(torch.float8_e4m3fn), "weight_global_scale": 1 / top}  # fmt: skip
    return "nvfp4-pack-quantized", _args(4, "float", "tensor_group", group_size=16), tensors


def _mxfp4(spec: FormatSpec, planes: list[torch.Tensor], n: int, k: int) -> Made:
    entries = rows_of(spec, planes, 0, n)
    args = _args(4, "float", "group", group_size=32, scale_dtype="torch.uint8", zp_dtype="torch.uint8")
    return "mxfp4-pack-quantized", args, {"weight_packed": from_nibbles(entries["q"][:, :k]),
                                         "weight_scale": entries["s"][:, : k // 32]}  # fmt: skip


_FLOATS = {get(name).fingerprint: make for name, make in (
    ("fp8_e4m3", _fp8), ("fp8_e4m3_tensor", _fp8), ("fp8_e4m3_b128", _fp8), ("nvfp4", _nvfp4), ("mxfp4", _mxfp4),
)}  # fmt: skip


def compressed_settings(layers: list[tuple[str, dict[str, Any]]], left: list[str]) -> dict[str, Any]:
    """``quantization_config`` of compressed-tensors: a group for each kind of layer, its layers by name."""
    groups: dict[str, dict[str, Any]] = {}
    for name, kind in layers:
        groups.setdefault(json.dumps(kind, sort_keys=True), {**kind, "targets": []})["targets"].append(name)
    layouts = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups.values())},
        "ignore": left,
    }
