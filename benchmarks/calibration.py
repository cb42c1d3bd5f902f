"""What does calibration win back? The trained decoder, as it is and with outlier channels, and the sentence encoder, over three
draws of samples: perplexity and divergence on all held-out text, distance of embeddings."""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qcompile
from qcompile.formats import get

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import encoder as encoder_example
import training
from calibration import CALIBRATION
from sentences import SENTENCES

SAMPLES, SEEDS = 256, (0, 1, 2)
"""Windows of training text that methods look at, and seeds of their draws."""

WINDOWS, COMPARED = 400, 24
"""Windows of held-out text for the perplexity (nearly all there is), and for the divergence."""

FACTOR = 50.0
OUTLIERS = (3, 77, 130, 201)
"""Channels of the residual stream whose norms are made larger by the factor, and the weights behind them smaller."""

PLAIN = {"int4": ("gptq", "awq", "awq+gptq"), "int3_g128": ("gptq", "awq"), "Q4_K_M": ("imatrix", "gptq"), "Q2_K": ("gptq",)}
PLANTED = {"int4": ("gptq", "awq"), "int3_g128": ("gptq", "awq"), "int8_dynamic": ("smoothquant",)}
ENCODER = {"int4": ("gptq", "awq"), "int3_g128": ("gptq", "awq")}

Loss = Callable[[nn.Module], dict[str, float]]
"""Losses of a packed model by name, each 0 for the float one."""


class DecoderLoss:
    """How far a decoder's perplexity on held-out text is above the float one's, and its mean KL(float ‖ packed), nats a token."""

    def __init__(self, model: nn.Module, held_out: torch.Tensor) -> None:
        self.ids = held_out
        starts = torch.linspace(0, len(held_out) - training.WINDOW - 1, COMPARED).long()
        self.rows = held_out[starts[:, None] + torch.arange(training.WINDOW)]
        self.expected = self._logits(model)
        self.perplexity = training.perplexity(model, held_out, WINDOWS)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        divergence = (self.expected.exp() * (self.expected - self._logits(model))).sum(-1).mean()
        return {"perplexity": training.perplexity(model, self.ids, WINDOWS) - self.perplexity, "KL": float(divergence)}

    def _logits(self, model: nn.Module) -> torch.Tensor:
        return torch.cat([model(input_ids=r, use_cache=False).logits.log_softmax(-1) for r in self.rows.split(8)])


class EncoderLoss:
    """Mean squared distance of embeddings, which have length 1, to the float ones of sentences that no method saw."""

    def __init__(self, model: nn.Module) -> None:
        self.batch = encoder_example.tokenize(list(SENTENCES))
        self.expected = model(**self.batch)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        return {"distance²": float((model(**self.batch) - self.expected).square().sum(1).mean())}


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


def windows(ids: torch.Tensor, seed: int, count: int = SAMPLES) -> list[dict[str, Any]]:
    """``count`` windows of the training text ``ids``, drawn by ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(ids) - training.WINDOW, (count,), generator=generator).tolist()
    return [{"input_ids": ids[s : s + training.WINDOW][None], "use_cache": False} for s in starts]


def draws(tokenizer: Any, count: int = SAMPLES) -> list[list[dict[str, Any]]]:
    """``count`` windows of the training text for each of the seeds."""
    trained, _ = training.split(training.standard_library())
    ids = training.encode(tokenizer, trained)
    return [windows(ids, seed, count) for seed in SEEDS]


def samples(tokenizer: Any, count: int = SAMPLES) -> list[dict[str, Any]]:
    """The first of the :func:`draws`, where one is enough."""
    return draws(tokenizer, count)[0]


def sentences(seed: int) -> list[dict[str, torch.Tensor]]:
    """Batches of eight of most of the sentences that are there to calibrate the encoder."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [CALIBRATION[i] for i in torch.randperm(len(CALIBRATION), generator=generator).tolist()]
    return [encoder_example.tokenize(drawn[at : at + 8]) for at in range(0, len(drawn) * 3 // 4, 8)]


def rows_of(name: str, model: nn.Module, loss: Loss, drawn: Sequence[list[Any]], cases: Any) -> list[dict[str, Any]]:
    """One row a policy and method: losses of rounding to nearest, by range alone and by search, and over the samples ``drawn``
    the mean loss and the shares of both that are won back."""
    rows = []
    for policy, methods in cases.items():
        nearest = loss(packed(model, policy, drawn[0][0]))
        ranges = by_range(policy, model)
        plain = loss(packed(model, ranges, drawn[0][0])) if ranges is not None else {}
        for method in methods:
            began = time.perf_counter()
            calibrated = [qcompile.calibrate(model, data, policy=policy, method=method, progress=False) for data in drawn]
            seconds = (time.perf_counter() - began) / len(drawn)
            found = [loss(packed(model, c, drawn[0][0])) for c in calibrated]
            for kind, before in nearest.items():
                lost = [f[kind] for f in found]
                row = {"model": name, "policy": policy, "method": method, "loss": kind, "nearest": before,
                       "calibrated": statistics.mean(lost), "won back": 1 - statistics.mean(lost) / before,
                       "low": 1 - max(lost) / before, "high": 1 - min(lost) / before, "seconds": seconds}  # fmt: skip
                if plain:
                    row |= {"nearest by range": plain[kind], "of that": 1 - statistics.mean(lost) / plain[kind]}
                rows.append(row)
    return rows


def by_range(policy: str, model: nn.Module) -> Any:
    """``policy`` with scales that follow from the range of a group, as rounding to nearest is usually meant; None where a format
    has no such scales."""
    if policy not in ("int4", "int3_g128"):
        return None
    spec = get("int4_g128" if policy == "int4" else policy)
    plain = replace(spec, name=f"{spec.name}_by_range", shrinks=())
    return {"lm_head": "int8", "*": plain} if policy == "int4" and hasattr(model, "lm_head") else plain


def packed(model: nn.Module, policy: Any, inputs: dict[str, Any]) -> nn.Module:
    """A copy, packed in eager mode; ``inputs`` are any that it takes."""
    made = copy.deepcopy(model)
    qcompile.quantize_(made, policy=policy, **inputs)
    return made


@torch.no_grad()
def run() -> list[dict[str, Any]]:
    """Rows of all models; see :func:`rows_of`."""
    model, tokenizer, text = training.trained_decoder()
    held_out, data = training.encode(tokenizer, [text]), draws(tokenizer)
    rows = rows_of("decoder", model, DecoderLoss(model, held_out), data, PLAIN)
    encoder = encoder_example.load()
    rows += rows_of("encoder", encoder, EncoderLoss(encoder), [sentences(seed) for seed in SEEDS], ENCODER)
    planted = with_outliers(model)
    return rows + rows_of("decoder with outlier channels", planted, DecoderLoss(planted, held_out), data[:1], PLANTED)
