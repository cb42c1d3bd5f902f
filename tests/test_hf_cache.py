"""Packed keys and values inside Hugging Face models: one option, ``generate`` in all its ways, other attention than Llama's."""

from __future__ import annotations

import copy
import math
from typing import Any

import models
import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
)

from benchmarks import caches
from qcompile import kv_cache
from qcompile.errors import OptionError
from qcompile.hf_cache import PackedDynamicLayer, PackedLayer, PackedStaticLayer, packed_, switch_

SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                         "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 96}  # fmt: skip
PADDED = torch.ones(2, 21, dtype=torch.long)
PADDED[0, :5] = 0
SETTINGS: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def prompt() -> torch.Tensor:
    return torch.randint(1, 96, (2, 21), generator=torch.Generator().manual_seed(3))


def generated(model: LlamaForCausalLM, **settings: Any) -> Any:
    return model.generate(prompt(), attention_mask=PADDED, return_dict_in_generate=True, **SETTINGS, **settings)


@pytest.mark.parametrize("cache,kind", [
    pytest.param("dynamic", PackedDynamicLayer, marks=models.GROWING_PADDED), ("static", PackedStaticLayer),
])  # fmt: skip
@pytest.mark.usefixtures("fresh_dynamo")
def test_one_option_packs_the_caches_of_generate(cache: str, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call too; one graph for the prompt and one for every step, also while the cache grows; left padding."""
    monkeypatch.setattr(kv_cache, "GROWTH", 64)
    expected = generated(switch_(llama(), "fp8")).sequences
    model = llama()
    model.forward = torch.compile(model.forward, backend="qcompile", options={"policy": "float", "kv_cache": "fp8"})
    for _ in range(2):
        out = generated(model, cache_implementation=cache)
        assert all(type(layer) is kind for layer in out.past_key_values.layers)
        assert torch.equal(out.sequences, expected)
        assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_growing_cache_needs_no_graph_for_every_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for the first length, one for all, and up to three when it has grown twice; then none, as often as it grows."""
    monkeypatch.setattr(kv_cache, "GROWTH", 32)
    model = switch_(LlamaForCausalLM(LlamaConfig(**SIZES | {"num_hidden_layers": 1})).eval(), "fp8")
    step = torch.compile(model, backend="qcompile", options={"policy": "float", "kv_cache": "fp8"})
    cache = DynamicCache(config=model.config)
    packed_(cache, "fp8")
    model(prompt(), past_key_values=cache)
    graphs = {}
    while cache.get_seq_length() < 260:  # room for 32, 48, 80, 128, 192, 288
        step(torch.ones(2, 1, dtype=torch.long), past_key_values=cache)
        graphs[cache.get_seq_length()] = counters["stats"]["unique_graphs"]
    assert graphs[31] == 2 and graphs[81] <= 5 and graphs[260] == graphs[81], graphs


@torch.no_grad()
@pytest.mark.parametrize("model", [
    lambda: llama(),
    lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)).eval(),
    lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=8, attn_logit_softcapping=5.0, query_pre_attn_scalar=64,
                                           attn_implementation="eager")).eval(),
], ids=["llama", "mistral", "gemma2"])  # fmt: skip
@pytest.mark.parametrize("static", [False, True])
def test_logits_are_those_of_the_float_cache(model: Any, static: bool) -> None:
    """Prompt with padding, then a few tokens at a time: window, softcap, groups of queries; against the model's own attention."""
    model = model()
    ids = torch.randint(1, 96, (2, 33), generator=torch.Generator().manual_seed(3))
    seen = F.pad(PADDED, (0, 12), value=1)

    def logits(model: Any, pack: bool) -> torch.Tensor:
        cache = StaticCache(config=model.config, max_cache_len=33) if static else DynamicCache(config=model.config)
        if pack:
            packed_(cache, "int8")
            assert all(isinstance(layer, PackedLayer) for layer in cache.layers)
        found = [model(ids[:, a:b], attention_mask=seen[:, :b], past_key_values=cache).logits
                 for a, b in ((0, 21), (21, 22), (22, 23), (23, 28), (28, 33))]  # fmt: skip
        return torch.cat(found, 1)[:, 5:]

    theirs = logits(model, pack=False)
    ours = logits(switch_(model, "int8"), pack=True)
    assert ((ours - theirs).norm(dim=-1) <= 0.02 * theirs.norm(dim=-1)).all()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("static", [pytest.param(False, marks=models.GROWING_PADDED), True])
def test_keys_that_a_bias_moves_away_from_zero(static: bool) -> None:
    """As Qwen2's: biases of a hundred in the channels that turn slowest with a token's place."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.view(2, -1, 64)[:, 0, [30, 31, 62, 63]] = torch.tensor([-60.0, 100.0, 40.0, 90.0])
    steps = ((0, 21), *((t, t + 1) for t in range(21, 33)))
    ids, seen = torch.randint(1, 96, (2, 33), generator=torch.Generator().manual_seed(3)), F.pad(PADDED, (0, 12), value=1)

    def logits(call: Any, pack: bool) -> torch.Tensor:
        cache = StaticCache(config=model.config, max_cache_len=33) if static else DynamicCache(config=model.config)
        if pack:
            packed_(cache, "int8")
        found = [call(ids[:, a:b], attention_mask=seen[:, :b], past_key_values=cache).logits for a, b in steps]
        return torch.cat(found, 1)[:, 5:]

    theirs = logits(model, pack=False)
    switch_(model, "int8")
    compiled = torch.compile(model, backend="qcompile", options={"policy": "float", "kv_cache": "int8"})
    for call in (model, compiled):
        assert (logits(call, pack=True) - theirs).norm() <= 0.01 * theirs.norm()  # 0.022 with the bias in the codes


def mistral(window: int = 24) -> MistralForCausalLM:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=window)).eval()


def room(cache: Any) -> list[int]:
    return [layer.packed.room for layer in cache.layers]


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_tokens_behind_a_window_are_dropped(static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of four windows, then more tokens: logits stay those of the model's own cache, memory that of a window or two."""
    monkeypatch.setattr(kv_cache, "GROWTH", 32)
    model = mistral()
    ids = torch.randint(1, 96, (2, 230), generator=torch.Generator().manual_seed(3))
    seen = torch.ones(2, 230, dtype=torch.long)
    seen[0, :5] = 0
    steps = [(0, 100), *((i, i + 1) for i in range(100, 190)), (190, 201), (201, 229), (229, 230)]

    def logits(model: Any, pack: bool) -> tuple[torch.Tensor, list[list[int]]]:
        cache = StaticCache(config=model.config, max_cache_len=230) if static else DynamicCache(config=model.config)
        cache = packed_(cache, "int8") if pack else cache
        found, rooms = [], []
        for a, b in steps:
            found.append(model(ids[:, a:b], attention_mask=seen[:, :b], past_key_values=cache).logits)
            assert cache.get_seq_length() == b
            rooms += [room(cache)] if pack else []
        return torch.cat(found, 1)[:, 5:], rooms

    theirs, _ = logits(model, pack=False)
    ours, rooms = logits(switch_(model, "int8"), pack=True)
    assert ((ours - theirs).norm(dim=-1) <= 0.02 * theirs.norm(dim=-1)).all()
    assert rooms[0] == [112, 112] and max(map(max, rooms[1:])) <= 24 + 16 + 28 + 32


@torch.no_grad()
def test_a_window_under_way_is_taken_over() -> None:
    model, ids = mistral(), torch.randint(1, 96, (2, 60), generator=torch.Generator().manual_seed(3))
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    exact = copy.deepcopy(cache)
    switch_(model, "int8")
    packed_(cache, "int8")
    assert cache.get_seq_length() == 60 and [layer.packed.length for layer in cache.layers] == [23, 23]
    for token in ids[:, :9].split(1, 1):
        ours, theirs = model(token, past_key_values=cache).logits, mistral()(token, past_key_values=exact).logits
        assert (ours - theirs).norm() <= 0.02 * theirs.norm()


@pytest.mark.usefixtures("fresh_dynamo")
def test_dropping_needs_no_graph_for_every_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once memory has been moved a few times, no graph is made any more."""
    monkeypatch.setattr(kv_cache, "GROWTH", 32)
    model = switch_(MistralForCausalLM(MistralConfig(**SIZES | {"num_hidden_layers": 1}, sliding_window=24)).eval(), "fp8")
    step = torch.compile(model, backend="qcompile", options={"policy": "float", "kv_cache": "fp8"})
    cache = packed_(DynamicCache(config=model.config), "fp8")
    model(prompt(), past_key_values=cache)
    graphs = []
    while cache.get_seq_length() < 400:
        step(torch.ones(2, 1, dtype=torch.long), past_key_values=cache)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[150] <= 8 and not counters["graph_break"], graphs


def test_assisted_decoding_crops_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the window, where tokens are dropped only once they cannot be taken back."""
    monkeypatch.setattr(kv_cache, "GROWTH", 32)
    model, draft = switch_(mistral(), "int8"), llama(seed=1)
    ids = prompt()[1:]
    settings = SETTINGS | {"max_new_tokens": 90, "return_dict_in_generate": True}
    alone = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assisted = model.generate(ids, attention_mask=torch.ones_like(ids), assistant_model=draft, **settings)
    assert torch.equal(alone.sequences, assisted.sequences)
    assert all(layer.packed.dropped for layer in assisted.past_key_values.layers) and max(room(assisted.past_key_values)) < 100


def test_beams_reorder_packed_sequences() -> None:
    model = llama()
    out = generated(switch_(copy.deepcopy(model), "int8"), num_beams=3)
    assert torch.equal(out.sequences, generated(model, num_beams=3).sequences)


def test_assisted_decoding_crops() -> None:
    """A draft of another model: what it guesses wrong is forgotten by the packed cache."""
    model, draft = switch_(llama(), "int8"), llama(seed=1)
    ids = prompt()[1:]
    alone = model.generate(ids, attention_mask=torch.ones_like(ids), **SETTINGS)
    assisted = model.generate(ids, attention_mask=torch.ones_like(ids), assistant_model=draft, **SETTINGS)
    assert torch.equal(alone, assisted)


def test_a_cache_under_way_is_taken_over() -> None:
    model = llama()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt(), past_key_values=cache)
        exact = copy.deepcopy(cache)
        packed_(cache, ("fp8", "int8"))
        switch_(model, "fp8")
        token = torch.ones(2, 1, dtype=torch.long)
        ours, theirs = model(token, past_key_values=cache).logits, llama()(token, past_key_values=exact).logits
    assert (ours - theirs).norm() <= 0.03 * theirs.norm()


@pytest.mark.usefixtures("fresh_dynamo")
def test_other_models_are_refused() -> None:
    layer = torch.compile(torch.nn.Linear(8, 8), backend="qcompile", options={"kv_cache": "fp8"})
    with pytest.raises(OptionError, match="no Hugging Face model; use qcompile.KVCache"):
        layer(torch.zeros(2, 8))
    with pytest.raises(OptionError, match="give one format, or"):
        torch.compile(llama(), backend="qcompile", options={"kv_cache": ("fp8", "int8", "int4")})(prompt())


def test_no_decoded_copy_of_a_cache_is_allocated() -> None:
    """Of all tensors that a step allocates, none is as large as a head's decoded keys."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if isinstance(t, torch.Tensor) and t._base is None:
                    Sizes.largest = max(Sizes.largest, t.nbytes)
            return out

    cache = kv_cache.KVCache("fp8", capacity=4096)
    k = torch.randn(1, 2, 4000, 64)
    cache.append(k, k)
    with Sizes():
        cache.append(k[:, :, :1], k[:, :, :1])
        cache.attend(torch.randn(1, 8, 1, 64))
    assert 0 < Sizes.largest <= 8 * 64 * 4


# The trained decoder --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_trained_decoder_keeps_its_perplexity() -> None:
    """Every token attends to packed keys and values: within 0.5 % for fp8 and int8, 1 % for int4; most likely tokens agree."""
    model = models.trained_decoder()[0].bfloat16()
    ids = models._decoder_ids()
    rows = ids[torch.linspace(0, len(ids) - 257, 16).long()[:, None] + torch.arange(257)]

    def seen(formats: Any) -> tuple[float, torch.Tensor]:
        loss, best = 0.0, []
        for group in rows.split(8):
            cache = DynamicCache(config=model.config)
            if formats is not None:
                packed_(cache, formats)
            logits = model(group[:, :-1].contiguous(), past_key_values=cache).logits.float()
            loss += float(F.cross_entropy(logits.flatten(0, 1), group[:, 1:].flatten()))
            best.append(logits.argmax(-1))
        return math.exp(loss / 2), torch.cat(best)

    perplexity, tokens = seen(None)
    switch_(model, "fp8")
    bounds = {"fp8": (0.005, 0.98), "fp8_e4m3": (0.005, 0.97), "int8": (0.005, 0.985), "int4": (0.01, 0.93)}
    for formats, (allowed, agreement) in bounds.items():
        found, own = seen(formats)
        assert abs(found / perplexity - 1) <= allowed, (formats, found, perplexity)
        assert float((own == tokens).float().mean()) >= agreement, formats


@torch.no_grad()
def test_the_trained_decoder_writes_the_same_tokens() -> None:
    """``generate`` over fp8 keys and values, 64 prompts: 98 % of the tokens that bf16 ones give, those before each given."""
    model, ids = models.trained_decoder()[0].bfloat16(), models._decoder_ids()
    prompts = ids[torch.linspace(0, len(ids) - caches.PROMPT, caches.PROMPTS).long()[:, None] + torch.arange(caches.PROMPT)]
    text = caches.written(copy.deepcopy(model), prompts)
    agreement, _ = caches.compared(switch_(model, "fp8"), prompts, text)
    assert agreement >= 0.98
