"""What do packed keys and values do to a model? The trained decoder on held-out text, through caches and through attention in low
precision; and the tokens that it writes by itself.

The decoder is trained on, until it knows one passage by heart: half of what it then reads is that passage, half the text of
before. It writes greedily with ``generate``, after beginnings of held-out text, of whose words it is so unsure that bfloat16 in
place of float32 alone changes a fifth of them, and of the passage, of which it is sure. ``agreement`` is the part of the float
cache's tokens that a packed cache finds likeliest too when the text so far is given; for ``same text`` it goes on from its own
tokens, so that all behind a changed one differs. ``likeliest`` is the probability that the float model gives its own tokens.
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
from transformers import DynamicCache, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

from qcompile.hf_cache import packed_, switch_

from . import readme
from .attention import FORMATS, bytes_over_bf16

ATTENTION = ("fp8", "int8")
WINDOWS, BATCH = 64, 8
PASSAGE, STEPS = 20_000, 1200
"""Tokens that are learnt by heart, and in how many steps."""
PROMPTS, PROMPT, NEW = 64, 32, 64
"""Beginnings, their tokens, and how many follow."""
HELD_OUT, UNSURE, BY_HEART = "held-out text", "writes on from held-out text", "writes on by heart"
ROUNDING = "bfloat16 for float32"


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


class Retelling(LogitsProcessor):
    """Has a model write ``text`` [B, NEW] after prompts, and keeps what it would have written ``instead``, token by token."""

    def __init__(self, text: torch.Tensor) -> None:
        self.text, self.instead = text, torch.empty_like(text)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        place = input_ids.shape[1] - PROMPT
        self.instead[:, place] = scores.argmax(-1)
        return torch.full_like(scores, -math.inf).scatter_(1, self.text[:, place, None], 0.0)


def written(model: Any, prompts: torch.Tensor, *processors: LogitsProcessor) -> torch.Tensor:
    """NEW tokens that ``model`` writes after ``prompts`` [B, PROMPT]."""
    ids = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=NEW,
                         min_new_tokens=NEW, pad_token_id=0, logits_processor=LogitsProcessorList(processors))  # fmt: skip
    return ids[:, PROMPT:]


def compared(model: Any, prompts: torch.Tensor, text: torch.Tensor) -> tuple[float, float]:
    """Parts of ``text`` that ``model`` writes too: token by token with all before it given, and by itself."""
    retelling = Retelling(text)
    assert torch.equal(written(model, prompts, retelling), text)
    return float((retelling.instead == text).float().mean()), float((written(model, prompts) == text).float().mean())


def _greedy(text: str, model: LlamaForCausalLM, ids: torch.Tensor) -> list[dict[str, Any]]:
    """Against the same model with a float cache; in bfloat16, and in float32."""
    starts = torch.linspace(0, len(ids) - PROMPT - NEW - 1, PROMPTS).long()
    prompts = ids[starts[:, None] + torch.arange(PROMPT)]
    models = {"": copy.deepcopy(model).bfloat16(), ", float32": model}
    exact = {dtype: written(copy.deepcopy(own), prompts) for dtype, own in models.items()}
    logits = model(torch.cat([prompts, exact[", float32"]], 1)).logits[:, PROMPT - 1 : -1]
    agreement, same = compared(models[""], prompts, exact[", float32"])
    rows = [{"text": text, "way": ROUNDING, "likeliest": float(logits.softmax(-1).amax(-1).mean()),
             "agreement": agreement, "same text": same}]  # fmt: skip
    for name, formats in FORMATS.items():
        row: dict[str, Any] = {"text": text, "way": f"cache {name}"}
        for dtype, own in models.items():
            agreement, same = compared(switch_(copy.deepcopy(own), formats), prompts, exact[dtype])
            row |= {f"agreement{dtype}": agreement, f"same text{dtype}": same}
        rows.append(row)
    return rows


def _knowing() -> tuple[LlamaForCausalLM, torch.Tensor, torch.Tensor]:
    """The trained decoder after it has learnt a passage, text that it never read, and the passage."""
    model, tokenizer, text = training.trained_decoder()
    library = training.encode(tokenizer, training.split(training.standard_library())[0])
    passage = library[-PASSAGE:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.SEED)
        training.train(model, torch.cat([library, passage.repeat(len(library) // PASSAGE)]), STEPS)
    return model, training.encode(tokenizer, [text]), passage


def run() -> list[dict[str, Any]]:
    """Rows for held-out text, then for what the decoder writes after beginnings of it and of the passage."""
    model, held_out, passage = _knowing()
    with torch.no_grad():
        return _held_out(model, held_out) + _greedy(UNSURE, model, held_out) + _greedy(BY_HEART, model, passage)


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """README's table of the caches."""
    found = {(row["text"], row["way"]): row for row in rows}

    def shares(way: str) -> str:
        free, heart = found[UNSURE, way], found[BY_HEART, way]
        return " | ".join(f"{100 * part:.1f} %" for part in (free["agreement"], free["same text"], heart["same text"])) + " |"

    lines = ["| cache | bytes, heads of 128 | perplexity | KL, nats | same token | same text | same text, by heart |",
             "|---|---|---|---|---|---|---|", f"| float, bf16 beside float32 | 1.000 | | | {shares(ROUNDING)}"]  # fmt: skip
    for name in FORMATS:
        held = found[HELD_OUT, f"cache {name}"]
        lines.append(f"| {name} | {bytes_over_bf16(name, 8192):.3f} | {100 * held['over float']:+.2f} % | {held['KL']:.4f} | "
                     f"{shares(f'cache {name}')}")  # fmt: skip
    return "\n".join(lines) + "\n"


def publish(rows: Iterable[Mapping[str, Any]]) -> None:
    """Puts the table of ``rows`` into README."""
    readme.put("caches", table(rows))
