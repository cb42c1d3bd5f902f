"""The first node where two configurations part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import qcompile
from qcompile.bisection import difference
from qcompile.cli import app
from qcompile.errors import CompareError

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "one_thread")


class Model(nn.Module):
    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 8)
        self.broken = broken

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        if self.broken:
            torch._dynamo.graph_break()
        x = x + torch.relu_(self.second(x))
        return self.third(x)


def make(broken: bool = False) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Model(broken).eval(), torch.randn(4, 32)


@pytest.mark.parametrize("broken", [False, True])
def test_the_first_node_that_differs_is_found(broken: bool) -> None:
    model, x = make(broken)
    policy = {"first": "int8", "third": "int8"}
    found = qcompile.bisect(model, x, a=policy, b={**policy, "second": "int4"})
    assert found is not None and (found.layer, found.operator, found.shape) == ("second", "linear", (4, 64))
    assert found.graph == int(broken) and found.agreed == 2 and 1e-3 < found.error < 0.3
    path, line = found.source.rsplit(":", 1)
    assert Path(path) == Path(__file__) and "self.second(x)" in Path(path).read_text().splitlines()[int(line) - 1]
    assert "in second is the first" in str(found) and type(model.second.weight) is nn.Parameter


def test_a_tolerance_passes_small_differences_by() -> None:
    model, x = make()
    policies = {"a": "float", "b": {"first": "int8", "second": "int2_g64", "third": "int8"}}
    first, later = qcompile.bisect(model, x, **policies), qcompile.bisect(model, x, tolerance=0.05, **policies)
    assert first is not None and first.layer == "first" and first.error < 0.05
    assert later is not None and later.layer == "second" and later.agreed == 2
    assert qcompile.bisect(model, x, tolerance=10.0, **policies) is None
    assert qcompile.bisect(model, x, a="int8", b="int8") is None


def test_attention_in_low_precision_is_seen_in_what_it_gives() -> None:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (p(x).unflatten(-1, (2, 16)).transpose(1, 2) for p in (self.q, self.k, self.v))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = Attend()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attend(x)

    found = qcompile.bisect(Outer().eval(), torch.randn(1, 6, 32), a="float", b={"attend": "int8", "*": "float"})
    assert found is not None and found.operator == "transpose" and 0 < found.error < 0.1 and found.agreed >= 9


def test_differences_of_values() -> None:
    x = torch.tensor([3.0, 4.0])
    assert difference((x, 1), (x + torch.tensor([0.5, 0.0]), 1)) == pytest.approx(0.1)
    assert difference(torch.arange(4), torch.tensor([0, 1, 2, 9])) == 0.25
    assert difference(x, x[:1]) == difference(x, torch.tensor([3.0, torch.nan])) == float("inf")
    inf = torch.tensor([float("-inf"), 1.0])
    assert difference(inf, inf + torch.tensor([0.0, 1.0])) == 1.0


def test_a_model_without_graphs_is_refused() -> None:
    with pytest.raises(CompareError, match="no node computes"):
        qcompile.bisect(nn.Identity(), torch.ones(2))


def test_on_the_command_line(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import torch\nfrom torch import nn\n\ndef make():\n    torch.manual_seed(0)\n"
                      "    return nn.Sequential(nn.Linear(32, 64), nn.ReLU()).eval(), (torch.randn(2, 32),)\n")  # fmt: skip
    found = CliRunner().invoke(app, ["bisect", f"{script}:make", "--b", "int8", "--json"])
    assert found.exit_code == 1 and json.loads(found.stdout)["operator"] == "linear"
    none = CliRunner().invoke(app, ["bisect", f"{script}:make", "--a", "int8", "--b", "int8"])
    assert none.exit_code == 0 and "no node differs" in none.stdout
    for wrong, words in [("nowhere.py:make", "file.py:function"), (f"{script}:other", "no function 'other'")]:
        result = CliRunner().invoke(app, ["bisect", wrong])
        assert result.exit_code == 2 and words in " ".join(result.output.replace("│", " ").split())
