"""Formats by search: the choice and its bytes, what is kept, commands, and whether it pays on the trained decoder."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from models import trained_decoder
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

import qcompile
from qcompile.allocation import policy_search, sensitivity
from qcompile.allocation.budget import BITS
from qcompile.cli import app
from qcompile.errors import BudgetError, CompareError, OptionError, PolicyError, UnknownFormatError
from qcompile.evaluation import parameter_bytes
from qcompile.policy import Policy
from qcompile.store import COUNTS, Store

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "one_thread")

FORMATS = ("int3_g64", "int4_g128", "int5_g64", "int8")


@functools.cache
def windows() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Text to search on, and other text."""
    _, tokenizer, text = trained_decoder()
    ids = torch.tensor(tokenizer(text[:40_000], add_special_tokens=False)["input_ids"])
    rows = ids[: 16 * 128].view(16, 128)
    return [{"input_ids": rows[:2], "use_cache": False}], [{"input_ids": rows[4:], "use_cache": False}]


@functools.cache
def found() -> Any:
    with torch.no_grad():
        return qcompile.search(trained_decoder()[0], windows()[0], "4.25 bits", formats=FORMATS)


def packed(model: nn.Module, policy: Any, item: dict[str, Any]) -> nn.Module:
    made = copy.deepcopy(model)
    qcompile.quantize_(made, **item, policy=policy)
    return made


def test_the_budget_is_used_and_never_exceeded() -> None:
    model, item = trained_decoder()[0], windows()[0][0]
    search = found()
    assert 0.99 * 4.25 < search.point.bits <= 4.25
    made = packed(model, Policy.from_json(search.policy.to_json()), item)
    assert parameter_bytes(made) == search.point.nbytes
    for choice in search.choices:
        assert made.get_parameter(f"{choice.layer}.weight").scheme.label == choice.format  # type: ignore[union-attr]
    for budget in ("3.6 bits", "7 bits", 4_000_000, "5 MB"):
        other = search.at(budget)
        limit = other.budget.amount
        assert 0.99 * limit < (other.point.bits if other.budget.unit == BITS else other.point.nbytes) <= limit


def test_losses_are_those_of_the_layer_alone_and_nearly_add_up() -> None:
    model, data = trained_decoder()[0], windows()[0]
    search = found()
    assert search.measure == sensitivity.KL and len(search.choices) == 29
    layer = next(i for i, at in enumerate(search.table.layers) if at.site.name == "model.layers.2.mlp.down_proj")
    for candidate in search.table.candidates[layer]:
        alone = packed(model, {"model.layers.2.mlp.down_proj": candidate.scheme}, data[0])
        assert qcompile.evaluate(model, alone, data).divergence == pytest.approx(candidate.loss, rel=1e-3)
    total = qcompile.evaluate(model, packed(model, search.policy, data[0]), data).divergence
    assert search.measured == pytest.approx(total, rel=1e-3) and search.measured == pytest.approx(search.point.predicted, rel=0.3)


def test_the_front_falls_and_no_single_format_lies_below_it() -> None:
    search = found()
    pairs = list(itertools.pairwise(search.front))
    assert len(pairs) > 10 and all(a.nbytes < b.nbytes and a.predicted > b.predicted for a, b in pairs)
    uniform = search.table.uniform()
    assert list(uniform) == list(FORMATS)
    for point in uniform.values():
        assert search.at(point.nbytes).point.predicted <= point.predicted * (1 + 1e-9)


def test_on_other_text_the_choice_beats_one_format_of_as_many_bytes() -> None:
    model, (_, other) = trained_decoder()[0], windows()
    uniform = packed(model, {"*": "int4_g128"}, other[0])
    search = found().at(parameter_bytes(uniform))
    chosen = packed(model, search.policy, other[0])
    assert parameter_bytes(chosen) <= parameter_bytes(uniform)
    ours, theirs = (qcompile.evaluate(model, m, other) for m in (chosen, uniform))
    assert ours.divergence < 0.85 * theirs.divergence  # type: ignore[operator]
    assert ours.perplexity < theirs.perplexity  # type: ignore[operator]


def test_curvature_estimates_what_would_be_measured() -> None:
    model, data = trained_decoder()[0], windows()[0]
    search = qcompile.search(model, data, "4.25 bits", formats=FORMATS, sensitivity="curvature")
    ratios = [e.loss / m.loss for es, ms in zip(search.table.candidates, found().table.candidates, strict=True)
              for e, m in zip(es, ms, strict=True) if m.loss > 1e-5]  # fmt: skip
    assert len(ratios) > 60 and 0.8 < statistics.geometric_mean(ratios) < 1.2 and 0.3 < min(ratios) and max(ratios) < 3
    assert search.measured < 1.1 * found().measured
    with pytest.raises(OptionError, match="use one of 'measured', 'curvature'"):
        qcompile.search(model, data, "4.25 bits", sensitivity="guess")
    with pytest.raises(CompareError, match="has no gradient"):
        qcompile.search(Cut(), data_of(0), "8 bits", formats=("int4_g64",), sensitivity="curvature")


def test_curvature_of_what_is_no_logits() -> None:
    options: dict[str, Any] = {"formats": ("int3_g64", "int4_g64", "int8"), "measure_total": False}
    measured, estimated = (
        qcompile.search(Net(0), data_of(0), "5 bits", sensitivity=how, **options) for how in ("measured", "curvature")
    )
    assert estimated.measure == sensitivity.SQUARES
    for ms, es in zip(measured.table.candidates, estimated.table.candidates, strict=True):
        for m, e in zip(ms, es, strict=True):
            assert e.loss == pytest.approx(m.loss, rel=0.6)


def test_the_result_is_written_and_drawn(tmp_path: Path) -> None:
    search = found()
    content = json.loads(search.save(tmp_path / "search.json").read_text())
    assert Policy.from_json(json.dumps(content["policy"])) == search.policy
    assert len(content["sensitivities"]) == 29 and content["chosen"]["nbytes"] == search.point.nbytes
    assert search.plot(tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in search.plot(tmp_path / "front.svg").read_bytes()
    text = str(search)
    assert "predicted" in text and "measured with all of them packed" in text and "4.25 bits per weight" in text


def test_budgets_that_cannot_be_met_name_the_smallest_that_can() -> None:
    search = found()
    with pytest.raises(BudgetError, match=r"budget 3 bits per weight cannot be met.* takes 3.5 bits per weight"):
        qcompile.search(trained_decoder()[0], windows()[0], "3 bits", formats=FORMATS)
    with pytest.raises(BudgetError, match="budget 1,000 bytes cannot be met") as caught:
        search.at(1000)
    least = int(str(caught.value).split(" takes ")[1].split(" ")[0].replace(",", ""))
    assert search.at(least).point.nbytes == least
    with pytest.raises(BudgetError, match="cannot be met"):
        search.at(least - 1)
    with pytest.raises(BudgetError, match="took no times"):
        search.at("1 ms")


class Net(nn.Module):
    """Four equal layers, no logits."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x).relu()
        return x


class Cut(nn.Module):
    """Its output does not depend on its weight as far as gradients can tell."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).sign().detach()


def data_of(seed: int) -> list[torch.Tensor]:
    return [torch.randn(32, 64, generator=torch.Generator().manual_seed(seed + i)) for i in range(2)]


def test_a_search_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "the_store", lambda: Store(tmp_path, 10**9))
    whole, calls = policy_search._loss, itertools.count()

    def stops(*args: Any) -> float:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return whole(*args)

    def measured(model: nn.Module, data: Any, **options: Any) -> int:
        before = COUNTS["measured"]
        made = qcompile.search(model, data, "5 bits", formats=("int4_g64", "int8", "float"), **options)
        assert made.measure == sensitivity.SQUARES and made.point.bits <= 5
        return COUNTS["measured"] - before

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(policy_search, "_loss", stops)
        measured(Net(0), data_of(0))
    assert measured(Net(0), data_of(0)) == 8 - 5  # four layers in two formats; float costs nothing
    assert measured(Net(0), data_of(0), measure_total=False) == 0
    assert measured(Net(0), data_of(7)) == 8  # other data
    assert measured(Net(1), data_of(0)) == 8  # other weights
    assert measured(Net(0), [{"x": d} for d in data_of(0)]) == 8  # another call


def test_a_tied_weight_is_one_layer() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=64)).eval()
    data = [{"input_ids": torch.arange(12)[None], "use_cache": False}]
    search = qcompile.search(model, data, "5 bits", formats=("int4_g64", "int8"))
    assert len(search.choices) == 9 == len({at.parameter for at in search.table.layers})
    made = packed(model, search.policy, data[0])
    assert parameter_bytes(made) == search.point.nbytes
    assert made.lm_head.weight is made.transformer.wte.weight


def test_seconds_are_a_budget() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 512)).eval()
    data = [torch.randn(4, 1024)]
    free = qcompile.search(model, data, "10 s", formats=("int4_g64", "float"))
    assert [c.format for c in free.choices] == ["float", "float"] and free.measured == 0
    fastest = sum(min(c.seconds for c in row) for row in free.table.candidates)  # type: ignore[type-var]
    tight = free.at(f"{fastest * 1.001 * 1e3:.9f} ms")
    assert tight.point.amount <= fastest * 1.001 and tight.point.predicted >= free.point.predicted
    with pytest.raises(BudgetError, match=r"takes [0-9.]+ ms"):
        free.at("1 us")


def test_what_cannot_be_searched_says_why() -> None:
    model, data = Net(0).eval(), data_of(0)
    packed_model = packed(model, "int8", {"x": data[0]})
    bad = Net(0)
    with torch.no_grad():
        bad.layers[1].weight[0, 0] = float("nan")
    for case, items, error, words in [
        (model, [], CompareError, "no data: search needs"),
        (packed_model, data, CompareError, r"'layers.0.weight' and 3 others are packed already"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), [torch.ones(1, 3, 8, 8)], CompareError, "no layer of Sequential can be packed"),
        (bad, data, CompareError, "the float model, item 0: .* NaN"),
        (nn.Sequential(nn.Linear(64, 64), nn.Dropout()), data, CompareError, "training mode"),
    ]:
        with pytest.raises(error, match=words):
            qcompile.search(case, items, "8 bits", formats=("int4_g64", "float"))
    for formats, kind, words in [
        ("int8", PolicyError, "expected a list"), (("int8", "int8"), PolicyError, "each once"), ((), PolicyError, "at least one"),
        (("int88",), UnknownFormatError, "Did you mean"),
    ]:  # fmt: skip
        with pytest.raises(kind, match=words):
            qcompile.search(model, data, "8 bits", formats=formats)


SCRIPT = """
import torch
def made():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8)).eval()
    return model, [torch.randn(16, 64, generator=torch.Generator().manual_seed(1))]
def empty():
    return made()[0], []
"""


def test_the_commands(tmp_path: Path) -> None:
    script = tmp_path / "net.py"
    script.write_text(SCRIPT)

    def call(*arguments: object, code: int = 0) -> str:
        done = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})
        assert done.exit_code == code, done.output
        return done.output

    options = ["--format", "int4_g64", "--format", "int8"]
    text = call("search", f"{script}:made", "--budget", "5 bits", *options, "--save", tmp_path / "found.json")
    assert "budget 5 bits per weight" in text and "int4_g64" in text
    content = json.loads((tmp_path / "found.json").read_text())
    evaluated = json.loads(call("evaluate", f"{script}:made", "--policy", tmp_path / "found.json", "--json"))
    assert evaluated["relative_error"] ** 2 == pytest.approx(content["chosen"]["measured"], rel=1e-3)
    assert "no perplexity" in call("evaluate", f"{script}:made", "--policy", "int4_g64")
    assert "BudgetError: budget 1 bits" in call("search", f"{script}:made", "--budget", "1 bits", *options, code=1)
    curved = call("search", f"{script}:made", "--budget", "5 bits", *options, "--sensitivity", "curvature", "--json")
    assert json.loads(curved)["choices"][0]["format"] in ("int4_g64", "int8")
    assert "CompareError" in call("evaluate", f"{script}:empty", code=1)
    (tmp_path / "broken.json").write_text("{")
    for name in ("broken.json", "missing.json"):
        assert f"{name}: no policy can be read" in call("evaluate", f"{script}:made", "--policy", tmp_path / name, code=1)
