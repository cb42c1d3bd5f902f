"""Does calibration fit layers as well as gptqmodel's own GPTQ and AWQ, on one model, the same data, and in the same format?

gptqmodel quantizes in a process of its own and writes a checkpoint, which is read here. It is optional:
``pip install --no-deps gptqmodel`` and what it asks for when it is imported.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qcompile
from qcompile.tensor import QuantizedTensor

from .calibration import DecoderLoss, packed, samples, training

SAMPLES = 64
"""Windows of training text that both look at."""

CASES = (("gptq", 4, False), ("gptq", 3, False), ("awq", 4, False))
"""Method, bits and whether zero points stay in the middle; groups of 128."""

PEER = """
import json, sys
import torch
from gptqmodel import GPTQModel, QuantizeConfig

method, bits, symmetric, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True", sys.argv[4]
awq = {"quant_method": "awq", "format": "gemm"} if method == "awq" else {}
settings = QuantizeConfig(bits=bits, group_size=128, sym=symmetric, desc_act=False, device="cpu", **awq)
rows = json.load(open(f"{folder}/data.json"))
data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
model = GPTQModel.load(f"{folder}/float", settings, dtype=torch.float16 if method == "awq" else torch.float32)
model.quantize(data, batch_size=1)
model.save(f"{folder}/packed")
"""


def by_peer(model: Any, tokenizer: Any, data: Sequence[dict[str, Any]], case: tuple[str, int, bool]) -> nn.Module:
    """What gptqmodel makes of a copy of ``model``, read by qcompile, in float32."""
    method, bits, symmetric = case
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/float")
        tokenizer.save_pretrained(f"{folder}/float")
        Path(folder, "data.json").write_text(json.dumps([item["input_ids"][0].tolist() for item in data]))
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "GPTQMODEL_CPU_WORKERS": "2"}
        command = [sys.executable, "-W", "ignore", "-c", PEER, method, str(bits), str(symmetric), folder]
        subprocess.run(command, env=env, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        return qcompile.load(f"{folder}/packed").float()


def inputs_of(model: nn.Module, data: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What every linear layer of the float model is given, ``[rows, K]``, by parameter name."""
    found: dict[str, list[torch.Tensor]] = {}
    hooks = [m.register_forward_pre_hook(lambda _, x, name=f"{n}.weight": found.setdefault(name, []).append(x[0].flatten(0, -2)))
             for n, m in model.named_modules() if isinstance(m, nn.Linear)]  # fmt: skip
    for item in data:
        model(**item)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def errors(floats: nn.Module, model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """‖x(ŵ − w)ᵀ‖ / ‖xwᵀ‖ of every packed linear layer, on the float model's own inputs."""
    found = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, QuantizedTensor) and name in inputs:
            weight = floats.get_parameter(name)
            wanted = inputs[name] @ weight.t()
            found[name] = float((inputs[name] @ (parameter.dequantize().float() - weight).t()).norm() / wanted.norm())
    return found


HALVES = (("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp"))
"""The norm and the module behind it, of both halves of a decoder layer."""

Given = tuple[torch.Tensor, dict[str, Any]]


def halves_of(model: Any, data: Sequence[dict[str, Any]]) -> dict[tuple[int, str, str], list[Given]]:
    """What the halves of all decoder layers are given in the float model: the input of the norm, the settings of the module."""
    found: dict[tuple[int, str, str], list[Given]] = {}

    def watch(key: tuple[int, str, str], norm: nn.Module, module: nn.Module) -> list[Any]:
        seen: list[torch.Tensor] = []

        def given(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            settings = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            found.setdefault(key, []).append((seen.pop(), settings))

        return [norm.register_forward_pre_hook(lambda _, x: seen.append(x[0])),
                module.register_forward_pre_hook(given, with_kwargs=True)]  # fmt: skip

    hooks = [hook for i, layer in enumerate(model.model.layers) for norm, module in HALVES
             for hook in watch((i, norm, module), getattr(layer, norm), getattr(layer, module))]  # fmt: skip
    for item in data:
        model(**item)
    for hook in hooks:
        hook.remove()
    return found


def half_errors(floats: Any, model: Any, given: Mapping[tuple[int, str, str], Sequence[Given]]) -> list[float]:
    """‖ŷ − y‖ / ‖y‖ of the output y of each half of a layer, on the float model's own inputs: also where factors were folded
    into the norm, or into the layers between."""

    def output(layer: nn.Module, norm: str, module: str, x: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
        out = getattr(layer, module)(getattr(layer, norm)(x), **settings)
        return out[0] if isinstance(out, tuple) else out

    found = []
    for (i, *names), inputs in given.items():
        wanted = torch.cat([output(floats.model.layers[i], *names, *each) for each in inputs])
        got = torch.cat([output(model.model.layers[i], *names, *each) for each in inputs])
        found.append(float((got - wanted).norm() / wanted.norm()))
    return found


def compared(what: str, ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Means of both, and the mean and the worst of their ratios."""
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return {f"{what} errors": len(ratios), f"{what} error peer": statistics.mean(theirs),
            f"{what} error ours": statistics.mean(ours), f"worst {what} ratio": max(ratios),
            f"{what} ratio": math.exp(statistics.mean(map(math.log, ratios)))}  # fmt: skip


@torch.no_grad()
def run() -> list[dict[str, Any]]:
    """A row a case: perplexity and KL divergence from the float model by gptqmodel (``peer``) and by qcompile in the same format;
    errors of the outputs of both halves of each decoder layer, and of GPTQ also of single layers. (Single layers of the peer's
    AWQ cannot be compared: it folds factors into the layers before.)"""
    if importlib.util.find_spec("gptqmodel") is None:
        return [{"missing": "gptqmodel is not installed"}]
    model, tokenizer, text = training.trained_decoder()
    data = samples(tokenizer, SAMPLES)
    loss, inputs, halves = DecoderLoss(model, training.encode(tokenizer, [text])), inputs_of(model, data), halves_of(model, data)
    rows = []
    for case in CASES:
        method, bits, symmetric = case
        theirs = by_peer(model, tokenizer, data, case)
        policy = {"lm_head": "float", "*": f"int{bits}_zp_g128"}
        nearest = packed(model, policy, data[0])
        ours = packed(model, qcompile.calibrate(model, data, policy=policy, method=method, progress=False), data[0])
        row: dict[str, Any] = {"method": method, "bits": bits, "float": loss.perplexity}
        for name, each in (("nearest", nearest), ("peer", theirs), ("ours", ours)):
            lost = loss(each)
            row[name], row[f"KL {name}"] = loss.perplexity + lost["perplexity"], lost["KL"]
        row |= compared("half", half_errors(model, ours, halves), half_errors(model, theirs, halves))
        if method == "gptq":
            mine, peers = errors(model, ours, inputs), errors(model, theirs, inputs)
            row |= compared("layer", [mine[name] for name in peers], list(peers.values()))
        rows.append(row)
    return rows
