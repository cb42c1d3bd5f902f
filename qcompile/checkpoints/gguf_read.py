"""GGUF files: their blocks become planes bit for bit, their names those of the Hugging Face model."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, CorruptCheckpointError, MissingTensorError, UnsupportedCheckpointError
from ..formats import Scheme, find
from .gguf_blocks import BLOCKS
from .gguf_header import FLOATS, Header, Tensor, read_header
from .gguf_models import Architecture, architecture_of, config_of, gguf_names, to_halves
from .repack import repack_blocks
from .weight import Checkpoint, Weight, valid_scales

ROPE = "rope_freqs.weight"
IN_CONFIG = {f"rope_factors_{n}.weight": "in the configuration" for n in ("long", "short")}
SPLIT = re.compile(r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")


def read(path: Path) -> Checkpoint:
    """The tensors of a GGUF file under their own names, the configuration of its Hugging Face model, and how names of the
    model's parameters become those of tensors. A file that is one of several (``…-00001-of-00003.gguf``) stands for all.

    Raises :class:`UnsupportedCheckpointError` for architectures and types that are not read, :class:`CorruptCheckpointError`
    naming the tensor that does not fit, :class:`MissingTensorError` for a missing part.
    """
    header = _whole(path)
    name, architecture = architecture_of(header)
    config = config_of(header)
    used = {n: why for n, why in IN_CONFIG.items() if n in header.tensors}
    weights = {t.name: _weight(t, architecture, config) for t in header.tensors.values() if t.name not in used}
    rope = weights.pop(ROPE, None)
    if rope is not None:
        if rope.scheme is not None or len(rope.shape) != 1:
            raise CorruptCheckpointError(f"{ROPE}: expected a vector of floats, found {rope.scheme} {list(rope.shape)}")
        used[ROPE] = "divides the frequencies of the rotary embedding"

    def named(parameters: list[str]) -> dict[str, str]:
        return gguf_names(name, config["num_hidden_layers"], parameters)

    adjust = None if rope is None else lambda model: _divide_frequencies(model, rope, float(config["rope_theta"]))
    return Checkpoint("GGUF", weights, config, used, adjust=adjust, named=named)


def _whole(path: Path) -> Header:
    """The header of a file, or of all parts of one that was split."""
    match = SPLIT.fullmatch(path.name)
    if match is None:
        header = read_header(path)
        if header.get("split.count", 0) not in (0, 1):
            raise MissingTensorError(f"{path}: is one of {header.get('split.count')} parts, which are found by their names: "
                                     "…-00001-of-0000N.gguf")  # fmt: skip
        return header
    count = int(match["count"])
    paths = [path.with_name(f"{match['stem']}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    if lost := [p.name for p in paths if not p.is_file()]:
        raise MissingTensorError(f"{lost[0]}: not beside {path.name}; {len(lost)} of {count} parts are missing")
    parts = [read_header(p) for p in paths]
    tensors: dict[str, Tensor] = {}
    for part in parts:
        if twice := sorted(tensors.keys() & part.tensors.keys()):
            raise CorruptCheckpointError(f"{twice[0]}: two parts hold it, {part.path} is the second")
        tensors |= part.tensors
    return replace(parts[0], tensors=tensors)


def _weight(tensor: Tensor, architecture: Architecture, config: dict[str, Any]) -> Weight:
    heads = _paired_heads(tensor.name, config) if architecture.pairs else None
    if heads is not None and tensor.shape[0] % (2 * heads):
        raise CorruptCheckpointError(f"{tensor.name}: {tensor.shape[0]} rows are not {heads} heads of pairs")
    if tensor.type in FLOATS:
        minus = 1.0 if architecture.plus_one and tensor.name.endswith("norm.weight") else 0.0
        return Weight(tensor.shape, (tensor.stored,), lambda: _floats(tensor, heads, minus))
    if tensor.type not in BLOCKS or len(tensor.shape) != 2:
        raise UnsupportedCheckpointError(f"{tensor.name}: {tensor.type} of {len(tensor.shape)} dimensions is not read; matrices "
                                         f"of {', '.join(BLOCKS)} are. Quantize it again with llama.cpp")  # fmt: skip
    spec = find(tensor.type)
    assert spec is not None
    n, k = tensor.shape

    def planes() -> list[torch.Tensor]:
        data = tensor.stored.read()
        data = data if heads is None else to_halves(data, heads)
        return valid_scales(tensor.name, spec, repack_blocks(tensor.name, tensor.type, data, n, k))

    return Weight((n, k), (tensor.stored,), planes, Scheme(spec))


def _paired_heads(name: str, config: dict[str, Any]) -> int | None:
    match = re.fullmatch(r"blk\.\d+\.attn_(q|k)\.(weight|bias)", name)
    if match is None:
        return None
    return int(config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"])


def _floats(tensor: Tensor, heads: int | None, minus: float) -> torch.Tensor:
    value = tensor.stored.read()
    value = to_halves(value, heads) if heads is not None else value.clone()
    return value - minus if minus else value


def _divide_frequencies(model: nn.Module, rope: Weight, theta: float) -> None:
    """Llama 3.1's rotary embedding: its frequencies θ^(−2i/d) are divided by factors that are in no configuration of a GGUF. A
    model whose frequencies are so already, by a configuration of its own, stays as it is."""
    factors = rope.read()
    assert isinstance(factors, torch.Tensor)
    if not (torch.isfinite(factors).all() and (factors > 0).all()):
        raise CorruptCheckpointError(f"{ROPE}: factors must be positive, found {factors.min()} to {factors.max()}")
    count = len(factors)
    usual = theta ** -(torch.arange(0, 2 * count, 2, dtype=torch.float32) / (2 * count))
    for name, module in model.named_modules():
        held = module._buffers.get("inv_freq")
        if held is None:
            continue
        if held.shape != factors.shape:
            raise CheckpointError(f"{ROPE}: {count} factors, {name}.inv_freq has {list(held.shape)}")
        if torch.allclose(held, usual, rtol=1e-5):
            for buffer in ("inv_freq", "original_inv_freq"):
                if module._buffers.get(buffer) is not None:
                    module._buffers[buffer] = usual / factors
        elif not torch.allclose(held, usual / factors, rtol=1e-3):
            raise CheckpointError(f"{ROPE}: {name}.inv_freq of the model are neither θ^(−2i/d) nor those divided by the factors")
