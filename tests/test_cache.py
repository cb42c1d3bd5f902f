"""What one process made, the next finds: weights, sources, libraries, calibrations, and the plan that saves it a trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import compilation_time_metrics

import qcompile
from qcompile import handover, packing
from qcompile.backend import listen
from qcompile.codegen import cpp_build
from qcompile.codegen.cpp import CpuKernels
from qcompile.codegen.tiles import smaller
from qcompile.codegen.triton import TritonKernels
from qcompile.errors import FingerprintError
from qcompile.formats import REGISTRY, FormatSpec, Plane, Scheme, huge_pages, symbols
from qcompile.packing import digest, packed
from qcompile.store import COUNTS, the_store
from qcompile.target import Target
from qcompile.tensor import QuantizedTensor, as_parameter, quantize

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "one_thread")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A store of its own for each test. Kernels that this process has loaded stay loaded."""
    monkeypatch.setenv("QCOMPILE_CACHE_DIR", str(tmp_path))
    COUNTS.clear()
    yield tmp_path
    COUNTS.clear()


class Layer(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class Model(nn.Module):
    def __init__(self, seed: int = 0, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(Layer(64, 64) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = F.silu(layer(x))
        return x


X = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))


def traces() -> int:
    """How often Dynamo has traced a frame, since the last reset."""
    return len(compilation_time_metrics.get("bytecode_tracing", ()))


def run(model: nn.Module, x: torch.Tensor = X, **options: Any) -> torch.Tensor:
    """The first call in a process, as it were: no compiled code is there."""
    torch._dynamo.reset()
    listen()
    compilation_time_metrics.clear()
    COUNTS.clear()
    compiled = torch.compile(model, backend="qcompile", options={"policy": "int8", **options})
    return compiled(x)


def made() -> dict[str, int]:
    return {name: COUNTS[name] for name in ("quantized", "generated", "compiled", "calibrated", "planned") if COUNTS[name]}


def test_the_second_process_makes_nothing_and_traces_once() -> None:
    first = run(Model())
    assert made()["quantized"] == 2 and made()["planned"] == 1
    assert traces() == 2
    model = Model()
    floats = [weakref.ref(p) for p in model.parameters() if p.dim() == 2]
    assert torch.equal(run(model), first)
    assert made() == {} and COUNTS["packed read"] == 2 and traces() == 1
    assert all(ref() is None for ref in floats)
    assert [type(layer.weight).__name__ for layer in model.layers] == ["Quantized_int8"] * 2
    assert all(plane.data_ptr() % 64 == 0 for layer in model.layers for plane in layer.weight.planes)
    report = qcompile.explain(torch.compile(model, backend="qcompile", options={"policy": "int8"}), X)
    assert report.plan.totals().quantized == 2 and all(r.sqnr is not None and r.sqnr > 30 for r in report.plan if r.kernel)
    assert "this process quantized 0 weights" in str(report)
    assert json.loads(report.to_json())["cache"]["packed read"] == 2


def test_eight_processes_at_once_make_each_thing_once(cache: Path) -> None:
    program = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
from test_cache import COUNTS, Model, X, qcompile
model = Model()
qcompile.quantize_(model, X, policy="int8")
with torch.no_grad():
    out = model(X)
print(json.dumps([dict(COUNTS), out.flatten().tolist()]))
"""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, str(Path(__file__).parent)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) for _ in range(8)]
    rows = []
    for process in started:
        out, err = process.communicate()
        assert process.returncode == 0, err
        rows.append(json.loads(out))
    total = {name: sum(row[0].get(name, 0) for row in rows) for name in ("quantized", "generated", "compiled")}
    assert total == {"quantized": 2, "generated": 1, "compiled": 2}
    assert all(row[1] == rows[0][1] for row in rows)


def test_layers_that_are_equal_share_one_entry() -> None:
    model = Model(layers=3)
    with torch.no_grad():
        model.layers[2].weight.copy_(model.layers[0].weight)
    run(model)
    assert made()["quantized"] == 2 and COUNTS["packed read"] == 1


class TestNothingIsShared:
    """Two that differ in one thing have two entries."""

    def quantized(self, model: nn.Module, **options: Any) -> int:
        run(model, **options)
        return COUNTS["quantized"]

    def test_in_one_weight(self) -> None:
        assert self.quantized(Model()) == 2
        other = Model()
        with torch.no_grad():
            other.layers[1].weight[3, 5] += 1e-3
        assert self.quantized(other) == 1
        assert self.quantized(Model(seed=1)) == 2

    def test_in_a_policy_setting(self) -> None:
        assert self.quantized(Model()) == 2
        assert self.quantized(Model(), policy="int4") == 2
        assert self.quantized(Model(), policy="int4_g64") == 2
        rules = {"layers.0": "int8", "*": "int4"}
        assert self.quantized(Model(), policy=rules) == 0  # both are there, under another plan
        assert traces() == 2

    def test_in_dtype_or_orientation(self) -> None:
        spec, weight = REGISTRY["int8"], torch.randn(64, 64)
        packed(weight, spec)
        for other, transposed in ((weight.double(), False), (weight, True), (weight.t().contiguous(), False)):
            before = COUNTS["quantized"]
            packed(other, spec, transposed=transposed)
            assert COUNTS["quantized"] == before + 1
        packed(weight.t().contiguous().t(), spec)  # other strides, the same values
        assert COUNTS["quantized"] == 4

    def test_in_the_expression_of_a_format(self) -> None:
        q, scale = symbols("q scale")
        planes = (Plane("scale", "bf16", 32), Plane("q", "u2"))
        weight, packs = torch.randn(32, 64), []
        for value in (scale * (q - 2), scale * (2 * q - 3)):
            packs.append(packed(weight, FormatSpec("test_cache_u2", planes, value=value)))
        assert COUNTS["quantized"] == 2
        packed(weight, FormatSpec("test_cache_u2", planes, value=scale * (q - 2), shrinks=(0.5,)))
        assert COUNTS["quantized"] == 3

    def test_in_the_version_of_the_compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        source = 'extern "C" int answer() { return 42; }\n'
        one = cpp_build.load_library(source)[1]
        real = cpp_build._identity
        monkeypatch.setattr(cpp_build, "_identity", lambda cxx, flags: real(cxx, flags) + "#define __VERSION__ another\n")
        assert cpp_build.load_library(source)[1] != one and COUNTS["compiled"] == 2
        monkeypatch.undo()

    def test_in_the_version_of_our_code_or_of_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        weight = torch.randn(32, 64)
        packed(weight, REGISTRY["int8"])
        with monkeypatch.context() as m:
            m.setattr(packing, "code_version", lambda *names: "another")
            packed(weight, REGISTRY["int8"])
        with monkeypatch.context() as m:
            m.setattr(torch, "__version__", "another")
            packed(weight, REGISTRY["int8"])
        assert COUNTS["quantized"] == 3
        packed(weight, REGISTRY["int8"])
        assert COUNTS["quantized"] == 3


def test_a_quantizer_that_cannot_be_told_is_not_kept() -> None:
    q, scale = symbols("q scale")

    def quantizer(spec: FormatSpec, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scale": weight.new_ones(len(weight), weight.shape[1] // 32, dtype=torch.bfloat16),
                "q": (weight > 0).to(torch.uint8)}  # fmt: skip

    spec = FormatSpec("test_cache_own", (Plane("scale", "bf16", 32), Plane("q", "u1")), scale * (2 * q - 1), quantizer=quantizer)
    weight = torch.randn(32, 64)
    packed(weight, spec), packed(weight, spec)
    assert COUNTS["quantized"] == 2
    with pytest.raises(FingerprintError, match="attribute `fingerprint`"):
        packing._quantizer(spec)
    quantizer.fingerprint = "signs, 1"  # type: ignore[attr-defined]
    packed(weight, spec), packed(weight, spec)
    assert COUNTS["quantized"] == 3 and COUNTS["packed read"] == 1


def test_digests_are_of_values(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(100, 70)
    assert digest(x) == digest(x.t().contiguous().t()) != digest(x.t())
    monkeypatch.setattr(packing, "BLOCK", 1000)
    blocks = digest(x)
    y = x.clone()
    y.view(-1)[-1] += 1
    assert blocks == digest(x.clone()) != digest(y)
    with pytest.raises(FingerprintError, match="no values of its own"):
        digest(torch.empty(3, device="meta"))


def test_calibrated_weights_are_kept_with_what_they_were_calibrated_on() -> None:
    first = run(Model(), rounding="gptq", policy="int4")
    assert made()["quantized"] == 2 and made()["calibrated"] == 2 and traces() == 2
    again = run(Model(), rounding="gptq", policy="int4")
    assert made() == {} and COUNTS["packed read"] == 2 and torch.equal(first, again) and traces() == 1
    run(Model(), X + 1, rounding="gptq", policy="int4")
    assert made() == {"quantized": 2, "calibrated": 2}
    run(Model(), policy="int4")
    assert made() == {"quantized": 2} and traces() == 2


class Switching(nn.Module):
    """One class and one set of shapes, whose graph depends on an attribute, and in some modes on whether weights are packed."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mode, self.one, self.two = mode, nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.mode == "one":
            return self.one(x)
        if self.mode == "odd":
            return self.two(self.one(x)) + self.one.weight.cumsum(0).sum()
        if self.mode == "asks":
            return self.two(self.one(x)) * (2 if hasattr(self.one.weight, "planes") else 1)
        if self.mode == "breaks":
            y = self.one(x)
            torch._dynamo.graph_break()
            return self.two(y)
        if self.mode == "fails":
            raise ValueError("on purpose")
        return self.two(self.one(x))


def in_files(weight: torch.Tensor) -> bool:
    """Whether the planes of a packed ``weight`` lie in pages of the store's files; does not look at them as users do."""
    files = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(x, 16) for x in line.split(maxsplit=1)[0].split("-"))
        files += [range(start, end)] if line.endswith(".safetensors") else []
    return any(getattr(weight, name).data_ptr() in pages for name in weight.__tensor_flatten__()[0] for pages in files)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mappings")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_first_call_goes_before_memory_is_handed_over(monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
    """Freeing float weights and copying planes out of files, each in its time or when someone looks at the planes."""
    monkeypatch.setattr(handover, "GRACE", 3600.0)
    with mode():
        first = run(Model())
    model = Model()
    storages = [layer.weight.untyped_storage()._weak_ref() for layer in model.layers]
    with mode():
        assert torch.equal(run(model), first) and made() == {}
    weights = [layer.weight for layer in model.layers]
    assert all(map(in_files, weights)) and not any(map(torch.UntypedStorage._expired, storages))
    assert torch.equal(weights[0].planes[0], weights[0].clone().planes[0])
    assert not any(map(in_files, weights)) and all(map(torch.UntypedStorage._expired, storages))
    assert torch.equal(model(X), first)
    list(map(torch.UntypedStorage._free_weak_ref, storages))


def test_weights_written_to_while_memory_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer comes between the copy of a plane and its storing, unless it waits."""
    run(Model())
    other = Model(seed=1)
    run(other)
    new = other.layers[0].weight
    spare, copy = new.clone(), huge_pages.copy
    for write in (lambda old: old.copy_(new), lambda old: setattr(old, "data", spare)):
        copied, written = threading.Event(), threading.Event()

        def slowly(plane: torch.Tensor, copied: threading.Event = copied, written: threading.Event = written) -> torch.Tensor:
            made = copy(plane)
            copied.set()
            written.wait(0.3)
            return made

        model = Model()
        with monkeypatch.context() as patch:
            patch.setattr(handover, "GRACE", 0.0)
            patch.setattr(huge_pages, "copy", slowly)
            run(model)
            assert made() == {} and copied.wait(60)
            with torch.no_grad():
                for layer in model.layers:
                    write(layer.weight)
            written.set()
            handover.settle()
        for layer in model.layers:
            assert torch.equal(layer.weight.dequantize(), new.dequantize())


def test_a_program_that_ends_does_not_wait() -> None:
    run(Model())
    program = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_cache as tests
from qcompile import handover
handover.GRACE = 3600.0
with torch.no_grad():
    tests.run(tests.Model())
assert "quantized" not in tests.made() and tests.COUNTS["packed read"] == 2 and handover._waiting
"""
    command = [sys.executable, "-c", program, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("mode", "needed"), [("one", 1), ("both", 1), ("breaks", 3), ("odd", 1), ("asks", 2)])
def test_graphs_that_differ_over_packed_weights_are_traced_over_them(mode: str, needed: int) -> None:
    """``needed``: traces of a second process; at a graph break Dynamo begins anew, and the rest is a second frame."""
    first = Switching(mode)
    wanted = run(first)
    run(Switching("both"))
    model = Switching(mode)
    assert torch.equal(run(model), wanted) and traces() == needed and made() == {}
    assert [type(p) for p in model.parameters()] == [type(p) for p in first.parameters()]


def test_one_trace_is_guarded_as_two_are() -> None:
    run(Model())
    model = Model()
    compiled = torch.compile(model, backend="qcompile", options={"policy": "int8"})
    torch._dynamo.reset()
    listen()
    compilation_time_metrics.clear()
    assert torch.equal(compiled(X), compiled(X)) and traces() == 1
    (guards,) = torch._dynamo.eval_frame._debug_get_cache_entry_list(Model.forward)
    assert str(guards.guard_manager).count("TENSOR_MATCH") >= 5  # two weights, two biases, x
    other = quantize(Model(seed=1).layers[0].weight, Scheme(REGISTRY["int4_g32"]))
    model.layers[0].weight = as_parameter(other)
    assert torch.equal(compiled(X), model(X)) and traces() == 2


def test_a_trace_that_fails_leaves_the_weights_as_they_were() -> None:
    run(Switching("both"))
    model = Switching("fails")
    floats = [model.one.weight, model.two.weight]
    with pytest.raises(ValueError, match="on purpose"):
        run(model)
    assert model.one.weight is floats[0] and model.two.weight is floats[1]
    assert not isinstance(model.one.weight, QuantizedTensor)


def test_nothing_is_packed_where_the_weights_are_trained() -> None:
    run(Model())
    model = Model()
    with torch.enable_grad(), pytest.warns(UserWarning, match="requires grad"):
        run(model).sum().backward()
    assert not isinstance(model.layers[0].weight, QuantizedTensor) and model.layers[0].weight.grad is not None


def test_nothing_is_packed_for_other_backends() -> None:
    run(Model())
    model = Model()
    torch._dynamo.reset()
    listen()
    torch.compile(model)(X)
    assert not isinstance(model.layers[0].weight, QuantizedTensor)


def test_tied_weights_stay_tied() -> None:
    def tied() -> Model:
        model = Model()
        model.layers[1].weight = model.layers[0].weight
        return model

    first = run(tied())
    model = tied()
    assert torch.equal(run(model), first) and traces() == 1
    assert model.layers[0].weight is model.layers[1].weight


def test_layers_that_are_compiled_one_by_one() -> None:
    def regional() -> Model:
        model = Model(layers=12)
        for layer in model.layers:
            layer.compile(backend="qcompile", options={"policy": "int8"})
        return model

    torch._dynamo.reset()
    listen()
    first = regional()(X)
    torch._dynamo.reset()
    listen()
    compilation_time_metrics.clear()
    COUNTS.clear()
    model = regional()
    assert torch.equal(model(X), first)
    assert made() == {} and traces() == 1
    assert all(isinstance(layer.weight, QuantizedTensor) for layer in model.layers)


def test_a_damaged_entry_gives_right_results() -> None:
    first = run(Model())
    for folder, _ in the_store().entries():
        for path in folder.iterdir():
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
    CpuKernels(Scheme(REGISTRY["int8"]))
    assert torch.equal(run(Model()), first)
    assert COUNTS["quarantined"] >= 2 and made()["quantized"] == 2


def test_nothing_kept_is_still_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILE_CACHE_SIZE", "0")
    first = run(Model())
    assert torch.equal(run(Model()), first) and made()["quantized"] == 2 and traces() == 2


def test_a_tile_that_spilled_is_not_tried_again() -> None:
    scheme, target = Scheme(REGISTRY["int4_g128"]), Target("cuda", "90")
    first = TritonKernels(scheme)
    chosen = first.variant(64, torch.bfloat16, target)
    assert first.fitting(chosen, 90) == chosen
    first.note_spills(chosen, 90)
    fitting = first.fitting(chosen, 90)
    assert fitting.tile == smaller(chosen.tile) and COUNTS["tuned"] == 1
    later = TritonKernels(scheme)
    assert later.fitting(chosen, 90) == fitting and COUNTS["tuned"] == 1 and COUNTS["tile read"] == 1
    assert TritonKernels(scheme).fitting(chosen, 80) == chosen  # another GPU


def test_eviction_during_use_is_a_miss() -> None:
    weight = torch.randn(32, 64)
    made = packed(weight, REGISTRY["int8"])
    real = the_store().find

    def dropped(kind: str, parts: Any) -> Path | None:
        found = real(kind, parts)
        the_store().clear()
        return found

    with pytest.MonkeyPatch.context() as m:
        m.setattr(type(the_store()), "find", lambda self, kind, parts: dropped(kind, parts))
        again = packed(weight, REGISTRY["int8"])
    assert COUNTS["quantized"] == 2 and all(torch.equal(a, b) for a, b in zip(made.planes, again.planes, strict=True))


def test_torchs_artifacts_carry_ours(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.compiler._cache import CacheArtifactManager

    with CacheArtifactManager.with_fresh_cache():
        first = run(Model())
        saved = torch.compiler.save_cache_artifacts()
        assert saved is not None
        artifacts, info = saved
        assert {key.split("/")[0] for key in info.artifacts["qcompile"]} >= {"packed", "plan"}
    monkeypatch.setenv("QCOMPILE_CACHE_DIR", str(cache / "elsewhere"))
    assert torch.compiler.load_cache_artifacts(artifacts) is not None
    assert torch.equal(run(Model()), first) and "quantized" not in made() and traces() == 1


def test_artifacts_that_cannot_be_kept_are_left_with_a_warning(cache: Path, monkeypatch: pytest.MonkeyPatch,
                                                               caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    from torch.compiler._cache import CacheArtifactManager

    with CacheArtifactManager.with_fresh_cache():
        first = run(Model())
        saved = torch.compiler.save_cache_artifacts()
    assert saved is not None
    (cache / "file").write_text("")
    monkeypatch.setenv("QCOMPILE_CACHE_DIR", str(cache / "file"))
    assert torch.compiler.load_cache_artifacts(saved[0]) is not None
    assert "an artifact is left" in caplog.text and torch.equal(run(Model()), first) and made()["quantized"] == 2


def test_warmup() -> None:
    model = Model()
    compiled = torch.compile(model, backend="qcompile", options={"policy": "int8"})
    warm = qcompile.warmup(compiled, [(1, 64), (3, 64), (X,), {"x": X[:2]}], dtype=torch.float32)
    assert warm.wait() and warm.done == warm.total == 4
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert isinstance(model.layers[0].weight, QuantizedTensor) and graphs > 0
    compiled(X)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    with pytest.raises(qcompile.errors.OptionError, match="expected a shape"):
        qcompile.warmup(compiled, ["x"])
    with pytest.raises(RuntimeError):
        qcompile.warmup(compiled, [(1, 7)], dtype=torch.float32, background=False)
