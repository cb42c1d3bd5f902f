"""``qcompile.load``: which layout a file has, and the model with its weights in place."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, CorruptCheckpointError, MissingTensorError, UnsupportedCheckpointError, nearest
from ..recorder import recorder_of
from . import own, torchao
from .attach import attach, fitted
from .files import TensorFiles, open_safetensors, parse_json, read_json
from .models import build
from .weight import Checkpoint, plain

Reader = Callable[[TensorFiles, Mapping[str, Any]], Checkpoint]
"""(files, the quantization's settings in the configuration) → what they hold. Reads headers only."""

READERS: dict[str, str] = {
    "gptq": "gptq", "awq": "awq", "compressed-tensors": "compressed_tensors", "fbgemm_fp8": "fp8", "fp8": "fp8",
    "modelopt": "modelopt", "bitsandbytes": "bitsandbytes", "torchao": "torchao",
}  # fmt: skip
"""``quant_method`` of a configuration → the module here whose ``read`` is its :data:`Reader`."""


def load(
    path: str | Path, model: nn.Module | None = None, *, dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:  # fmt: skip
    """Loads a quantized checkpoint, packed as it is, into ``model`` (None: the Hugging Face model of the file's
    configuration, in eval mode); returns the model.

    ``path``: a ``.gguf`` file, or a safetensors file or directory: of :func:`qcompile.save`, or in the layout of GPTQ, AWQ,
    bitsandbytes, compressed-tensors, FP8 (fbgemm, fine-grained, ModelOpt), torchao, or float. A given model may lie on the
    meta device; its parameters are replaced. ``dtype``: of float parameters and of what packed ones decode to (None: as the
    file, else the model, says; float32 for GGUF). ``device``: where to put it (None: the CPU).

    Files are mapped, and one weight at a time is read and repacked: memory is the packed model and one weight. Raises
    subclasses of :class:`~qcompile.errors.CheckpointError` that name the tensor: nothing missing, unused or out of bounds
    passes.
    """
    place = torch.device(device) if device is not None else None
    checkpoint = open_checkpoint(Path(path))
    if model is None:
        if checkpoint.config is None:
            raise MissingTensorError(f"{path}: no config.json beside it; build the model yourself and pass it as model=")
        model = build(checkpoint.config, dtype, checkpoint.weights, lambda empty: fitted(empty, checkpoint))
        _generation(model, Path(path))
        from .hf import adopt  # it imports transformers

        adopt(model)
    attach(model, checkpoint, dtype, place)
    if checkpoint.adjust is not None:
        checkpoint.adjust(model)
    if place is not None:
        model.to(place)
    if checkpoint.plan is not None:
        recorder_of(model).add(*checkpoint.plan)
    return model


def open_checkpoint(path: Path) -> Checkpoint:
    """What ``path`` holds, from its headers and configuration alone. Raises as :func:`load` does."""
    if _is_gguf(path):
        from . import gguf_read

        return gguf_read.read(path)
    files = open_safetensors(path)
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    if config is not None and not isinstance(config, dict):
        raise CorruptCheckpointError(f"{folder / 'config.json'}: expected a JSON object")
    return replace(_read(files, folder, config or {}), config=config)


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _read(files: TensorFiles, folder: Path, config: Mapping[str, Any]) -> Checkpoint:
    if own.is_own(files):
        return own.read(files)
    settings = _settings(files, folder, config)
    if settings is None:
        return Checkpoint("float", {name: plain(t) for name, t in files.tensors.items()})
    method = settings.get("quant_method")
    if not isinstance(method, str) or method not in READERS:
        raise UnsupportedCheckpointError(f"{folder}: quant_method {method!r} has no reader. {nearest(str(method), READERS)}")
    reader: Reader = importlib.import_module(f"{__package__}.{READERS[method]}").read
    return reader(files, settings)


def _settings(files: TensorFiles, folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings of the quantization, wherever its tool puts them; None for a float checkpoint."""
    text = config.get("text_config")
    for holder in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if holder.get(key) is not None:
                return _with_method(holder[key], None, folder)
    for name, method in (("hf_quant_config.json", "modelopt"), ("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if (folder / name).is_file():
            return _with_method(read_json(folder / name), method, folder)
    return {"quant_method": "torchao"} if torchao.is_torchao(files) else None


def _with_method(settings: Any, method: str | None, folder: Path) -> dict[str, Any]:
    if not isinstance(settings, dict):
        raise CorruptCheckpointError(f"{folder}: expected an object as its quantization's settings, found {str(settings)[:80]}")
    return settings if method is None else {**settings, "quant_method": method}


def _generation(model: nn.Module, path: Path) -> None:
    """The checkpoint's own defaults of ``generate``, where it has them."""
    file = (path if path.is_dir() else path.parent) / "generation_config.json"
    if path.suffix == ".gguf" or not file.is_file() or not hasattr(model, "generation_config"):
        return
    import transformers

    content = parse_json(file.read_bytes(), str(file))
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected a JSON object")
    model.generation_config = transformers.GenerationConfig.from_dict(content)
