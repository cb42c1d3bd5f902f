"""Small models written as checkpoints of other tools: each linear layer of a decoder by an encoder of the layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qcompile import QuantizedTensor, load
from qcompile.formats import reference
from qcompile.rules import scheme_named
from qcompile.tensor import as_parameter, quantize

Encoder = Callable[[str, torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]]
"""(name of a layer, its float32 weight [N, K]) → the layer's tensors by the end of their names, and the float32 weight that
they stand for."""


def llama(**changes: Any) -> LlamaForCausalLM:
    """Two layers, 128 wide, float32, eval mode, always the same weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
             "num_hidden_layers": 2, "vocab_size": 160, "max_position_embeddings": 64}  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # all ones would not tell norms apart
                parameter.copy_(1 + torch.randn(parameter.shape) / 4)
    return model


def linears(model: nn.Module) -> list[str]:
    """Names of the linear layers of the decoder's blocks."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n]


def encoded(model: nn.Module, encode: Encoder) -> dict[str, torch.Tensor]:
    """The tensors of ``model`` with every linear layer of its blocks encoded; the model gets the weights they stand for."""
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    if getattr(model.config, "tie_word_embeddings", False):
        del tensors["lm_head.weight"]
    with torch.no_grad():
        for name in linears(model):
            weight = model.get_submodule(name).weight
            parts, value = encode(name, weight.detach().clone())
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{end}": t.contiguous() for end, t in parts.items()}
            weight.copy_(value)
    return tensors


def write(folder: Path, model: Any, tensors: dict[str, torch.Tensor], settings: dict[str, Any] | None) -> Path:
    """``model.safetensors`` and ``config.json`` with the ``settings`` of the quantization."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads(model.config.to_json_string())
    config["architectures"] = [type(model).__name__]
    if settings is not None:
        config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def pack(model: nn.Module, formats: dict[str, str]) -> Any:
    """``model`` with every matrix whose layer's name ends in a key packed in that format; "*": all linear layers."""
    for name, module in model.named_modules():
        ends = [e for e in formats if name.endswith(e) or (e == "*" and isinstance(module, nn.Linear))]
        value = formats[ends[0]] if ends else None
        held = getattr(module, "weight", None)
        if value is not None and isinstance(held, nn.Parameter) and held.dim() == 2 and not isinstance(held, QuantizedTensor):
            scheme, transposed = scheme_named(value), type(module).__name__ == "Conv1D"
            assert scheme is not None
            parameter = as_parameter(quantize(held, scheme, transposed=transposed))
            for slot in [m for m in model.modules() if m._parameters.get("weight") is held]:
                slot.weight = parameter
    return model


def packed(model: nn.Module) -> dict[str, QuantizedTensor]:
    return {n: p for n, p in model.named_parameters() if isinstance(p, QuantizedTensor)}


def floats(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters as float32, packed ones by the reference."""
    found = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, QuantizedTensor):
            value = reference.decode(parameter.scheme.format, parameter.planes, *parameter.nk)
            found[name] = value.t() if parameter.transposed else value
        else:
            found[name] = parameter.detach().float()
    return found


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(12).view(2, 6) * 11 % 160).logits


def check(path: Path, model: nn.Module, formats: set[str], run: bool = False, tolerance: float = 1e-6) -> nn.Module:
    """Loads ``path``; its weights are those of ``model`` and its linear layers packed in ``formats``. ``run``: also logits."""
    loaded = load(path)
    assert {p.scheme.format.name for p in packed(loaded).values()} == formats
    assert {f"{n}.weight" for n in linears(model)} <= set(packed(loaded))
    wanted = floats(model)
    for name, value in floats(loaded).items():
        assert value.shape == wanted[name].shape
        assert (value - wanted[name]).abs().max() <= tolerance * wanted[name].abs().max(), name
    if run:
        ours, theirs = logits(loaded), logits(model)
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm()
    return loaded
