"""README's tables are those that their commands made."""

import json
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import accuracy, caches, decode, model, readme

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


@pytest.mark.parametrize("question", [accuracy, caches, decode, model], ids=lambda module: module.__name__)
def test_tables_are_those_of_the_results(question: ModuleType) -> None:
    name = question.__name__.removeprefix("benchmarks.")
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    assert readme.block(name, question.table(rows)) in readme.README.read_text(encoding="utf-8")


def test_the_second_start_is_as_fast_as_the_results_say() -> None:
    rows = json.loads((RESULTS / "startup.json").read_text())["rows"]
    ours = [r for r in rows if r["process"] == "second" and r["policy"] != "bf16"]
    first, plain = ([f"{pick(r[name] for r in ours):.2f}" for pick in (min, max)] for name in ("over first", "over bf16"))
    said = " ".join(readme.README.read_text(encoding="utf-8").split())
    assert len(ours) == 4 and all(r["quantized"] == r["generated"] == r["compiled"] == 0 for r in ours)
    assert (f"takes {first[0]} to {first[1]} of the first process's, {plain[0]} to {plain[1]} times plain Inductor's second start"
            in said)  # fmt: skip


def test_publishing_replaces_the_table_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"model": "decoder", "policy": name, "bytes": 0.5, "over float": -0.0012, "KL": 0.01234, "agreement": 0.9}
            for name in accuracy.SHOWN]  # fmt: skip
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    readme.README.write_text("before\n" + readme.block("accuracy", "old\n") + "\nafter\n")
    accuracy.publish(rows)
    text = readme.README.read_text()
    assert text.startswith("before\n") and text.endswith(f"{readme.END}\nafter\n") and "old" not in text
    assert "| `int4`, GPTQ | 0.500 | -0.12 % | 0.0123 | 90.0 % |" in text
    assert "| searched, 4.25 bits, GPTQ |" in text
    readme.README.write_text("no marks")
    with pytest.raises(ValueError, match="no <!-- python -m benchmarks accuracy --> … <!-- end --> around the table"):
        accuracy.publish(rows)
