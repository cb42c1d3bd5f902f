"""Models in the layouts of compressed-tensors and GPTQ, for their own libraries, transformers and vLLM.

Codes and scales are written as they are: a format is exported where such a layout stands for the same values, and refused
where it does not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, UnsupportedCheckpointError
from ..tensor import QuantizedTensor
from .export_compressed import compressed_layer, compressed_settings
from .export_gptq import gptq_layer, gptq_settings
from .models import Place, places
from .save import whole, write_config, write_safetensors

Encode = Callable[[str, QuantizedTensor], tuple[dict[str, Any], dict[str, torch.Tensor]]]
Settings = Callable[[list[tuple[str, dict[str, Any]]], list[str]], dict[str, Any]]
LAYOUTS: dict[str, tuple[Encode, Settings]] = {
    "compressed-tensors": (compressed_layer, compressed_settings),
    "gptq": (gptq_layer, gptq_settings),
}
"""Layout → what encodes a layer, and what makes the configuration's settings of all layers and of the linear layers left."""


def export(model: Any, folder: Path, layout: str) -> Path:
    """Writes ``model.safetensors`` and ``config.json`` in ``layout``; returns the former.

    Raises :class:`UnsupportedCheckpointError` naming the layer whose format or place in the model the layout does not have.
    """
    if layout not in LAYOUTS:
        raise CheckpointError(f"layout={layout!r}: use None or one of {', '.join(LAYOUTS)}")
    if not hasattr(model, "config") or folder.suffix == ".safetensors":
        raise CheckpointError(f"layout={layout!r} is for Hugging Face models, and its path a directory; found {folder}")
    encode, settings = LAYOUTS[layout]
    tensors: dict[str, torch.Tensor] = {}
    layers: list[tuple[str, dict[str, Any]]] = []
    left: list[str] = []
    for place in places(model):
        name, value = place.names[0], place.tensor.detach()
        if not isinstance(value, QuantizedTensor):
            tensors[name] = whole(value)
            left += [n.removesuffix(".weight") for n, s in zip(place.names, place.slots, strict=False) if _is_linear(s.module, n)]
            continue
        layer = _layer_of(place, layout)
        kind, parts = encode(layer, value)
        layers.append((layer, kind))
        tensors |= {f"{layer}.{end}": whole(t) for end, t in parts.items()}
    made = settings(layers, left)
    file = folder / "model.safetensors"
    write_safetensors(tensors, file, {"format": "pt"})
    write_config(model, folder, made)
    return file


def _is_linear(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name.endswith(".weight")


def _layer_of(place: Place, layout: str) -> str:
    """The name of the one linear layer that has a packed weight."""
    name = place.names[0]
    if len(place.slots) != 1 or not _is_linear(place.slots[0].module, name):
        kinds = ", ".join(sorted({type(s.module).__name__ for s in place.slots}))
        raise UnsupportedCheckpointError(f"{name}: packed in {kinds}; {layout} packs linear layers that share no weight. Leave "
                                         "it in float by a policy rule")  # fmt: skip
    return name.removesuffix(".weight")
