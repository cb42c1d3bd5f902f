"""What does calibration win back? Perplexity and divergence of the trained decoder, as it is and with outlier channels."""

from __future__ import annotations

import copy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qcompile

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import training

SAMPLES = 64
"""Windows of training text that methods look at."""

WINDOWS = 64
FACTOR = 50.0
OUTLIERS = (3, 77, 130, 201)
"""Channels of the residual stream whose norms are made larger by the factor, and the weights behind them smaller."""

PLAIN = {"int4": ("gptq", "awq", "awq+gptq"), "int3_g128": ("gptq", "awq", "awq+gptq"), "Q4_K_M": ("imatrix", "gptq"),
         "Q2_K": ("imatrix", "gptq"), "int8_dynamic": ("smoothquant",)}  # fmt: skip
PLANTED = {"int4": ("gptq", "awq"), "int3_g128": ("gptq", "awq"), "int8_dynamic": ("smoothquant",)}


class Measure:
    """Perplexity of a decoder over windows of held-out text, and its mean divergence KL(float ‖ packed) per token in nats."""

    def __init__(self, model: nn.Module, held_out: torch.Tensor) -> None:
        self.ids = held_out
        starts = torch.linspace(0, len(held_out) - training.WINDOW - 1, 24).long()
        self.rows = held_out[starts[:, None] + torch.arange(training.WINDOW)]
        self.expected = self._logits(model)
        self.perplexity = training.perplexity(model, held_out, WINDOWS)

    def __call__(self, model: nn.Module) -> tuple[float, float]:
        divergence = (self.expected.exp() * (self.expected - self._logits(model))).sum(-1).mean()
        return training.perplexity(model, self.ids, WINDOWS), float(divergence)

    def _logits(self, model: nn.Module) -> torch.Tensor:
        return torch.cat([model(input_ids=r, use_cache=False).logits.log_softmax(-1) for r in self.rows.split(8)])


def with_outliers(model: Any) -> Any:
    """``model`` with outlier channels; it computes the same."""
    at = list(OUTLIERS)

    def scale(norm: Any, *linears: Any) -> None:
        norm.weight[at] *= FACTOR
        for linear in linears:
            linear.weight[:, at] /= FACTOR

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        scale(layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
        scale(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
    scale(model.model.norm, model.lm_head)
    return model


def samples(tokenizer: Any) -> list[dict[str, Any]]:
    """Windows spread over a part of the training text."""
    texts, _ = training.split(training.standard_library())
    ids = training.encode(tokenizer, texts[:: max(1, len(texts) // 150)])
    starts = torch.linspace(0, len(ids) - training.WINDOW, SAMPLES).long().tolist()
    return [{"input_ids": ids[s : s + training.WINDOW][None], "use_cache": False} for s in starts]


def rows_of(name: str, model: nn.Module, held_out: torch.Tensor, data: list[Any], cases: Any) -> list[dict[str, Any]]:
    measure = Measure(model, held_out)
    rows = []
    for policy, methods in cases.items():
        nearest = measure(packed(model, policy))
        for method in methods:
            began = time.perf_counter()
            calibrated = qcompile.calibrate(model, data, policy=policy, method=method, progress=False)
            seconds = time.perf_counter() - began
            perplexity, divergence = measure(packed(model, calibrated))
            lost = (nearest[0] - perplexity) / (nearest[0] - measure.perplexity)
            rows.append({"model": name, "policy": policy, "method": method, "float": measure.perplexity, "nearest": nearest[0],
                         "perplexity": perplexity, "recovered": lost, "KL nearest": nearest[1], "KL": divergence,
                         "KL recovered": 1 - divergence / nearest[1], "seconds": seconds})  # fmt: skip
    return rows


def packed(model: nn.Module, policy: Any) -> nn.Module:
    """A copy, packed in eager mode."""
    made = copy.deepcopy(model)
    qcompile.quantize_(made, torch.zeros(1, 8, dtype=torch.long), policy=policy, use_cache=False)
    return made


@torch.no_grad()
def run() -> list[dict[str, Any]]:
    """One row a model, policy and method; ``recovered``: the share of what rounding to nearest loses."""
    model, tokenizer, text = training.trained_decoder()
    held_out, data = training.encode(tokenizer, [text]), samples(tokenizer)
    plain = rows_of("decoder", model, held_out, data, PLAIN)
    return plain + rows_of("decoder with outlier channels", with_outliers(model), held_out, data, PLANTED)
