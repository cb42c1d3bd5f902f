"""What do packed keys and values do to a model? The trained decoder on held-out text, through caches and through attention in low
precision; and the tokens that it writes by itself.

Of two models that write greedily, each goes on from its own tokens: where one finds another token likeliest, all that follows
differs. The trained decoder is so unsure of its words that bfloat16 alone, in place of float32, changes a fifth of them, so that
what a cache adds cannot be told. So it also learns one passage by heart, and goes on from beginnings of it: as sure as large models
are of what they write. ``likeliest`` is the probability that the float model gives its own tokens.
"""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import training
from transformers import DynamicCache, LlamaForCausalLM

from qcompile.hf_cache import packed_, switch_

CACHES: dict[str, Any] = {
    **{name: name for name in ("fp8", "fp8_e4m3", "int8", "int4")}, "keys int8, values int4": ("int8", "int4"),
}
ATTENTION = ("fp8", "int8")
WINDOWS, BATCH = 64, 8
PASSAGE, STEPS = 40_000, 600
"""Tokens that are learnt by heart, and in how many steps."""
PROMPTS, PROMPT, NEW = 64, 32, 64
"""Beginnings, their tokens, and how many follow."""


def _through(model: LlamaForCausalLM, rows: torch.Tensor, formats: Any = None, rule: str | None = None) -> torch.Tensor:
    """Logits of windows ``rows``, as log-probabilities: through a cache of ``formats``, or attention computed as ``rule`` says."""
    found = []
    call = model
    if rule is not None:
        torch._dynamo.reset()
        options = {"policy": {"*.self_attn": rule, "*": "float"}, "strict": True}
        call = torch.compile(copy.deepcopy(model), backend="qcompile", options=options)
    for group in rows.split(BATCH):
        cache = None if rule is not None else DynamicCache(config=model.config)
        if formats is not None:
            packed_(cache, formats)
        found.append(call(group[:, :-1].contiguous(), past_key_values=cache, use_cache=rule is None).logits.float())
    return torch.cat(found).log_softmax(-1)


def _held_out(model: LlamaForCausalLM, ids: torch.Tensor) -> list[dict[str, Any]]:
    """Perplexity over the float cache's, divergence from it in nats a token, and how often the same token is likeliest; bfloat16."""
    starts = torch.linspace(0, len(ids) - training.WINDOW - 1, WINDOWS).long()
    rows = ids[starts[:, None] + torch.arange(training.WINDOW + 1)]
    model = copy.deepcopy(model).bfloat16()
    exact = _through(model, rows)
    switched = switch_(copy.deepcopy(model), "fp8")
    ways = {f"cache, {name}": _through(switched, rows, formats) for name, formats in CACHES.items()}
    ways |= {f"attention, {name}": _through(model, rows, rule=name) for name in ATTENTION}
    targets = rows[:, 1:].flatten()
    loss = F.nll_loss(exact.flatten(0, 1), targets)
    return [{"decoder": "held-out text", "way": name, "perplexity over float": math.exp(F.nll_loss(own.flatten(0, 1), targets) - loss) - 1,
             "KL": float(F.kl_div(own, exact, reduction="none", log_target=True).sum(-1).mean()),
             "agreement": float((own.argmax(-1) == exact.argmax(-1)).float().mean())} for name, own in ways.items()]  # fmt: skip


def _written(model: Any, prompts: torch.Tensor) -> torch.Tensor:
    ids = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW,
                         pad_token_id=0)  # fmt: skip
    return ids[:, PROMPT:]


def _greedy(name: str, model: LlamaForCausalLM, ids: torch.Tensor) -> list[dict[str, Any]]:
    """``agreement``: part of the tokens that are those of the same model with a float cache; in bfloat16, and in float32."""
    starts = torch.linspace(0, len(ids) - PROMPT - NEW - 1, PROMPTS).long()
    prompts = ids[starts[:, None] + torch.arange(PROMPT)]
    narrow = copy.deepcopy(model).bfloat16()
    exact = {dtype: _written(copy.deepcopy(own), prompts) for dtype, own in (("bf16", narrow), ("fp32", model))}
    logits = model(torch.cat([prompts, exact["fp32"]], 1)).logits[:, PROMPT - 1 : -1]
    likeliest = float(logits.softmax(-1).amax(-1).mean())
    rows = [{"decoder": name, "way": "float cache, bfloat16 for float32", "likeliest": likeliest,
             "agreement": float((exact["bf16"] == exact["fp32"]).float().mean())}]  # fmt: skip
    for way, formats in CACHES.items():
        found = {dtype: _written(switch_(copy.deepcopy(own), formats), prompts) for dtype, own in (("bf16", narrow), ("fp32", model))}
        same = {dtype: float((found[dtype] == exact[dtype]).float().mean()) for dtype in found}
        rows.append({"decoder": name, "way": f"cache, {way}", "agreement": same["bf16"], "agreement, float32": same["fp32"]})
    return rows


def run() -> list[dict[str, Any]]:
    """Rows for held-out text, then for what each decoder writes."""
    model, tokenizer, text = training.trained_decoder()
    held_out = training.encode(tokenizer, [text])
    with torch.no_grad():
        rows = _held_out(model, held_out) + _greedy("writing on from held-out text", model, held_out)
    passage = training.encode(tokenizer, training.split(training.standard_library())[0])[-PASSAGE:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.SEED)
        training.train(model, passage, STEPS)
    with torch.no_grad():
        return rows + _greedy("writing on by heart", model, passage)
