"""The command line."""

import pytest
from typer.testing import CliRunner

from qcompile import __version__
from qcompile.cli import app
from qcompile.formats import REGISTRY


def test_formats_lists_every_format_with_its_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    done = CliRunner().invoke(app, ["formats"])
    assert done.exit_code == 0
    rows = {cells[1].strip(): [c.strip() for c in cells[2:-1]] for line in done.stdout.splitlines()
            if len(cells := line.split("│")) > 5}  # fmt: skip
    assert set(REGISTRY) <= set(rows)
    assert rows["int4_g128"][0] == "4.25" and "zero[bf16/128]" in rows["int4_g128"][1]


def test_version() -> None:
    assert CliRunner().invoke(app, ["version"]).stdout.strip() == __version__
