"""``qcompile doctor``, and documents that say what the code says."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qcompile import doctor, errors
from qcompile.cli import app
from qcompile.logs import ARTIFACTS
from qcompile.options import Options
from qcompile.variables import OTHERS, VARIABLES

ROOT = Path(__file__).parents[1]
DOCS = (ROOT / "docs" / "debugging.md").read_text(encoding="utf-8")


def table(heading: str) -> dict[str, list[str]]:
    """Rows of the first table below a heading, by their first cell."""
    text = DOCS.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return {row[0].strip("`"): row[1:] for row in rows[2:]}


def test_every_error_has_a_cause_and_a_remedy() -> None:
    classes = {n for n, c in vars(errors).items() if inspect.isclass(c) and issubclass(c, errors.QCompileError)}
    rows = table("Errors")
    assert set(rows) == classes - {"QCompileError"}
    assert all(cause and remedy for cause, remedy in rows.values())


def test_every_variable_is_documented_with_the_same_words() -> None:
    assert table("Environment variables") == {name: [text] for name, text in (VARIABLES | OTHERS).items()}


def test_every_variable_that_is_read_is_known() -> None:
    files = [p for folder in ("qcompile", "passes", "tests", "examples", "benchmarks") for p in (ROOT / folder).rglob("*.py")]
    read = {name for p in files for name in re.findall(r'environ(?:\.get\(|\.setdefault\(|\[)"(QCOMPILE_\w+)"', p.read_text())}
    read |= {name for p in files for name in re.findall(r'"(QCOMPILE_\w+)" in os\.environ', p.read_text())}
    assert read == set(VARIABLES)


def test_every_option_is_documented_with_its_default() -> None:
    rows = table("Options")
    fields = [name for name, field in Options.__dataclass_fields__.items() if field.init]
    assert set(rows) == set(fields)
    made = Options.parse({}, None)
    assert {n: row[0] for n, row in rows.items() if n != "policy"} == {
        n: f"`{getattr(made, n)!r}`".replace("'", '"') for n in fields if n != "policy"
    }
    readme = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Options\n")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)`", readme, re.M)) == set(fields)


def test_every_artefact_is_documented() -> None:
    assert all(f'TORCH_LOGS="{name}"' in DOCS for name in ARTIFACTS)


def test_the_doctor_finds_this_machine_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0, done.output
    for words in ("qcompile", "torch", "C++ compiler", "cache", "registered", "knows qcompile"):
        assert words in done.output


def test_the_doctor_names_what_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QCOMPILE_CACHE_DIRR", "x")
    monkeypatch.setenv("QCOMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(doctor.torch, "__version__", "2.9.1+cpu")
    monkeypatch.setattr(doctor.torch.cpu, "_is_vnni_supported", lambda: False)

    def none() -> str:
        raise errors.KernelBuildError("no C++ compiler was found")

    monkeypatch.setattr(doctor, "compiler", none)
    found = {f.what: f for f in doctor.examine()}
    assert {n for n, f in found.items() if f.state == doctor.BROKEN} == {"torch", "C++ compiler", "QCOMPILE_CACHE_DIRR"}
    assert "QCOMPILE_CACHE_DIR'" in found["QCOMPILE_CACHE_DIRR"].advice and "2.11" in found["torch"].advice
    assert found["int8 dot products"].state == doctor.SLOW and f"{tmp_path}/store-2: 0 entries" in found["cache"].found
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 1
