"""What do packed keys and values do to a model? The trained decoder on held-out text, through caches and through attention in low
precision; and the tokens that it writes by itself.

Of two models that write greedily, each goes on from its own tokens: where one finds another token likeliest, all that follows
differs. The trained decoder is so unsure of its words that bfloat16 in place of float32 changes a fifth of them, so that what a
cache adds cannot be told. So it also learns a passage by heart, and goes on from beginnings of it: as sure as large models are of
what they write. ``likeliest`` is the probability that the float model gives its own tokens.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import training
from transformers import DynamicCache, LlamaForCausalLM

from qcompile.hf_cache import packed_, switch_

from . import readme
from .attention import FORMATS, bytes_over_bf16

ATTENTION = ("fp8", "int8")
WINDOWS, BATCH = 64, 8
PASSAGE, STEPS = 40_000, 600
"""Tokens that are learnt by heart, and in how many steps."""
PROMPTS, PROMPT, NEW = 64, 32, 64
"""Beginnings, their tokens, and how many follow."""
HELD_OUT, UNSURE, BY_HEART = "held-out text", "writes on from held-out text", "writes on by heart"


def _cached(model: LlamaForCausalLM, rows: torch.Tensor, formats: Any) -> torch.Tensor:
    """Log-probabilities of windows ``rows`` through a cache of ``formats`` (None: a float cache)."""
    found = []
    for group in rows.split(BATCH):
        cache = DynamicCache(config=model.config)
        if formats is not None:
            packed_(cache, formats)
        found.append(model(group[:, :-1].contiguous(), past_key_values=cache).logits.float())
    return torch.cat(found).log_softmax(-1)


def _computed(model: LlamaForCausalLM, rows: torch.Tensor, name: str) -> torch.Tensor:
    """The same, of attention that is computed in format ``name``, without a cache."""
    torch._dynamo.reset()
    options = {"policy": {"*.self_attn": name, "*": "float"}, "strict": True}
    compiled = torch.compile(copy.deepcopy(model), backend="qcompile", options=options)
    found = [compiled(group[:, :-1].contiguous(), use_cache=False).logits.float() for group in rows.split(BATCH)]
    return torch.cat(found).log_softmax(-1)


def _held_out(model: LlamaForCausalLM, ids: torch.Tensor) -> list[dict[str, Any]]:
    """In bfloat16, over a float cache: perplexity, divergence in nats a token, and how often the same token is likeliest."""
    starts = torch.linspace(0, len(ids) - training.WINDOW - 1, WINDOWS).long()
    rows = ids[starts[:, None] + torch.arange(training.WINDOW + 1)]
    model = copy.deepcopy(model).bfloat16()
    exact, targets = _cached(model, rows, None), rows[:, 1:].flatten()
    switched = switch_(copy.deepcopy(model), "fp8")
    ways = {f"cache {name}": _cached(switched, rows, formats) for name, formats in FORMATS.items()}  # type: ignore[arg-type]
    ways |= {f"attention {name}": _computed(model, rows, name) for name in ATTENTION}
    loss = F.nll_loss(exact.flatten(0, 1), targets)
    return [{"text": HELD_OUT, "way": way, "over float": math.exp(F.nll_loss(own.flatten(0, 1), targets) - loss) - 1,
             "KL": float(F.kl_div(own, exact, reduction="none", log_target=True).sum(-1).mean()),
             "agreement": float((own.argmax(-1) == exact.argmax(-1)).float().mean())} for way, own in ways.items()]  # fmt: skip


def _written(model: Any, prompts: torch.Tensor) -> torch.Tensor:
    ids = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=NEW,
                         min_new_tokens=NEW, pad_token_id=0)  # fmt: skip
    return ids[:, PROMPT:]


def _greedy(text: str, model: LlamaForCausalLM, ids: torch.Tensor) -> list[dict[str, Any]]:
    """``agreement``: part of the tokens that are those of the same model with a float cache; in bfloat16, and in float32."""
    starts = torch.linspace(0, len(ids) - PROMPT - NEW - 1, PROMPTS).long()
    prompts = ids[starts[:, None] + torch.arange(PROMPT)]
    models = {"bf16": copy.deepcopy(model).bfloat16(), "fp32": model}
    exact = {dtype: _written(copy.deepcopy(own), prompts) for dtype, own in models.items()}
    logits = model(torch.cat([prompts, exact["fp32"]], 1)).logits[:, PROMPT - 1 : -1]
    rows = [{"text": text, "way": "bfloat16 for float32", "likeliest": float(logits.softmax(-1).amax(-1).mean()),
             "agreement": float((exact["bf16"] == exact["fp32"]).float().mean())}]  # fmt: skip
    for name, formats in FORMATS.items():
        found = {dtype: _written(switch_(copy.deepcopy(own), formats), prompts) for dtype, own in models.items()}
        same = {dtype: float((found[dtype] == exact[dtype]).float().mean()) for dtype in models}
        rows.append({"text": text, "way": f"cache {name}", "agreement": same["bf16"], "agreement, float32": same["fp32"]})
    return rows


def run() -> list[dict[str, Any]]:
    """Rows for held-out text, then for what each decoder writes."""
    model, tokenizer, text = training.trained_decoder()
    held_out = training.encode(tokenizer, [text])
    with torch.no_grad():
        rows = _held_out(model, held_out) + _greedy(UNSURE, model, held_out)
    passage = training.encode(tokenizer, training.split(training.standard_library())[0])[-PASSAGE:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.SEED)
        training.train(model, passage, STEPS)
    with torch.no_grad():
        return rows + _greedy(BY_HEART, model, passage)


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """README's table of the caches."""
    found = {(row["text"], row["way"]): row for row in rows}
    lines = ["| cache | bytes, heads of 128 | perplexity | KL, nats | same token likeliest | same text, by heart |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for name in FORMATS:
        held, heart = (found[text, f"cache {name}"] for text in (HELD_OUT, BY_HEART))
        lines.append(f"| {name} | {bytes_over_bf16(name, 8192):.3f} | {100 * held['over float']:+.2f} % | {held['KL']:.4f} | "
                     f"{100 * held['agreement']:.1f} % | {100 * heart['agreement']:.1f} % |")  # fmt: skip
    return "\n".join(lines) + "\n"


def publish(rows: Iterable[Mapping[str, Any]]) -> None:
    """Puts the table of ``rows`` into README."""
    readme.put("caches", table(rows))
