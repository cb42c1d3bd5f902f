"""Logs, traces, debug folders, repros, profiles: through the programs that users run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import profile

from qcompile.errors import KernelBuildError, WeightError
from qcompile.logs import ARTIFACTS
from qcompile.recorder import recorder_of
from qcompile.tensor import QuantizedTensor

PROGRAM = """
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
with torch.no_grad():
    torch.compile(model, backend="qcompile", options={"policy": "int8"})(torch.randn(2, 32))
"""

SOURCE = Path(torch.__file__).read_text(encoding="utf-8")
LATE_LOGS = SOURCE.rindex("_import_device_backends()") < SOURCE.rindex("_init_logs()")
"""Whether this torch reads TORCH_LOGS after it has imported extensions."""


def run(program: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "program.py").write_text(program)
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, "program.py"], cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("setting,shown", [("+qcompile", set(ARTIFACTS)), ("qcompile_plan", {"qcompile_plan"}),
                                           ("qcompile_graph,qcompile_code", {"qcompile_graph", "qcompile_code"})])  # fmt: skip
def test_torch_logs(setting: str, shown: set[str], tmp_path: Path) -> None:
    if not setting.startswith("+") and not LATE_LOGS:
        pytest.skip(f"torch {torch.__version__} reads TORCH_LOGS before it imports extensions; it knows +qcompile alone")
    done = run(PROGRAM, tmp_path, TORCH_LOGS=setting)
    assert done.returncode == 0, done.stderr
    marks = {"qcompile_graph": "qcompile_graph_before", "qcompile_plan": "2 of 2 sites quantized",
             "qcompile_code": "int qc_linear("}  # fmt: skip
    assert {name for name, mark in marks.items() if mark in done.stderr} == shown
    if "qcompile_graph" in shown:
        assert "qcompile_graph_after" in done.stderr and "torch._C._nn.linear" in done.stderr


def test_silence_without_torch_logs(tmp_path: Path) -> None:
    done = run(PROGRAM, tmp_path)
    assert done.returncode == 0 and "qcompile" not in done.stderr and not (tmp_path / "torch_compile_debug").exists()


def test_tlparse_shows_plan_graphs_and_code(tmp_path: Path) -> None:
    assert run(PROGRAM, tmp_path, TORCH_TRACE=str(tmp_path / "trace")).returncode == 0
    (log,) = (tmp_path / "trace").iterdir()
    tlparse = Path(sys.executable).with_name("tlparse")
    subprocess.run([tlparse, log, "-o", tmp_path / "page", "--no-browser"], check=True, capture_output=True)
    index = (tmp_path / "page" / "index.html").read_text()
    for name in ("graph_before", "graph_after", "plan_json", "plan_string", "code_int8"):
        assert f"qcompile_{name}" in index
    (plan,) = (tmp_path / "page").rglob("qcompile_plan_json*")
    assert [r["name"] for r in json.loads(plan.read_text())["records"]] == ["0", "2"]


def test_compile_debug_leaves_a_folder_with_a_script_that_runs(tmp_path: Path) -> None:
    assert run(PROGRAM, tmp_path, TORCH_COMPILE_DEBUG="1").returncode == 0
    (folder,) = (tmp_path / "torch_compile_debug").glob("run_*/qcompile/*")
    names = {p.name for p in folder.iterdir()}
    assert names == {"qcompile_graph_before.txt", "qcompile_graph_after.txt", "qcompile_plan.txt", "qcompile_plan.json",
                     "qcompile_code_int8.cpp", "repro.py", "values.pt"}  # fmt: skip
    done = subprocess.run([sys.executable, folder / "repro.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip() == "no failure", done.stderr


BAD_WEIGHT = PROGRAM.replace("with torch.no_grad", "model[2].weight.data[1, 5] = float('nan')\nwith torch.no_grad", 1)
COMPILER = "#!/bin/sh\ncase \"$*\" in */qcompile-*/*.cpp*) echo 'forced failure' >&2; exit 1;; esac\nexec c++ \"$@\"\n"


@pytest.mark.parametrize("kind", ["weight", "kernel", "own backend"])
def test_the_repro_of_a_failure_fails_in_the_same_way(kind: str, tmp_path: Path) -> None:
    environment = {"QCOMPILE_CACHE_DIR": str(tmp_path / "cache")} if kind == "kernel" else {}
    program = BAD_WEIGHT if kind == "weight" else PROGRAM
    if kind == "kernel":
        compiler = tmp_path / "broken-c++"
        compiler.write_text(COMPILER)
        compiler.chmod(0o755)
        environment["CXX"] = str(compiler)
    if kind == "own backend":  # a setting under which Inductor fails
        program = program.replace('"int8"}', '"int8", "inductor": {"joint_custom_pre_pass": 3}}')
    first = run(program, tmp_path, **environment)
    found = re.search(r"a script that repeats it: python (\S+repro\.py)", first.stderr)
    assert found is not None, first.stderr
    again = subprocess.run([sys.executable, found[1]], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert first.returncode == again.returncode == 1

    def last_words(text: str) -> str:
        found = re.findall(r"^(?:[\w.]*\.)?(\w*(?:Error|Failed|Exception)): (.*)$", text, re.M)
        return found[-1]

    assert last_words(first.stderr) == last_words(again.stderr)
    expected = {"weight": ("WeightError", "2"), "kernel": ("KernelBuildError", "0, 2"), "own backend": ("", "")}[kind]
    assert expected[0] in last_words(first.stderr)[0] and expected[1] in last_words(first.stderr)[1]


def stack() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).eval()


def test_a_weight_that_cannot_be_packed_stays_float_only_on_request(fresh_dynamo: None) -> None:
    x = torch.randn(2, 32)
    for fallback in ("error", "float"):
        model = stack()
        with torch.no_grad():
            model[2].weight[1, 5] = torch.nan
        compiled = torch.compile(model, backend="qcompile", options={"policy": "int8", "fallback": fallback})
        if fallback == "error":
            with pytest.raises(WeightError, match="2"):
                compiled(x)
            torch._dynamo.reset()
            continue
        with pytest.warns(UserWarning, match=r"left 1 layers in floating point \(2\): it cannot be packed"):
            out = compiled(x)
        assert isinstance(model[0].weight, QuantizedTensor) and not isinstance(model[2].weight, QuantizedTensor)
        torch.testing.assert_close(out, model(x), equal_nan=True)
        (_, left) = recorder_of(model).plan
        assert left.decision.scheme is None and "it cannot be packed" in (left.decision.reason or "")


def test_a_kernel_that_cannot_be_built_names_its_layers_before_any_weight_is_packed(
    fresh_dynamo: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qcompile.passes import pipeline

    def broken(key: str, device: str) -> None:
        if key.startswith("int4"):
            raise KernelBuildError("the compiler has a headache\nat length")

    monkeypatch.setattr(pipeline, "for_key", broken)
    policy, x = {"0": "int8", "2": "int4"}, torch.randn(2, 32)
    model = stack()
    with pytest.raises(KernelBuildError, match=r"(?s)1 layers need \(2\).*headache"):
        torch.compile(model, backend="qcompile", options={"policy": policy})(x)
    assert type(model[0].weight) is nn.Parameter
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match=r"left 1 layers .* \(2\): its kernel cannot be built: the compiler has a headache"):
        torch.compile(model, backend="qcompile", options={"policy": policy, "fallback": "float"})(x)
    assert isinstance(model[0].weight, QuantizedTensor) and type(model[2].weight) is nn.Parameter


def test_profiles_name_site_and_format(fresh_dynamo: None, tmp_path: Path) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = stack()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mlp(x)

    x = torch.randn(2, 32)
    compiled = torch.compile(Outer(), backend="qcompile", options={"policy": {"mlp.0": "int8", "mlp.2": "int4"}})
    compiled(x)
    with profile() as seen:
        compiled(x)
    seen.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    ours = [e for e in events if e.get("name", "").startswith("qcompile::linear")]
    assert [e["name"] for e in ours] == ["qcompile::linear int8 mlp.0", "qcompile::linear int4_g128 mlp.2"]
    assert all(e["dur"] > 0 for e in ours)


def test_equal_models_of_other_names_keep_their_names_in_profiles(fresh_dynamo: None) -> None:
    class One(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name
            self.add_module(name, nn.Linear(32, 32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return getattr(self, self.name)(x)

    names = set()
    for name in ("up", "down"):
        torch._dynamo.reset()
        compiled = torch.compile(One(name).eval(), backend="qcompile", options={"policy": "int8"})
        x = torch.ones(1, 32)
        compiled(x)
        with profile() as seen:
            compiled(x)
        names |= {e.key for e in seen.key_averages() if "qcompile::linear" in e.key}
    assert names == {"qcompile::linear int8 up", "qcompile::linear int8 down"}
