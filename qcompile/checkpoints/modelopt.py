"""NVIDIA ModelOpt's checkpoints: FP8 with one scale for a tensor, and NVFP4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UnsupportedCheckpointError
from .files import Stored, TensorFiles
from .fp4 import nvfp4_weight
from .fp8 import fp8_weight
from .weight import Checkpoint, Weight, by_layer, part

ALGORITHMS = ("FP8", "NVFP4")


def read(files: TensorFiles, settings: Mapping[str, Any]) -> Checkpoint:
    """The weights of a ModelOpt checkpoint, whose settings are in ``config.json`` or ``hf_quant_config.json``.

    FP8: ``weight`` e4m3 [N, K] · ``weight_scale``. NVFP4: ``weight`` uint8 [N, K/2] · ``weight_scale`` e4m3 [N, K/16] ·
    ``weight_scale_2``. Raises :class:`UnsupportedCheckpointError` for other algorithms.
    """
    inner = settings.get("quantization")
    algorithm = (inner if isinstance(inner, dict) else settings).get("quant_algo")
    if algorithm not in ALGORITHMS:
        raise UnsupportedCheckpointError(f"ModelOpt with quant_algo={algorithm!r} is not read; {' and '.join(ALGORITHMS)} are")

    def layer(name: str, parts: Mapping[str, Stored]) -> Weight:
        weight, scale = part(name, parts, "weight"), part(name, parts, "weight_scale")
        if "weight_scale_2" not in parts:
            return fp8_weight(weight, scale)
        return nvfp4_weight(weight, scale, parts["weight_scale_2"], inverse=False)

    return by_layer("modelopt", files, ("weight_scale",), ("weight", "weight_scale_2"), layer)
