"""Models as GGUF files for llama.cpp: planes back into blocks, names and order of rows as its own converter writes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType
from torch import nn

from ..errors import CheckpointError, UnsupportedCheckpointError
from ..formats import find
from ..tensor import QuantizedTensor
from .gguf_blocks import BLOCKS, row_bytes, to_blocks
from .gguf_header import FLOATS, Header, Tensor, read_header
from .gguf_models import ARCHITECTURES, COMMON, MODEL_TYPES, Architecture, architecture_of, gguf_names, to_pairs
from .gguf_read import IN_CONFIG, ROPE
from .models import Place, places
from .save import written

FLOAT_TYPES = {dtype: name for name, dtype in FLOATS.items()}


@dataclass(frozen=True)
class Output:
    """One tensor to write: its type, its shape as numpy has it (bytes of rows, if packed), and what makes its bytes."""

    name: str
    type: str
    shape: tuple[int, ...]
    place: Place | None = None
    source: Tensor | None = None


def write_gguf(model: Any, path: Path, like: str | Path | None = None) -> Path:
    """Writes a Hugging Face model of one of :data:`~qcompile.checkpoints.gguf_models.ARCHITECTURES`; returns ``path``.

    Packed parameters must be in a type of GGUF. Float ones are written in their dtype, vectors in float32. With ``like``, a
    GGUF of the same model, all metadata (tokenizer and all), the order of tensors, types of floats and tensors that are no
    parameters are taken from it; without it the file has the configuration, and no vocabulary. Raises
    :class:`UnsupportedCheckpointError` naming the parameter that GGUF has no type for.
    """
    header = read_header(Path(like)) if like is not None else None
    name, architecture = _architecture(model, header)
    outputs = _ordered(list(_outputs(model, name, header)), header)
    written(path, lambda file: _write(file, model, name, architecture, header, outputs))
    return path


def _architecture(model: Any, header: Header | None) -> tuple[str, Architecture]:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    name = MODEL_TYPES.get(str(kind))
    if name is None:
        raise UnsupportedCheckpointError(f"model_type {kind!r} is not written as GGUF; {', '.join(MODEL_TYPES)} are")
    every, kinds = ARCHITECTURES[name].windows, getattr(model.config, "layer_types", None)
    if every and kinds is not None and any((kind == "full_attention") != (i % every == 0) for i, kind in enumerate(kinds, 1)):
        raise UnsupportedCheckpointError(f"a GGUF of {name!r} has no place for these windows: every layer but the {every}th, "
                                         f"{2 * every}th, … has one; found {kinds}")  # fmt: skip
    if header is not None and architecture_of(header)[0] != name:
        raise CheckpointError(f"like={header.path}: is a {architecture_of(header)[0]!r}, the model a {name!r}")
    return name, ARCHITECTURES[name]


def _outputs(model: Any, name: str, header: Header | None) -> Iterator[Output]:
    found = places(model)
    names = gguf_names(name, model.config.num_hidden_layers, [n for place in found for n in place.names])
    for place in found:
        theirs = next((names[n] for n in place.names if n in names), None)
        if theirs is None:
            raise UnsupportedCheckpointError(f"{place.names[0]}: has no name in a GGUF of {name!r}")
        tensor = place.tensor
        if isinstance(tensor, QuantizedTensor):
            kind = _type_of(tensor, place.names[0])
            yield Output(theirs, kind, row_bytes(kind, *tensor.nk), place)
            continue
        old = header.tensors.get(theirs) if header is not None else None
        kind = old.type if old is not None and old.type in FLOATS else ("F32" if tensor.dim() == 1 else _float_type(tensor))
        yield Output(theirs, kind, tuple(tensor.shape), place)
    if header is not None:
        for tensor_name in (ROPE, *IN_CONFIG):
            if tensor_name in header.tensors:
                kept = header.tensors[tensor_name]
                yield Output(tensor_name, kept.type, kept.shape, source=kept)


def _type_of(tensor: QuantizedTensor, name: str) -> str:
    """The GGUF type of a packed weight."""
    spec = tensor.scheme.format
    for kind in BLOCKS:
        known = find(kind)
        if known is not None and known.fingerprint == spec.fingerprint and not tensor.transposed and tensor.dim() == 2:
            return kind
    raise UnsupportedCheckpointError(f"{name}: GGUF has no type for {tensor}; quantize with one of {', '.join(BLOCKS)}, or a "
                                     "policy like 'Q4_K_M'")  # fmt: skip


def _float_type(tensor: torch.Tensor) -> str:
    return FLOAT_TYPES.get(tensor.dtype, "F32")


def _ordered(outputs: list[Output], header: Header | None) -> list[Output]:
    """In the order of ``header``, those it lacks at the end."""
    if header is None:
        return outputs
    order = {name: i for i, name in enumerate(header.tensors)}
    return sorted(outputs, key=lambda o: order.get(o.name, len(order)))


def _write(
    file: Path, model: Any, name: str, architecture: Architecture, header: Header | None, outputs: list[Output]
) -> None:
    writer = gguf.GGUFWriter(file, name)
    if header is not None:
        for key, value in header.metadata.items():
            if key not in ("general.architecture", "general.alignment"):
                held = value.value.tolist() if isinstance(value.value, np.ndarray) else value.value
                writer.add_key_value(key, held, value.type, value.item)
    else:
        for key, kind, value in _metadata(model, name, architecture, outputs):
            writer.add_key_value(key, value, kind)
    for output in outputs:
        size = int(np.prod(output.shape)) * (FLOATS[output.type].itemsize if output.type in FLOATS else 1)
        dtype = np.dtype(np.uint8) if output.type not in FLOATS else np.dtype(np.float32)
        writer.add_tensor_info(output.name, output.shape, dtype, size, GGMLQuantizationType[output.type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for output in outputs:
        writer.write_tensor_data(_bytes(output, model, architecture))
    writer.close()


def _metadata(
    model: Any, name: str, architecture: Architecture, outputs: list[Output]
) -> Iterator[tuple[str, GGUFValueType, Any]]:
    """(key, type, value) of a configuration, as :func:`~qcompile.checkpoints.gguf_models.config_of` reads them back."""
    config, whole, real, text = model.config, GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING
    for ours, key in COMMON.items():
        yield f"{name}.{key}", whole, int(getattr(config, ours))
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    key, ours = architecture.epsilon
    yield f"{name}.{key}", real, float(getattr(config, ours))
    for key in ("attention.key_length", "attention.value_length"):
        yield f"{name}.{key}", whole, head
    frequencies = _frequencies(model)
    yield f"{name}.rope.dimension_count", whole, 2 * len(frequencies)
    yield f"{name}.rope.freq_base", real, _theta(config, frequencies)
    yield f"{name}.vocab_size", whole, config.vocab_size
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, key, None) is not None:
            yield f"{name}.{key}", real, float(getattr(config, key))
    if getattr(config, "sliding_window", None) is not None:
        yield f"{name}.attention.sliding_window", whole, config.sliding_window
    yield "tokenizer.ggml.model", text, "none"
    yield "general.quantization_version", whole, 2


def _frequencies(model: nn.Module) -> torch.Tensor:
    """float32 [d/2] of the rotary embedding, of layers without a window where there are two."""
    for module in model.modules():
        for name in ("inv_freq", "full_attention_inv_freq"):
            found = module._buffers.get(name)
            if found is not None:
                return found.float().cpu()
    raise UnsupportedCheckpointError("the model has no rotary embedding; write it with like=, a GGUF of the same model")


def _theta(config: Any, frequencies: torch.Tensor) -> float:
    """The base of plain rotary embeddings. Raises :class:`UnsupportedCheckpointError` for stretched ones."""
    theta = _said_theta(config)
    usual = theta ** -(torch.arange(len(frequencies), dtype=torch.float64) / len(frequencies))
    if not torch.allclose(frequencies.double(), usual, rtol=1e-4):
        raise UnsupportedCheckpointError("the model stretches its rotary embedding; write it with like=, a GGUF that says how")
    return theta


def _said_theta(config: Any) -> float:
    parameters = getattr(config, "rope_parameters", None)
    if isinstance(parameters, dict) and "full_attention" in parameters:
        parameters = parameters["full_attention"]
    theta = parameters.get("rope_theta") if isinstance(parameters, dict) else getattr(config, "rope_theta", None)
    return float(theta) if theta is not None else 10000.0


def _bytes(output: Output, model: Any, architecture: Architecture) -> np.ndarray[Any, Any]:
    """The bytes of a tensor: uint8 rows of blocks, or floats as bytes."""
    if output.place is None:
        assert output.source is not None
        return output.source.stored.read().contiguous().reshape(-1).view(torch.uint8).numpy()
    tensor, heads = output.place.tensor, _paired_heads(output.name, model.config) if architecture.pairs else None
    if isinstance(tensor, QuantizedTensor):
        data = to_blocks(output.type, [p.cpu() for p in tensor.planes], *tensor.nk)
    else:
        value = tensor.detach().cpu().to(torch.float32)
        if architecture.plus_one and output.name.endswith("norm.weight"):
            value = value + 1
        data = value.to(FLOATS[output.type])
    data = data if heads is None else to_pairs(data, heads)
    return data.contiguous().reshape(-1).view(torch.uint8).numpy()


def _paired_heads(name: str, config: Any) -> int | None:
    kind = name.split(".")[2] if name.startswith("blk.") else ""
    return {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(kind)
