"""Whole-model figures: formulas against plain sums, padding, labels, which models have a perplexity, errors."""

from __future__ import annotations

import copy
import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import encoder, encoder_batch, trained_decoder
from torch import nn

import qcompile
from qcompile.errors import CompareError

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "one_thread")

V = 7


class Bigrams(nn.Module):
    """Logits of the next token by the last one alone; ``around``: by the next one as well."""

    def __init__(self, seed: int, around: bool = False) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(V, V, generator=torch.Generator().manual_seed(seed)))
        self.around = around

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        logits = self.table[input_ids]
        if self.around:
            logits = logits + self.table[input_ids.roll(-1, -1)]
        return SimpleNamespace(logits=logits)


def by_hand(reference: Bigrams, model: Bigrams, rows: list[list[int]]) -> dict[str, float]:
    """The docstring's sums, token by token, over rows without padding."""
    p0, p = reference.table.double().softmax(-1), model.table.double().softmax(-1)
    tokens = [t for row in rows for t in row]
    pairs = [(a, b) for row in rows for a, b in zip(row, row[1:], strict=False)]
    squares = sum(float((model.table[t].double() - reference.table[t].double()).square().sum()) for t in tokens)
    return {
        "divergence": sum(float((p0[t] * (p0[t] / p[t]).log()).sum()) for t in tokens) / len(tokens),
        "agreement": sum(int(p0[t].argmax() == p[t].argmax()) for t in tokens) / len(tokens),
        "perplexity": math.exp(-sum(math.log(p[a, b]) for a, b in pairs) / len(pairs)),
        "reference_perplexity": math.exp(-sum(math.log(p0[a, b]) for a, b in pairs) / len(pairs)),
        "relative_error": math.sqrt(squares / sum(float(reference.table[t].double().square().sum()) for t in tokens)),
    }


ROWS = [[1, 4, 2, 6, 3], [5, 0, 5], [3, 3]]


def padded(side: str) -> dict[str, torch.Tensor]:
    width = max(map(len, ROWS))
    ids, mask = torch.zeros(len(ROWS), width, dtype=torch.long), torch.zeros(len(ROWS), width, dtype=torch.long)
    for i, row in enumerate(ROWS):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


CASES = {"rows": [torch.tensor([row]) for row in ROWS], "right": [padded("right")], "left": [padded("left")]}


@pytest.mark.parametrize("data", CASES.values(), ids=CASES)
def test_figures_are_those_of_the_formulas_and_padding_does_not_count(data: list[Any]) -> None:
    reference, model = Bigrams(0), Bigrams(1)
    found = qcompile.evaluate(reference, model, data)
    for name, value in by_hand(reference, model, ROWS).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-6), name
    assert (found.positions, found.tokens, found.no_perplexity) == (10, 7, None)
    assert 0 < found.agreement < 1  # type: ignore[operator]


def test_labels_choose_the_tokens_that_count_and_are_not_passed_on() -> None:
    reference, model = Bigrams(0), Bigrams(1)
    ids = torch.tensor([[1, 4, 2, 6]])
    found = qcompile.evaluate(reference, model, [{"input_ids": ids, "labels": torch.tensor([[-100, -100, 2, 5]])}])
    logs = model.table.double().log_softmax(-1)
    assert found.tokens == 2 and found.perplexity == pytest.approx(math.exp(-float(logs[4, 2] + logs[2, 5]) / 2), rel=1e-6)
    with pytest.raises(CompareError, match=r"labels of shape \[1, 3\], tokens of shape \[1, 4\]"):
        qcompile.evaluate(reference, model, [{"input_ids": ids, "labels": ids[:, :3]}])


def test_equal_models_differ_in_nothing() -> None:
    found = qcompile.evaluate(Bigrams(0), Bigrams(0), [torch.tensor([ROWS[0]])])
    assert found.divergence == pytest.approx(0, abs=1e-12) and found.relative_error == 0 and found.agreement == 1
    assert found.perplexity == found.reference_perplexity


@pytest.mark.parametrize("model,data,words", [
    (Bigrams(0, around=True), torch.tensor([ROWS[0]]), "logits depend on later ones"),
    (nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(3, 8), "no logits of a token"),
    (Bigrams(0), torch.tensor([[1], [2]]), "no item has a token after another"),
], ids=["around", "features", "single"])  # fmt: skip
def test_models_without_a_perplexity_say_why(model: nn.Module, data: torch.Tensor, words: str) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    found = qcompile.evaluate(model, other, [data])
    assert found.perplexity is None and words in str(found.no_perplexity) and found.relative_error > 0
    assert (found.divergence is None) == isinstance(model, nn.Sequential)
    assert f"no perplexity: {found.no_perplexity}" in str(found)


def test_an_encoder_is_compared_without_its_padding() -> None:
    model = encoder()
    batch, packed = encoder_batch(4), encoder()
    qcompile.quantize_(packed, **batch, policy="int8")
    found = qcompile.evaluate(model, packed, [batch])
    assert found.no_perplexity is not None and 0 < found.relative_error < 0.05
    assert model(**batch).dim() == 2 and found.positions == 4  # one embedding a sentence


@pytest.mark.parametrize("backend", [None, "eager", "qcompile"])
def test_the_decoder_under_any_backend(backend: str | None) -> None:
    reference, tokenizer, text = trained_decoder()
    ids = torch.tensor(tokenizer(text[:3000], add_special_tokens=False)["input_ids"][:192]).view(2, 96)
    data = [{"input_ids": ids, "use_cache": False}]
    packed = copy.deepcopy(reference)
    if backend != "qcompile":
        qcompile.quantize_(packed, **data[0], policy="int4")
    model: Any = packed
    if backend is not None:
        model = torch.compile(packed, backend=backend, options={"policy": "int4"} if backend == "qcompile" else None)
        model(**data[0])
    found = qcompile.evaluate(reference, model, data)
    logits = packed(**data[0]).logits[:, :-1].double()
    want = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).exp()
    assert found.perplexity == pytest.approx(float(want), rel=1e-3)
    assert 1e-3 < found.divergence < 0.1 and 0.8 < found.agreement < 1  # type: ignore[operator]
    assert found.nbytes < found.reference_nbytes / 3
    assert len(found.sites) == 29 and all(s.sqnr is not None and s.sqnr > 15 for s in found.sites)
    content = json.loads(found.to_json())
    assert content["perplexity"] == found.perplexity and content["sites"][0]["sqnr"] == found.sites[0].sqnr
    assert "model.layers.{0…3}.mlp.up_proj" in str(found) and "same likeliest" in str(found)


def test_the_noise_of_weights_that_nobody_recorded_is_measured() -> None:
    reference = nn.Sequential(nn.Linear(64, 32)).eval()
    packed = copy.deepcopy(reference)
    recorded = qcompile.quantize_(packed, torch.ones(1, 64), policy="int4_g32").plan.records[0].sqnr
    stranger = nn.Sequential(nn.Linear(64, 32)).eval()
    stranger[0].weight, stranger[0].bias = packed[0].weight, packed[0].bias
    (site,) = qcompile.evaluate(reference, stranger, [torch.ones(1, 64)]).sites
    assert site.layer == "0" and site.sqnr == pytest.approx(recorded, abs=0.01)


def broken(value: float) -> Bigrams:
    made = Bigrams(0)
    with torch.no_grad():
        made.table[4, 2] = value
    return made


@pytest.mark.parametrize("reference,model,data,words", [
    (Bigrams(0), Bigrams(1), [], "no data"),
    (Bigrams(0), Bigrams(1), [{k: v * 0 for k, v in padded("left").items()}], "not masked"),
    (Bigrams(0), broken(math.nan), [torch.tensor([[1, 4]])], "the quantized model, item 0: 1 of 14 .* NaN"),
    (broken(math.inf), Bigrams(0), [torch.tensor([[1, 2]]), torch.tensor([[1, 4]])], "reference, item 1: 1 of 14 .* infinite"),
    (nn.Linear(4, 3), nn.Linear(4, 2), [torch.ones(2, 4)], r"an output of shape \[2, 2\], the float model's is \[2, 3\]"),
    (nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.1)), nn.Linear(4, 3), [torch.ones(2, 4)], r"reference is in .*1 \(Dropout"),
    (nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), [torch.ones(2, 4)], r"quantized model .*1 \(Batch"),
])  # fmt: skip
def test_what_cannot_be_evaluated_says_why(reference: nn.Module, model: nn.Module, data: list[Any], words: str) -> None:
    with pytest.raises(CompareError, match=words):
        qcompile.evaluate(reference, model, data)
