"""torchao's safetensors: for each packed parameter ``layer.weight`` the tensors ``layer._weight_qdata``, ``…_scale``, …, and
in the header what class they make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import CorruptCheckpointError, UnsupportedCheckpointError
from .files import Stored, TensorFiles, parse_json
from .fp4 import mxfp4_weight, nvfp4_weight
from .fp8 import fp8_weight
from .integers import Integers, integer_weight
from .weight import Checkpoint, Weight, part, plain

NAMES = "tensor_names"
CLASSES = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor", "NVFP4Tensor", "MXTensor")


def is_torchao(files: TensorFiles) -> bool:
    return NAMES in files.metadata


def read(files: TensorFiles, settings: Mapping[str, Any]) -> Checkpoint:
    """The weights of a torchao checkpoint: its int8, intx, float8, NVFP4 and MXFP4 tensors.

    Activations stay in the model's dtype where the class would quantize them. Raises :class:`UnsupportedCheckpointError` for
    other classes, :class:`CorruptCheckpointError` naming the tensor that does not fit.
    """
    if not is_torchao(files):
        raise CorruptCheckpointError(f"{files.path}: its header has no {NAMES!r}; save it as safetensors with torchao")
    names = parse_json(files.metadata[NAMES], f"{files.path}: {NAMES}")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CorruptCheckpointError(f"{files.path}: expected a list of names as {NAMES!r}")
    weights, taken = {}, set()
    for name in names:
        weights[name] = _parameter(name, files)
        taken |= {s.name for s in weights[name].sources}
    weights |= {name: plain(stored) for name, stored in files.tensors.items() if name not in taken and name not in weights}
    return Checkpoint("torchao", weights)


def _parameter(name: str, files: TensorFiles) -> Weight:
    entry = parse_json(files.metadata.get(name, "null"), f"{name}: header entry")
    kind = entry.get("_type") if isinstance(entry, dict) else None
    if kind == "Tensor":
        if name not in files.tensors:
            raise CorruptCheckpointError(f"{name}: listed in the header, but not in the file")
        return plain(files.tensors[name])
    if kind not in CLASSES:
        raise UnsupportedCheckpointError(f"{name}: torchao's {kind} is not read; {', '.join(CLASSES)} are")
    layer, _, own = name.rpartition(".")
    prefix = f"{layer}._{own}_"
    data, ends = entry.get("_data"), entry.get("_tensor_data_names")
    if not isinstance(data, dict) or not isinstance(ends, list):
        raise CorruptCheckpointError(f"{name}: expected '_data' and '_tensor_data_names' in its header entry")
    parts = {str(e): files.tensors[f"{prefix}{e}"] for e in ends if f"{prefix}{e}" in files.tensors}
    if data.get("is_swizzled_scales") or "act_pre_scale" in parts:
        raise UnsupportedCheckpointError(f"{name}: swizzled scales and scaled inputs are not read; save it without them")
    return _weight(name, str(kind), data, parts)


def _weight(name: str, kind: str, data: Mapping[str, Any], parts: Mapping[str, Stored]) -> Weight:
    codes, scale = part(name, parts, "qdata"), part(name, parts, "scale")
    if kind == "Float8Tensor":
        return fp8_weight(codes, scale)
    if kind == "NVFP4Tensor":
        if "per_tensor_scale" not in parts:
            raise UnsupportedCheckpointError(f"{name}: NVFP4 without a scale for the tensor is not read")
        return nvfp4_weight(codes, scale, parts["per_tensor_scale"], inverse=False)
    if kind == "MXTensor":
        element = _dtype(data.get("elem_dtype"))
        if element != "float4_e2m1fn_x2" or data.get("block_size") != 32:
            raise UnsupportedCheckpointError(f"{name}: MX of {element} in blocks of {data.get('block_size')!r} is not read")
        return mxfp4_weight(codes, scale)
    bits = 8 if kind == "Int8Tensor" else _bits(name, data)
    n, k = codes.expect(torch.int8, None, None).shape
    zero = parts.get("zero_point")
    if zero is not None and zero.dtype == torch.int8 and not bool(zero.read().any()):
        return integer_weight(Integers(codes, n, k, bits), scale, more=(zero,))
    return integer_weight(Integers(codes, n, k, bits), scale, zero)


def _dtype(value: Any) -> str:
    return str(value.get("_data")) if isinstance(value, dict) else str(value)


def _bits(name: str, data: Mapping[str, Any]) -> int:
    said = _dtype(data.get("target_dtype"))
    if said not in {f"int{bits}" for bits in range(2, 9)}:
        raise UnsupportedCheckpointError(f"{name}: integers of type {said!r} are not read; int2 to int8 are")
    return int(said.removeprefix("int"))
