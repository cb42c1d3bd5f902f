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


@torch.no_grad()
def run() -> list[dict[str, Any]]:
    """A row a case: perplexity and KL divergence from the float model by gptqmodel (``peer``) and by qcompile in the same format;
    of GPTQ also the error of layers' outputs, ours over theirs. (AWQ's of the peer are of other weights: it folds factors into
    the layers before.)"""
    if importlib.util.find_spec("gptqmodel") is None:
        return [{"missing": "gptqmodel is not installed"}]
    model, tokenizer, text = training.trained_decoder()
    data = samples(tokenizer, SAMPLES)
    loss, inputs = DecoderLoss(model, training.encode(tokenizer, [text])), inputs_of(model, data)
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
        if method == "gptq":
            mine, peers = errors(model, ours, inputs), errors(model, theirs, inputs)
            ratios = [mine[name] / peers[name] for name in peers]
            row |= {"layers": len(ratios), "error peer": statistics.mean(peers.values()),
                    "error ours": statistics.mean(mine[n] for n in peers), "worst ratio": max(ratios),
                    "error ratio": math.exp(statistics.mean(map(math.log, ratios)))}  # fmt: skip
        rows.append(row)
    return rows
