"""The report's page: one file, opened, clicked and searched in headless Chromium where there is one."""

from __future__ import annotations

import copy
import functools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import encoder, encoder_batch, trained_decoder
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import qcompile
from qcompile.comparison import Comparison
from qcompile.report import Report
from qcompile.report.blocks import block_of, cut
from qcompile.report.fold import folded_name
from qcompile.report.graph import Step

MEGABYTES = 5
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@functools.cache
def made(name: str) -> tuple[Report, Comparison | None]:
    torch._dynamo.reset()
    with torch.no_grad():
        if name == "encoder":
            return qcompile.explain(encoder(), **encoder_batch(2), policy="int8"), None
        if name == "decoder":
            model, _, _ = trained_decoder()
            inputs = {"input_ids": torch.arange(1, 33)[None], "use_cache": False}
            packed = copy.deepcopy(model)
            qcompile.quantize_(packed, **inputs, policy="int4")
            return qcompile.explain(model, **inputs, policy="int4"), qcompile.compare(model, packed, [inputs])
        config = LlamaConfig(vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                             num_attention_heads=64, num_key_value_heads=8, max_position_embeddings=8192)  # fmt: skip
        with torch.device("meta"):
            large = LlamaForCausalLM(config).to(torch.bfloat16).eval()
        ids = torch.ones(1, 128, dtype=torch.long, device="meta")
        return qcompile.explain(large, ids, use_cache=False, policy="int4"), None


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed (Debian: apt-get install chromium-headless-shell)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


def opened(browser: Any, path: Path) -> tuple[Any, list[str]]:
    page, faults = browser.new_page(viewport={"width": 1400, "height": 1000}), []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith("file:") else faults.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_function("window.qcompile")
    return page, faults


def click(page: Any, node: str) -> None:
    """A real click where a node is drawn, brought to the middle first."""
    page.evaluate("id => { qcompile.graph().center(qcompile.graph().getElementById(id)); }", node)
    at = page.evaluate("id => qcompile.graph().getElementById(id).renderedPosition()", node)
    box = page.locator("#graph").bounding_box()
    page.mouse.click(box["x"] + at["x"], box["y"] + at["y"])
    page.wait_for_timeout(350)


CASES = {
    "encoder": ("bert.encoder.layer", 6, "intermediate.dense", "int8", "1536×384", "F.linear|self.dense\\("),
    "decoder": ("model.layers", 4, "mlp.down_proj", "int4_g128", "256×768", "self.down_proj\\("),
    "llama_70b": ("model.layers", 80, "mlp.down_proj", "int4_g128", "8192×28672", "self.down_proj\\("),
}


@pytest.mark.parametrize("name", CASES)
def test_the_page_is_one_small_file_that_says_what_the_plan_says(name: str, tmp_path: Path) -> None:
    report, comparison = made(name)
    text = report.html(tmp_path / "report.html", comparison).read_text()
    assert len(text.encode()) <= MEGABYTES * 10**6
    head = text.split('<script type="application/json"')[0]
    assert not re.search(r"<(?:link|img|iframe)\b|<script[^>]*\bsrc=|@import|url\(", head)
    content = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])  # type: ignore[index]
    assert [s["name"] for s in content["sites"]] == [r.decision.site.name for r in report.plan]
    stem, count, layer, scheme, _, line = CASES[name]
    (graph,) = content["graphs"]
    assert [b["name"] for b in graph["blocks"]] == [f"{stem}.{i}" for i in range(count)] and len(graph["runs"]) == 1
    (step,) = (s for s in graph["runs"][0]["steps"] if s["site"] == [f"{stem}.0.{layer}", "linear"])
    (code,) = (text for text in content["sources"][step["source"]] if text.startswith("→"))
    assert re.search(line, code) and scheme in content["kernels"] and len(content["kernels"][scheme]) > 1000


@pytest.mark.parametrize("name", CASES)
def test_in_a_browser(name: str, browser: Any, tmp_path: Path) -> None:
    report, comparison = made(name)
    stem, count, layer, scheme, shape, _ = CASES[name]
    page, faults = opened(browser, report.html(tmp_path / "report.html", comparison))
    assert page.evaluate("window.qcompile.ready") < 2000  # milliseconds from the start of loading
    label = page.evaluate("id => qcompile.graph().getElementById(id).data('label')", f"b:{stem}.0")
    assert label == f"{stem}.{{0…{count - 1}}}\n× {count}"
    click(page, f"b:{stem}.0")  # into the block, and out again
    assert page.locator("#where").inner_text() == f"{stem}.0"
    page.click("#up")
    page.uncheck("#fold")
    assert page.evaluate("qcompile.graph().nodes(\"[kind = 'block']\").length") == count
    page.fill("#search", f"{stem}.{count - 1}.{layer}")  # the last layer, which is written once with the first
    page.locator("#results button").first.click()
    assert page.locator("#where").inner_text() == f"{stem}.{count - 1}"
    selected = page.evaluate("qcompile.graph().$(':selected').id()")
    click(page, selected)
    details = page.locator("#details").inner_text()
    record = next(r for r in report.plan if r.decision.site.name == f"{stem}.{count - 1}.{layer}")
    for words in (record.decision.site.name, scheme, shape, record.decision.rule, ".py:", f"{record.decision.site.flops:,}"):
        assert words in details
    if record.sqnr is not None:
        assert f"{record.sqnr:.2f}".rstrip("0").rstrip(".") in details
    page.click("#details a")
    assert "int qc_linear" in page.locator(f"#kernel-{scheme} pre").inner_text()
    labels = "qcompile.graph().nodes().map(n => n.data('label')).join(' ')"
    assert "qcompile.linear" in page.evaluate(labels)
    page.click("#before")
    assert "qcompile.linear" not in page.evaluate(labels) and "linear" in page.evaluate(labels)
    assert faults == []


def test_assembly_is_shown_below_its_source(browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = {"dot for 90: 4 warps": ".version 8.7\n.target sm_90a", "gemv for 90: 2 warps": "x" * 3_000_000}
    monkeypatch.setattr("qcompile.report.html.machine_code_of", lambda scheme, device: code)
    report, _ = made("decoder")
    page, faults = opened(browser, report.html(tmp_path / "report.html"))
    page.click("#kernel-int4_g128 > summary")
    boxes = page.locator("#kernel-int4_g128 .code")
    assert boxes.count() == 2 and boxes.nth(0).locator("pre").count() == 0
    boxes.nth(0).locator("summary").click()
    assert ".target sm_90a" in boxes.nth(0).locator("pre").inner_text()
    boxes.nth(1).locator("summary").click()
    assert "3,000,000 bytes are left out" in boxes.nth(1).locator("pre").inner_text()
    assert faults == [] and (tmp_path / "report.html").stat().st_size <= MEGABYTES * 10**6


def test_tables_filters_and_plots(browser: Any, tmp_path: Path) -> None:
    report, comparison = made("decoder")
    page, faults = opened(browser, report.html(tmp_path / "report.html", comparison))
    rows = page.locator("#decisions tbody tr")
    assert rows.count() == 10 and "model.layers.{0…3}.mlp.up_proj" in page.locator("#decisions").inner_text()
    page.fill("#filter", "left? attention")
    assert page.locator("#shown").inner_text() == "0 of 10 rows"
    page.fill("#filter", "embed")
    assert page.locator("#shown").inner_text() == "1 of 10 rows"
    assert comparison is not None and comparison.suggestion is not None
    assert comparison.suggestion.layer in page.locator("#advice").inner_text()
    plotted = page.evaluate("Chart.getChart('errors').data.labels[0]")
    assert plotted == comparison.ranked()[0].layer
    assert page.evaluate("Chart.getChart('bytes').data.datasets[1].data.length") == 30
    assert faults == []


def test_a_search_is_shown_with_its_front(browser: Any, tmp_path: Path) -> None:
    report, _ = made("decoder")
    model, _, _ = trained_decoder()
    with torch.no_grad():
        data = [{"input_ids": torch.arange(1, 33)[None], "use_cache": False}]
        search = qcompile.search(model, data, "5 bits", formats=("int4_g128", "int8"))
    page, faults = opened(browser, report.html(tmp_path / "report.html", search=search))
    assert "5 bits per weight" in page.locator("#search-summary").inner_text()
    drawn = page.evaluate("Chart.getChart('front').data.datasets.map(d => d.data)")
    assert [p["y"] for p in drawn[0]] == [p.predicted for p in search.front]
    assert {p["label"] for p in drawn[1]} == {"int4_g128", "int8"}
    assert drawn[2][0]["x"] == search.point.bits and drawn[3][0]["y"] == search.measured
    assert page.locator("#choices tbody tr").count() == 29 and "lm_head" in page.locator("#choices").inner_text()
    assert faults == []
    page, faults = opened(browser, report.html(tmp_path / "plain.html"))
    assert not page.locator("#search-section").is_visible() and faults == []


def step(module: str, name: str = "x", **fields: Any) -> Step:
    return Step(name, "linear", module, "", (1, 2), "float32", (), **fields)


def test_blocks_are_the_shortest_numbered_modules() -> None:
    assert block_of(step("model.layers.3.mlp.experts.0")) == "model.layers.3"
    assert block_of(step("h.11")) == "h.11" and block_of(step("0.conv1")) == "0"
    assert block_of(step("encoder.layer1.conv2")) == "" == block_of(step("lm_head"))


def test_blocks_that_differ_in_anything_are_not_folded() -> None:
    class Model(nn.Module):
        def __init__(self, widths: list[int]) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, w), nn.ReLU(), nn.Linear(w, 32)) for w in widths)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x + layer(x)
            return x

    def runs(model: nn.Module, policy: Any) -> list[int]:
        report = qcompile.explain(model, torch.ones(2, 32), policy=policy)
        say = {r.decision.site.key: r.decision.scheme for r in report.plan}
        return [b.run for b in cut(report.graphs[0], say).blocks]

    assert runs(Model([64, 64, 64]), "int8") == [0, 0, 0]
    assert runs(Model([64, 48, 48]), "int8") == [0, 1, 1]
    assert runs(Model([64, 64, 64]), {"layers.1.0": "int4", "*": "int8"}) == [0, 1, 2]


def test_names_fold_over_their_numbers() -> None:
    assert folded_name(["a.0.b", "a.1.b", "a.2.b"]) == "a.{0…2}.b"
    assert folded_name(["l.0.e.0", "l.0.e.1", "l.2.e.0", "l.2.e.1"]) == "l.{0,2}.e.{0…1}"
    assert folded_name(["conv1.3"]) == "conv1.3"
