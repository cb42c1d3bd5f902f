"""compressed-tensors (llm-compressor, vLLM): integers packed or not, FP8, NVFP4 and MXFP4.

What a layer is follows from its tensors: ``weight_packed`` int32 [N, …] with ``weight_shape`` (codes of a row as a stream of
bits, 2^(bits−1) added; releases before 0.13 left the rest of each word unused where 32 is no multiple of bits), or uint8
[N, K/2] (e2m1), or ``weight`` int8 or float8 [N, K]; ``weight_scale`` [N, G], [N, 1] or [1], ``weight_zero_point``,
``weight_global_scale``, ``weight_g_idx``. weight = scale · (code − zero point).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..errors import CorruptCheckpointError, UnsupportedCheckpointError
from .files import Stored, TensorFiles
from .fp4 import mxfp4_weight, nvfp4_weight
from .fp8 import fp8_weight
from .integers import Integers, integer_weight
from .weight import Checkpoint, Weight, by_layer, part

LAYOUTS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
           "mxfp4-pack-quantized", "mixed-precision", "dense")  # fmt: skip
ENDS = ("weight", "weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale")


def read(files: TensorFiles, settings: Mapping[str, Any]) -> Checkpoint:
    """The weights of a compressed-tensors checkpoint. Raises :class:`UnsupportedCheckpointError` for other layouts (sparse
    ones among them), :class:`CorruptCheckpointError` naming the tensor that does not fit."""
    groups = [g for g in _objects(settings.get("config_groups")) if isinstance(g, dict)]
    layouts = [x for x in (settings.get("format"), *(g.get("format") for g in groups)) if x is not None]
    if odd := sorted(str(x) for x in layouts if x not in LAYOUTS):
        raise UnsupportedCheckpointError(f"compressed-tensors layout {odd[0]!r} is not read; {', '.join(LAYOUTS)} are")
    sparsity = settings.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise UnsupportedCheckpointError(f"compressed-tensors sparsity {sparsity.get('format')!r} is not read; save it dense")
    if settings.get("transform_config"):
        raise UnsupportedCheckpointError("compressed-tensors with transforms (rotations of activations) is not read")
    said = [w.get("num_bits") for g in groups if isinstance(w := g.get("weights"), dict)]
    bits = sorted({b for b in said if type(b) is int and 2 <= b <= 8})

    def layer(name: str, parts: Mapping[str, Stored]) -> Weight:
        return _layer(name, parts, bits)

    return by_layer("compressed-tensors", files, ("weight_scale",), ENDS, layer)


def _objects(value: Any) -> Iterator[Any]:
    return iter(value.values()) if isinstance(value, dict) else iter(())


def _layer(name: str, parts: Mapping[str, Stored], bits: list[int]) -> Weight:
    scale = part(name, parts, "weight_scale")
    if "weight_packed" not in parts:
        weight = part(name, parts, "weight")
        if weight.dtype.is_floating_point:
            return fp8_weight(weight, scale)
        n, k = weight.expect(torch.int8, None, None).shape
        return integer_weight(Integers(weight, n, k, 8), scale, parts.get("weight_zero_point"), parts.get("weight_g_idx"))
    packed = parts["weight_packed"]
    if packed.dtype == torch.uint8:
        if "weight_global_scale" in parts:
            return nvfp4_weight(packed, scale, parts["weight_global_scale"], inverse=True)
        return mxfp4_weight(packed, scale)
    shape = part(name, parts, "weight_shape")
    codes = _packed_codes(packed, shape, bits)
    return integer_weight(codes, scale, parts.get("weight_zero_point"), parts.get("weight_g_idx"), (shape,))


def _packed_codes(packed: Stored, shape: Stored, bits: list[int]) -> Integers:
    """Which of the configuration's numbers of bits gives words of that width."""
    shape.expect((torch.int64, torch.int32), 2)
    n, k = shape.read().tolist()
    words = packed.expect(torch.int32, None, None).shape[1]
    if n != packed.shape[0] or not 0 < k <= 32 * words:
        raise CorruptCheckpointError(f"{shape.name}: says {n}×{k}, but {packed.name} is {list(packed.shape)}")
    dense = [b for b in bits if -(-k * b // 32) == words]
    loose = [b for b in bits if -(-k // (32 // b)) == words and b not in dense]
    if len(dense) + len(loose) != 1:
        known = " or ".join(map(str, bits)) or "an unknown number of"
        raise CorruptCheckpointError(f"{packed.name}: {list(packed.shape)} does not tell {n}×{k} codes of {known} bits")
    return Integers(packed, n, k, (dense or loose)[0], bool(dense))
