"""``qcompile.save``: a model's parameters as they are, packed or float, into one file."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ..errors import CheckpointError
from ..formats import Scheme
from ..owners import unwrapped
from ..recorder import recorder_of
from ..tensor import QuantizedTensor
from . import own
from .models import places


def save(model: nn.Module, path: str | Path, *, layout: str | None = None, like: str | Path | None = None) -> Path:
    """Writes ``model`` to ``path``; returns the file that holds the tensors. Nothing is pickled.

    A directory gets ``model.safetensors``, and ``config.json`` for a Hugging Face model; a path that ends in ``.safetensors``
    is the file itself; one that ends in ``.gguf`` is written for llama.cpp. The header holds the declaration of every format
    and the plan, so :func:`qcompile.load` reads it on any device and PyTorch release, formats of the user's own as well.

    ``layout``: None, or ``"compressed-tensors"`` or ``"gptq"``: a directory that their own libraries and transformers load.
    ``like``: a GGUF file of the same model, whose metadata (tokenizer, name, …) a GGUF takes over. Raises
    :class:`~qcompile.errors.UnsupportedCheckpointError` naming the parameter whose format a layout has no place for.
    """
    model, path = unwrapped(model), Path(path)
    if path.suffix == ".gguf":
        from .gguf_write import write_gguf

        return write_gguf(model, path, like)
    if like is not None:
        raise CheckpointError(f"like={like!r} goes with a path that ends in .gguf, found {path}")
    if layout is not None:
        from .exports import export

        return export(model, path, layout)
    file = path if path.suffix == ".safetensors" else path / "model.safetensors"
    tensors, entry = flattened(model)
    write_safetensors(tensors, file, {"format": "pt", own.KEY: entry})
    if file != path:
        _write_config(model, path)
    return file


def flattened(model: nn.Module) -> tuple[dict[str, torch.Tensor], str]:
    """Every parameter and persistent buffer by name, once (planes as ``name.plane``), and the header's entry for them."""
    tensors: dict[str, torch.Tensor] = {}
    packed: dict[str, tuple[Scheme, tuple[int, ...], bool, torch.dtype]] = {}
    tied: dict[str, str] = {}
    for place in places(model):
        name, *others = place.names
        tied |= dict.fromkeys(others, name)
        value = place.tensor.detach()
        if value.device.type == "meta":
            raise CheckpointError(f"{name}: is on the meta device, without values; load the model first")
        if isinstance(value, QuantizedTensor):
            packed[name] = (value.scheme, tuple(value.shape), value.transposed, value.dtype)
            found = {f"{name}.{p}": t for p, t in zip(value.scheme.format.part_names, value.planes, strict=True)}
        else:
            found = {name: value}
        if clash := sorted(set(found) & set(tensors)):
            raise CheckpointError(f"{clash[0]}: is both a parameter and a plane of another; rename the parameter")
        tensors |= {n: whole(t) for n, t in found.items()}
    return tensors, own.describe(packed, tied, recorder_of(model).plan)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` contiguous and alone in its storage, as safetensors asks."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def write_safetensors(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Writes beside ``file`` first, and moves it there when it is whole."""
    written(file, lambda temporary: save_file(tensors, temporary, metadata))


def written(file: Path, write: Callable[[Path], Any]) -> None:
    """Has ``write`` fill a new file, which takes the place of ``file`` once it is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    os.close(handle)
    try:
        write(Path(name))
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, file)
    finally:
        Path(name).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_config(model: nn.Module, folder: Path) -> None:
    """``config.json`` of a Hugging Face model, with this layout's mark in it."""
    if not hasattr(model, "config") or not hasattr(model.config, "to_dict"):
        return
    write_config(model, folder, {"quant_method": own.KEY})


def write_config(model: Any, folder: Path, quantization: dict[str, Any]) -> None:
    """``config.json`` and ``generation_config.json`` of a Hugging Face model with the settings of a ``quantization``."""
    config = json.loads(model.config.to_json_string(use_diff=True))
    config["architectures"] = [type(model).__name__]
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if getattr(model, "generation_config", None) is not None:
        (folder / "generation_config.json").write_text(model.generation_config.to_json_string(use_diff=True))
