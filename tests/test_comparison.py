"""Which layer hurts: ranking, accumulation, the suggestion and what applying it does."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from models import trained_decoder
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import qcompile
from qcompile.errors import CompareError

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "one_thread")

BAD = "model.layers.2.mlp.down_proj"


def planted(factor: float) -> nn.Module:
    """The trained decoder with columns of one layer ``factor`` times as large and what it multiplies by them as much smaller:
    the same function, harder to quantize."""
    model, _, _ = trained_decoder()
    mlp = model.model.layers[2].mlp
    with torch.no_grad():
        mlp.down_proj.weight[:, 5::128] *= factor
        mlp.up_proj.weight[5::128] /= factor
    return model


def batches() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(2048, (1, 48), generator=generator), "use_cache": False} for _ in range(2)]


def packed(model: nn.Module, policy: Any) -> nn.Module:
    made = copy.deepcopy(model)
    qcompile.quantize_(made, **batches()[0], policy=policy)
    return made


@pytest.mark.parametrize("factor", [50, 200])
def test_a_planted_layer_is_ranked_first_and_the_suggestion_mends_it(factor: float) -> None:
    sound, model, data = planted(1), planted(factor), batches()
    torch.testing.assert_close(model(**data[0]).logits, sound(**data[0]).logits, rtol=1e-3, atol=1e-3)
    usual = qcompile.compare(sound, packed(sound, "int4"), data, suggest=False)
    found = qcompile.compare(model, packed(model, "int4"), data)
    first, second = found.ranked()[:2]
    assert first.layer == BAD and first.alone > 2 * second.alone and found.total > 1.4 * usual.total
    assert usual.ranked()[0].layer != BAD
    suggestion = found.suggestion
    assert suggestion is not None and suggestion.layer == BAD and suggestion.value != "float"
    mended = packed(model, suggestion.policy)
    assert mended.get_parameter(f"{BAD}.weight").scheme.format.name == suggestion.value  # type: ignore[union-attr]
    then = qcompile.compare(model, mended, data, suggest=False)
    assert then.total == pytest.approx(suggestion.total_then, rel=1e-3) and then.total < 1.15 * usual.total
    grown = sum(e.nbytes for e in then.errors) - sum(e.nbytes for e in found.errors)
    assert grown == suggestion.extra_bytes > 0


def test_every_weight_has_its_own_error_and_they_add_up_in_order() -> None:
    torch.manual_seed(0)
    reference = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=64)).eval()
    model, ids = copy.deepcopy(reference), torch.arange(12)[None]
    compiled = torch.compile(model, backend="qcompile", options={"policy": "int4_dynamic"})
    data = [{"input_ids": ids, "use_cache": False}]
    with pytest.raises(CompareError, match="call the compiled model once"):
        qcompile.compare(reference, compiled, data)
    out = compiled(**data[0]).logits
    before = copy.deepcopy(reference.state_dict())
    found = qcompile.compare(reference, compiled, data)
    assert all(torch.equal(t, before[n]) for n, t in reference.state_dict().items())
    names = [e.name for e in found.errors]
    assert len(names) == 9 == len(set(names)) and names[0] == "transformer.wte.weight"  # tied to the head: once
    want = reference(**data[0]).logits
    assert found.total == pytest.approx(float((out - want).norm() / want.norm()), rel=0.05)
    assert found.errors[0].alone == found.errors[0].accumulated and all(e.alone > 0 for e in found.errors)
    assert found.errors[-1].accumulated == found.total


def attentive() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                         num_key_value_heads=2)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 6  # scores that tell tokens apart
    return model, {"input_ids": torch.arange(24)[None] * 5 % 64, "use_cache": False}


@torch.no_grad()
def test_attention_in_low_precision_is_a_site_like_any_other() -> None:
    model, item = attentive()
    compiled = torch.compile(copy.deepcopy(model), backend="qcompile", options={"policy": {"*.self_attn": "int8", "*": "int8"}})
    whole = compiled(**item).logits
    found = qcompile.compare(model, compiled, [item], suggest=False)
    sites = [e for e in found.errors if e.layer.endswith("self_attn")]
    assert [e.layer for e in sites] == [f"model.layers.{i}.self_attn" for i in range(3)] and len(found.errors) == 25
    assert all(e.nbytes == 0 and e.scheme == "int8" and e.alone > 0 for e in sites)
    expected = model(**item).logits
    assert found.total == pytest.approx(float((whole - expected).norm() / expected.norm()), rel=1e-2)
    for e in sites:
        torch._dynamo.reset()
        one = torch.compile(copy.deepcopy(model), backend="qcompile", options={"policy": {e.layer: "int8", "*": "float"}})
        assert e.alone == pytest.approx(float((one(**item).logits - expected).norm() / expected.norm()), rel=1e-2)
    at = found.errors.index(sites[1])
    assert found.errors[at].accumulated > 0 and found.errors[-1].accumulated == found.total
    assert "model.layers.1.self_attn" in str(found)


@torch.no_grad()
def test_attention_that_hurts_most_is_suggested_to_stay_in_float() -> None:
    model, item = attentive()
    rules = {"model.layers.[01].self_attn": "int4_g32", "*": "int8"}
    compiled = torch.compile(copy.deepcopy(model), backend="qcompile", options={"policy": rules})
    compiled(**item)
    found = qcompile.compare(model, compiled, [item])
    suggestion = found.suggestion
    assert suggestion is not None and suggestion.layer == found.ranked()[0].layer
    assert suggestion.layer.endswith("self_attn") and suggestion.value == "float" and suggestion.extra_bytes == 0
    torch._dynamo.reset()
    mended = torch.compile(copy.deepcopy(model), backend="qcompile", options={"policy": suggestion.policy})
    mended(**item)
    then = qcompile.compare(model, mended, [item], suggest=False)
    assert suggestion.layer not in {e.layer for e in then.errors} and len(then.errors) == len(found.errors) - 1
    assert then.total == pytest.approx(suggestion.total_then, rel=1e-2) and then.total < found.total


def test_a_metric_of_the_users() -> None:
    reference = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    model, x = copy.deepcopy(reference), torch.randn(16, 32)
    qcompile.quantize_(model, x, policy={"0": "int2_g64", "2": "int8"})
    found = qcompile.compare(reference, model, [x, (x + 1,)], metric=lambda y, y0: float((y - y0).abs().max()))
    assert [e.layer for e in found.ranked()] == ["0", "2"]
    assert found.total == pytest.approx(sum(float((model(v) - reference(v)).abs().max()) for v in (x, x + 1)) / 2, rel=1e-4)
    content = json.loads(found.to_json())
    assert content["errors"][0]["name"] == "0.weight" and content["suggestion"]["layer"] == "0"
    text = str(found)
    assert text.index(" 0 ") < text.index(" 2 ") and "all together" in text and "suggestion: store 0 as" in text


def test_exact_weights_need_no_suggestion() -> None:
    reference = nn.Sequential(nn.Linear(16, 16, bias=False)).eval()
    with torch.no_grad():
        reference[0].weight.copy_(torch.arange(256.0).reshape(16, 16) % 2)
    model, x = copy.deepcopy(reference), torch.ones(2, 16)
    qcompile.quantize_(model, x, policy="int8")
    found = qcompile.compare(reference, model, [x])
    assert found.total < 1e-6 and (found.total == 0) == (found.suggestion is None)


def test_what_cannot_be_compared_says_why() -> None:
    reference = nn.Sequential(nn.Linear(32, 16)).eval()
    model, x = copy.deepcopy(reference), torch.randn(2, 32)
    qcompile.quantize_(model, x, policy="int8")
    for other, data, words in [
        (reference, [], "no data"),
        (model, [x], "packed in the reference"),
        (nn.Sequential(nn.Linear(32, 8)), [x], r"\[8, 32\] in the reference"),
        (nn.Linear(32, 16), [x], "no parameter '0.weight'"),
    ]:
        with pytest.raises(CompareError, match=words):
            qcompile.compare(other, model, data)
    with pytest.raises(CompareError, match="give a metric"):
        qcompile.compare(Ints(reference), Ints(model), [x])


class Ints(nn.Module):
    """A model that returns no floating tensor."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).argmax(-1)
