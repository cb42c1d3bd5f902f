"""``generate`` in its ways over the trained decoder, compiled by one line: token for token as uncompiled."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import models
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import GenerationConfig, LlamaForCausalLM, TextIteratorStreamer
from transformers.generation.candidate_generator import AssistedCandidateGenerator

import qcompile

PROMPTS = ("def read(self, path):\n    ", "import os\n", "class A")
SETTINGS: dict[str, Any] = {"max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "padding": {"do_sample": False},
}


@pytest.fixture(autouse=True)
def fresh(fresh_dynamo: None) -> Iterator[None]:
    yield


@functools.cache
def _packed() -> LlamaForCausalLM:
    model = models.trained_decoder()[0]
    qcompile.quantize_(model, torch.ones(1, 4, dtype=torch.long), policy="int4")
    return model


def packed() -> LlamaForCausalLM:
    """The decoder in int4, uncompiled."""
    return copy.deepcopy(_packed())


def compiled() -> LlamaForCausalLM:
    """The float decoder under one line: the first call packs it."""
    model = models.trained_decoder()[0]
    model.forward = torch.compile(model.forward, backend="qcompile", options={"policy": "int4"})
    return model


@functools.cache
def prompts(count: int) -> dict[str, torch.Tensor]:
    """The first prompts, padded on the left."""
    tokenizer = models.trained_decoder()[1]
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    found = tokenizer(list(PROMPTS[:count]), return_tensors="pt", padding=True)
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def tokens(model: LlamaForCausalLM, way: str, **settings: Any) -> torch.Tensor:
    torch.manual_seed(5)
    found: torch.Tensor = model.generate(**prompts(3 if way == "padding" else 1), **WAYS[way], **SETTINGS, **settings)
    return found


@pytest.mark.parametrize("cache", ["static", pytest.param("dynamic", marks=models.GROWING_PADDED)])
def test_tokens_are_those_of_the_uncompiled_model(cache: str) -> None:
    """One way after the other over one model: up to three graphs for the first, few for other batches, none again."""
    model, reference = compiled(), packed()
    graphs = {}
    for way in ("greedy", "sampling", "beams", "padding", "greedy"):
        expected = tokens(reference, way, cache_implementation=cache)
        assert torch.equal(tokens(model, way, cache_implementation=cache), expected), way
        graphs[way] = counters["stats"]["unique_graphs"]
    assert graphs["sampling"] <= 3 and graphs["padding"] <= 8 and graphs["greedy"] == graphs["padding"], graphs
    assert not counters["graph_break"]


@pytest.mark.parametrize("how", ["uncompiled", "compiled"])
@pytest.mark.parametrize("target", ["float", "int4"])
def test_a_packed_draft_assists(target: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are the target's alone; a draft in int4 guesses most of what its float model says, and itself exactly."""
    counted: list[tuple[int, int]] = []
    update = AssistedCandidateGenerator.update_candidate_strategy

    def count(self: Any, ids: torch.Tensor, scores: torch.Tensor, matches: int) -> None:
        counted.append((int(matches), scores.shape[1] - 1))
        update(self, ids, scores, matches)

    monkeypatch.setattr(AssistedCandidateGenerator, "update_candidate_strategy", count)
    settings = {**SETTINGS, "max_new_tokens": 24, "do_sample": False}
    float_model = models.trained_decoder()[0]
    alone = (float_model if target == "float" else packed()).generate(**prompts(1), **settings)
    draft, model = (packed(), packed()) if how == "uncompiled" else (compiled(), compiled())
    assisted = (float_model if target == "float" else model).generate(**prompts(1), assistant_model=draft, **settings)
    assert torch.equal(assisted, alone)
    accepted = sum(m for m, _ in counted) / sum(n for _, n in counted)
    print(f"{how}, int4 draft, {target} target: {accepted:.0%} of the draft's tokens were accepted")
    assert accepted == 1 if target == "int4" else accepted >= 0.5
    assert not counters["graph_break"]


@pytest.mark.parametrize("made", [packed, compiled])
def test_tokens_are_streamed_as_they_come(made: Callable[[], LlamaForCausalLM]) -> None:
    model, tokenizer = made(), models.trained_decoder()[1]
    expected = tokenizer.decode(tokens(packed(), "greedy")[0])
    streamer = TextIteratorStreamer(tokenizer, timeout=120)
    thread = threading.Thread(target=tokens, args=(model, "greedy"), kwargs={"streamer": streamer})
    thread.start()
    parts = list(streamer)
    thread.join()
    assert "".join(parts) == expected and sum(map(bool, parts)) > 1


@pytest.mark.parametrize("made", [packed, compiled])
def test_continuous_batching(made: Callable[[], LlamaForCausalLM]) -> None:
    """Requests of unlike lengths over transformers' paged cache: each gets what it gets alone."""
    model = made()
    lines = [models.trained_decoder()[1](text).input_ids for text in PROMPTS]
    config = GenerationConfig(do_sample=False, **SETTINGS)
    found = model.generate_batch(inputs=lines, generation_config=config, progress_bar=False)
    alone = [packed().generate(torch.tensor([ids]), generation_config=config)[0].tolist() for ids in lines]
    assert sorted(f.prompt_ids + f.generated_tokens for f in found.values()) == sorted(alone)
