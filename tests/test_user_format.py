"""A format of a user's own, in a user's own file: the example of docs/formats.md through everything that follows from it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import qcompile
from qcompile.tensor import QuantizedTensor

DOCUMENT = (Path(__file__).parents[1] / "docs" / "formats.md").read_text()
PROGRAM = """
import sys, torch
sys.path.insert(0, {folder!r})
{first}
model = torch.nn.Sequential(torch.nn.Linear(300, 96), torch.nn.GELU(), torch.nn.Linear(96, 40)).eval()
model.load_state_dict(torch.load({file!r}, weights_only=True), assign=True)
with torch.no_grad():
    print(torch.compile(model, backend="qcompile")(torch.ones(3, 300)).sum().item())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``ternary.py``, the declaration as the document has it."""
    made = tmp_path_factory.mktemp("user")
    code = re.findall(r"```python\n(.*?)```", DOCUMENT, re.S)
    (made / "ternary.py").write_text(next(c for c in code if "register_format(" in c))
    return made


def declared(folder: Path) -> None:
    program = compile((folder / "ternary.py").read_text(), "ternary.py", "exec")
    exec(program, {"__name__": "ternary"})


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(300, 96), nn.GELU(), nn.Linear(96, 40)).eval()


def test_it_compiles_explains_saves_and_loads(folder: Path, tmp_path: Path, fresh_dynamo: None) -> None:
    declared(folder)
    model, x = network(), torch.ones(3, 300)
    compiled = torch.compile(model, backend="qcompile", options={"policy": {"*": "ternary_256"}})
    out = compiled(x)
    assert all(isinstance(m.weight, QuantizedTensor) for m in (model[0], model[2]))
    decoded = nn.functional.linear(x, model[0].weight.dequantize(), model[0].bias)
    reference = nn.functional.linear(nn.functional.gelu(decoded), model[2].weight.dequantize(), model[2].bias)
    torch.testing.assert_close(out, reference, rtol=1e-5, atol=1e-5)
    report = str(qcompile.explain(compiled, x))
    assert report.count("ternary_256") >= 2 and "cpp ternary_256" in report
    file = tmp_path / "weights.pt"
    torch.save(model.state_dict(), file)
    for first, wanted in (("import ternary, qcompile.tensor", True), ("import qcompile.tensor", False)):
        program = PROGRAM.format(folder=str(folder), first=first, file=str(file))
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=dict(os.environ))
        if wanted:
            assert done.returncode == 0, done.stderr[-2000:]
            assert abs(float(done.stdout.split()[-1]) - float(out.sum())) < 1e-3
        else:
            assert "unknown format 'ternary_256@" in done.stderr


def test_it_compiles_for_gpus(folder: Path) -> None:
    """Its kernels as machine code for every target, in a process of its own: Triton here compiles, not interprets."""
    program = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(folder)!r}]
import ternary, torch, triton_compile
from qcompile.formats import Scheme, get
for arch in triton_compile.ARCHES:
    for rows in (1, 16):
        kernels = triton_compile.Compiled(Scheme(get("ternary_256")), arch)
        kernels.run(rows, torch.bfloat16, bias=False)
        for fact in triton_compile.facts(kernels, rows, torch.bfloat16):
            print(fact["kernel"], fact["arch"], fact["spills"], len(fact["matrix"]))
"""
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert {r[1] for r in rows} == {"80", "89", "90", "100"} and all(r[2] == "0" for r in rows)
    assert all(int(r[3]) > 0 for r in rows if r[0] == "dot")
