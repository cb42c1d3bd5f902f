"""Calibration on many samples: every method, what it leaves alone, what it keeps, what it says, and what it refuses."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcompile
from qcompile.errors import (
    CalibrationError,
    CheckpointError,
    CorruptCheckpointError,
    MissingTensorError,
    OptionError,
    PolicyError,
    WeightError,
)
from qcompile.formats import FormatSpec, Plane, reference, scaled, symbols
from qcompile.options import Options
from qcompile.recorder import recorder_of
from qcompile.rounding import gptq, seen
from qcompile.rounding.methods import METHODS
from qcompile.rounding.seen import Seen, outputs, relative_error
from qcompile.store import COUNTS
from qcompile.tensor import QuantizedTensor

WIDTH = 64


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh_dynamo: None, one_thread: None) -> Iterator[None]:
    """A store of the test's own, and no compiled code."""
    monkeypatch.setenv("QCOMPILE_CACHE_DIR", str(tmp_path / "cache"))
    torch.manual_seed(0)
    COUNTS.clear()
    yield


class Block(nn.Module):
    """Gate and up take one input, down another; every fourth channel of the input is large."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, 128), nn.Linear(WIDTH, 128), nn.Linear(128, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.layer_norm(x, (WIDTH,))
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    def __init__(self, blocks: int = 2, breaks: str = "") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 32)
        self.register_buffer("calls", torch.zeros(()))
        self.breaks = breaks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.blocks[0](x)
        if self.breaks == "once":
            torch._dynamo.graph_break()
        for block in self.blocks[1:]:
            if self.breaks == "each":
                torch._dynamo.graph_break()
            x = block(x)
        return self.head(x)


def samples(count: int = 6, seed: int = 2) -> list[torch.Tensor]:
    """Inputs ``[1, tokens, WIDTH]`` of different lengths, of few strong directions and channels that differ in size."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH // 4, WIDTH, generator=torch.Generator().manual_seed(7))
    size = torch.rand(WIDTH, generator=torch.Generator().manual_seed(8)).add(0.1).pow(2)
    found = []
    for at in range(count):
        low = torch.randn(1, 40 + 7 * (at % 3), WIDTH // 4, generator=draw) @ mix
        found.append((low + 0.3 * torch.randn(low.shape, generator=draw)) * size)
    return found


def error(model: nn.Module, packed: nn.Module) -> float:
    held_out = samples(3, seed=99)
    return sum(float((packed(x) - model(x)).norm() / model(x).norm()) for x in held_out)


def planes_of(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    return {n: p.planes for n, p in model.named_parameters() if isinstance(p, QuantizedTensor)}


def applied(policy: Any, **kwargs: Any) -> nn.Module:
    model = Model(**kwargs)
    qcompile.quantize_(model, samples(1)[0], policy=policy)
    return model


def same(a: qcompile.Calibration, b: qcompile.Calibration) -> bool:
    """Equal in every word and every bit."""
    if a.as_dict() != b.as_dict():
        return False
    pairs = [(e.packed, f.packed) for (_, e), (_, f) in zip(a, b, strict=True) if e.packed is not None]
    return all(torch.equal(p, q) for one, two in pairs for p, q in zip(one.planes, two.planes, strict=True))


@pytest.mark.parametrize(
    "method,policy,bound",
    [("gptq", "int4_g32", 0.75), ("awq", "int4_g32", 0.95), ("awq+gptq", "int4_g32", 0.75), ("smoothquant", "int8_dynamic", 0.9),
     ("imatrix", "int3_g32", 0.95)],
)  # fmt: skip
def test_every_method_is_better_than_nearest_on_other_inputs(method: str, policy: str, bound: float) -> None:
    model = Model()
    calibrated = qcompile.calibrate(model, samples(), policy=policy, method=method)
    assert [e.method for _, e in calibrated] == [method] * 7
    assert all(e.error < e.nearest for _, e in calibrated)
    assert error(model, applied(calibrated)) < bound * error(model, applied(policy))


def test_the_model_is_left_untouched() -> None:
    model = Model()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    qcompile.calibrate(model, samples(), policy="int4_g32")
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()), "the buffer that counts calls as well"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_layers_of_one_input_are_packed_together_and_see_earlier_errors() -> None:
    groups: list[int] = []
    seen_of = Seen.of

    def counting(inputs: Any, layer: str, with_hessian: bool) -> Seen:
        groups.append(len(inputs))
        return seen_of(inputs, layer, with_hessian)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qcompile.passes.session.Seen.of", counting)
        calibrated = qcompile.calibrate(Model(), samples(), policy="int4_g32")
    assert groups == [6] * 5, "gate and up are one group; every group sees all samples"
    # The first block's down was fitted to what packed gate and up compute: by hand, the same planes.
    block, first = Model().blocks[0], calibrated.weights
    for name in ("gate", "up"):
        packed = first[f"blocks.0.{name}.weight"].packed
        assert packed is not None
        block.get_parameter(f"{name}.weight").data = reference.decode(qcompile.formats.get("int4_g32"), packed.planes, 128, WIDTH)
    inputs = []
    for number, x in enumerate(samples()):
        h = F.layer_norm(x, (WIDTH,))
        inputs.append((number, F.silu(block.gate(h)) * block.up(h)))
    hessian = Seen.of(inputs, "down", with_hessian=True).hessian
    assert hessian is not None
    by_hand = gptq.quantize(qcompile.formats.get("int4_g32"), block.down.weight.data, hessian)
    found = first["blocks.0.down.weight"].packed
    assert found is not None and all(map(torch.equal, by_hand, found.planes))


@pytest.mark.parametrize("method,count", [("gptq", 6), ("awq", 12)])
def test_inputs_of_a_layer_are_let_go_before_the_next_layer(method: str, count: int) -> None:
    """Those of the float model as well, where it goes along."""
    last: list[weakref.ref[torch.Tensor]] = []
    seen_of, drift_of = Seen.of, seen.drift

    def looking(inputs: Any, layer: str, with_hessian: bool) -> Seen:
        assert all(ref() is None for ref in last), f"inputs of the layer before {layer} are alive"
        last[:] = [weakref.ref(x) for _, x in inputs]
        return seen_of(inputs, layer, with_hessian)

    def looking_aside(inputs: Any, in_float: Any, layer: str) -> torch.Tensor:
        last.extend(weakref.ref(x) for x in in_float.values())
        return drift_of(inputs, in_float, layer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qcompile.passes.session.Seen.of", looking)
        patch.setattr("qcompile.passes.session.drift", looking_aside)
        qcompile.calibrate(Model(), samples(), policy="int4_g32", method=method)
    assert len(last) == count


def test_one_sample_gives_what_the_backend_gives_by_itself() -> None:
    x = samples(1)[0]
    calibrated = qcompile.calibrate(Model(), [x], policy="int4_g32")
    model = Model()
    torch.compile(model, backend="qcompile", options={"policy": "int4_g32", "rounding": "gptq"})(x)
    for name, planes in planes_of(model).items():
        packed = calibrated.weights[name].packed
        assert packed is not None and all(map(torch.equal, packed.planes, planes))


def test_the_backend_packs_what_was_found_and_says_so() -> None:
    calibrated = qcompile.calibrate(Model(), samples(), policy={"head": "float", "*": "int4_g32"}, method="awq")
    model, x = Model(), samples(1)[0]
    compiled = torch.compile(model, backend="qcompile", options={"policy": calibrated})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="rounding=")
        out = compiled(x)
    for name, planes in planes_of(model).items():
        packed = calibrated.weights[name].packed
        assert packed is not None and all(map(torch.equal, packed.planes, planes))
        assert not any(a.data_ptr() == b.data_ptr() for a, b in zip(packed.planes, planes, strict=True))
    assert sorted(planes_of(model)) == sorted(calibrated.weights) and len(calibrated) == 6
    torch.testing.assert_close(out, model(x), rtol=1e-3, atol=1e-3)
    packed_records = [r for r in recorder_of(model).plan if r.decision.scheme is not None]
    assert all("calibrated by awq (α =" in r.decision.rule for r in packed_records)
    assert {r.decision.scheme.format.name for r in packed_records} == {"int4_g32_scaled"}  # type: ignore[union-attr]
    report = str(qcompile.explain(Model(), x, policy=calibrated).unfolded())
    assert report.count("calibrated by awq") == 6


@pytest.mark.parametrize("breaks,method", [("once", "gptq"), ("each", "gptq"), ("each", "awq")])
def test_graph_breaks_change_nothing(breaks: str, method: str) -> None:
    """One break, or one in a loop, where Dynamo compiles blocks alone and has one graph for all of them."""
    whole = qcompile.calibrate(Model(3), samples(), policy="int4_g32", method=method)
    broken = qcompile.calibrate(Model(3, breaks), samples(), policy="int4_g32", method=method)
    unseen = ("head.weight",) if breaks == "each" else ()  # a layer that Dynamo does not see there
    assert broken.unseen == unseen and set(broken.weights) == set(whole.weights) - set(unseen)
    for name, entry in broken:
        other = whole.weights[name].packed
        assert entry.packed is not None and other is not None and all(map(torch.equal, entry.packed.planes, other.planes)), name


class Choosing(nn.Module):
    """Samples take different ways: one layer for long inputs, one that no sample reaches, one that Dynamo does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.long, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.never, self.eager = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, skip: bool = True) -> torch.Tensor:
        x = self.first(x)
        if x.shape[1] > 50:
            x = self.long(x)
        x = aside(self.eager, x)
        return self.last(x if skip else self.never(x))


@torch._dynamo.disable
def aside(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return layer(x)


def test_samples_may_take_different_ways_and_unseen_layers_are_named() -> None:
    model = Choosing()
    calibrated = qcompile.calibrate(model, samples(), policy="int4_g32")
    assert set(calibrated.weights) == {"first.weight", "long.weight", "last.weight"}
    assert calibrated.unseen == ("never.weight", "eager.weight")
    lines = str(calibrated).splitlines()
    assert any("never.weight" in line and "no graph used it" in line for line in lines)
    x = samples(1)[0]
    compiled = torch.compile(model, backend="qcompile", options={"policy": calibrated})
    with pytest.warns(UserWarning, match=r"1 weights to nearest.*\(never\)"):
        compiled(x, skip=False)
    rule = next(r.decision.rule for r in recorder_of(model).plan if r.decision.site.name == "never")
    assert "rounded to nearest: no graph of the calibration had the layer" in rule


def own_quantizer() -> FormatSpec:
    q, scale = symbols("q scale")

    def quantizer(spec: FormatSpec, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        size = weight.view(len(weight), -1, 32).abs().amax(-1).clamp_min(1e-6) / 7
        code = (weight / size.repeat_interleave(32, 1)).round().add(8).to(torch.uint8)
        return {"scale": size.to(torch.bfloat16), "q": code}

    planes = (Plane("scale", "bf16", 32), Plane("q", "u4"))
    return FormatSpec("calibrate_own", planes, scale * (q - 8), quantizer=quantizer)


@pytest.mark.parametrize(
    "method,policy,reason",
    [("gptq", own_quantizer(), "has its own quantizer"), ("imatrix", "int8", "are not searched for"),
     ("smoothquant", "int8", "nothing to smooth"), ("awq", scaled(qcompile.formats.get("int4_g32")), "has factors already")],
    ids=["gptq", "imatrix", "smoothquant", "awq"],
)  # fmt: skip
def test_what_a_method_does_not_serve_is_rounded_to_nearest_and_says_why(method: str, policy: Any, reason: str) -> None:
    calibrated = qcompile.calibrate(Model(1), samples(2), policy=policy, method=method)
    assert all(e.method == "nearest" and reason in e.note and e.error == e.nearest for _, e in calibrated)
    assert str(calibrated).count(reason) == 4 and f"0 of 4 weights calibrated by {method}" in str(calibrated)
    assert "rounded to nearest: " in str(qcompile.explain(Model(1), samples(1)[0], policy=calibrated))


class Transposed(nn.Module):
    """GPT-2's linear layer, whose weight is ``[K, N]``, a product with a parameter, and a layer of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Parameter(torch.randn(WIDTH, 100) / 8)
        self.factor, self.odd = nn.Parameter(torch.randn(100, WIDTH) / 10), nn.Linear(WIDTH, 37)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.addmm(x.new_zeros(100), x.view(-1, WIDTH), self.conv).view(*x.shape[:-1], 100)
        return self.odd(torch.tanh(y) @ self.factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_weights_of_any_orientation_size_and_dtype(method: str, dtype: torch.dtype) -> None:
    policy = "int8_dynamic" if method == "smoothquant" else "int3_g32"
    model, data = Transposed().to(dtype), [x.to(dtype) for x in samples(4)]
    calibrated = qcompile.calibrate(model, data, policy=policy, method=method)
    assert set(calibrated.weights) == {"conv", "factor", "odd.weight"} and all(e.method == method for _, e in calibrated)
    assert all(e.error <= 1.02 * e.nearest for _, e in calibrated)
    packed, y = Transposed().to(dtype), model(data[0])
    qcompile.quantize_(packed, data[0], policy=calibrated)
    assert (packed(data[0]) - y).norm() < 0.35 * y.norm()


def test_calls_run_under_the_callers_autocast() -> None:
    dtypes: set[torch.dtype] = set()
    seen_of = Seen.of

    def looking(inputs: Any, layer: str, with_hessian: bool) -> Seen:
        dtypes.update(x.dtype for _, x in inputs)
        return seen_of(inputs, layer, with_hessian)

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr("qcompile.passes.session.Seen.of", looking)
        qcompile.calibrate(Stack(), samples(2), policy="int4_g32")
    assert dtypes == {torch.float32, torch.bfloat16}, "the model's input, and what the first layer gives under autocast"


class Stack(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))


def test_float_weights_are_let_go() -> None:
    """Dynamo keeps what a calibration compiled; that must not keep the weights that were packed since."""
    model = Model()
    calibrated = qcompile.calibrate(model, samples(), policy="int4_g32")
    floats = [weakref.ref(p) for p in model.parameters() if p.dim() == 2]
    qcompile.quantize_(model, samples(1)[0], policy=calibrated)
    gc.collect()
    assert len(planes_of(model)) == 7 and all(ref() is None for ref in floats)


def test_a_language_model_with_a_cache_on_texts_of_different_lengths() -> None:
    model, _, _ = models.trained_decoder()
    draw = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(0, 2048, (1, tokens), generator=draw)} for tokens in (48, 31, 64)]
    calibrated = qcompile.calibrate(model, data, policy="int4", method="gptq")
    assert len(calibrated) == 29 and not calibrated.unseen and {e.method for _, e in calibrated} == {"gptq"}
    assert sum(e.error < e.nearest for _, e in calibrated) >= 28


def test_a_tied_table_is_left_to_nearest() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mid = nn.Embedding(96, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return F.linear(self.mid(self.embed(ids)), self.embed.weight)

    calibrated = qcompile.calibrate(Tied(), [torch.randint(0, 96, (2, 30))], policy="int4_g32")
    assert calibrated.weights["mid.weight"].method == "gptq"
    assert calibrated.weights["embed.weight"].method == "nearest" and "embedding" in calibrated.weights["embed.weight"].note


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    calibrated = qcompile.calibrate(Model(), samples(), policy={"head": "int8", "*": "int4_g32"}, method="awq")
    folder = calibrated.save(tmp_path / "saved")
    assert sorted(p.name for p in folder.iterdir()) == ["calibration.json", "planes.safetensors"]
    loaded = qcompile.Calibration.load(folder)
    assert same(loaded, calibrated) and loaded.policy == calibrated.policy and str(loaded) == str(calibrated)
    x = samples(1)[0]
    assert torch.equal(applied(loaded)(x), applied(calibrated)(x))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_float_weights_take_the_values_that_were_found(method: str) -> None:
    calibrated = qcompile.calibrate(Model(), samples(), policy={"head": "int8", "*": "int4_g32"}, method=method)
    model, x = Model(), samples(1)[0]
    packed = {name: p.dequantize() for name, p in applied(calibrated).named_parameters() if isinstance(p, QuantizedTensor)}
    assert calibrated.round_(model) is model and packed
    for name, decoded in packed.items():
        assert type(model.get_parameter(name)) is nn.Parameter and torch.equal(model.get_parameter(name), decoded)
    other = Model()
    other.head.weight.data[0, 0] += 0.5
    before = {name: p.clone() for name, p in other.named_parameters()}
    with pytest.raises(PolicyError, match="head: calibrated for other weights"):
        calibrated.round_(other)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())  # nothing was written
    with pytest.raises(PolicyError, match="calibration is of another model"):
        calibrated.round_(nn.Sequential(nn.Linear(WIDTH, 8)))
    assert torch.isfinite(model(x)).all()


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    folder = qcompile.calibrate(Model(1), samples(2), policy="int4_g32").save(tmp_path / "saved")
    record = folder / "calibration.json"
    good = record.read_text()

    def changed(**parts: Any) -> None:
        record.write_text(json.dumps(json.loads(good) | parts))

    for text, error, words in [("{", CorruptCheckpointError, "is no JSON"), ("[]", CheckpointError, "version None")]:
        record.write_text(text)
        with pytest.raises(error, match=words):
            qcompile.Calibration.load(folder)
    changed(version=9)
    with pytest.raises(CheckpointError, match="version 9; this release reads 1"):
        qcompile.Calibration.load(folder)
    weights = json.loads(good)["weights"]
    changed(weights={"head.weight": weights["head.weight"] | {"shape": [64, 64]}})
    with pytest.raises(CorruptCheckpointError, match=r"head\.weight"):
        qcompile.Calibration.load(folder)
    changed(weights={"other.weight": weights["head.weight"]})
    with pytest.raises(MissingTensorError, match=r"other\.weight.*no plane"):
        qcompile.Calibration.load(folder)
    record.unlink()
    with pytest.raises(MissingTensorError, match=r"no calibration\.json"):
        qcompile.Calibration.load(folder)


def test_other_weights_and_other_models_are_refused() -> None:
    calibrated = qcompile.calibrate(Model(), samples(2), policy="int4_g32")
    model, x = Model(), samples(1)[0]
    model.blocks[1].up.weight.data[3, 5] += 0.5
    with pytest.raises(PolicyError, match=r"blocks\.1\.up: calibrated for other weights.*calibrate it"):
        qcompile.quantize_(model, x, policy=calibrated)
    with pytest.raises(PolicyError, match=r"blocks\.1\.up: calibrated for other weights"):
        torch.compile(model, backend="qcompile", options={"policy": calibrated})(x)
    with pytest.raises(PolicyError, match="calibration is of another model"):
        qcompile.quantize_(nn.Sequential(nn.Linear(WIDTH, 8)), x, policy=calibrated)
    with pytest.raises(OptionError, match="rounded already"):
        Options.parse({"policy": calibrated, "rounding": "gptq"}, None)
    with pytest.raises(OptionError, match="unknown option 'calibration'"):
        Options.parse({"calibration": calibrated}, None)


def test_bad_data_is_refused_with_the_sample_that_is_bad() -> None:
    good, model = samples(2), Model(1)
    with pytest.raises(CalibrationError, match="no data"):
        qcompile.calibrate(model, [], policy="int4_g32")
    for one in (good[0], {"x": good[0]}):
        with pytest.raises(CalibrationError, match=r"data is one (Tensor|dict).*write \[data\]"):
            qcompile.calibrate(model, one, policy="int4_g32")
    with pytest.raises(TypeError, match="words") as raised:
        qcompile.calibrate(model, [good[0], {"words": good[1]}], policy="int4_g32")
    assert any("sample 1" in note and "words=float32[1, 47, 64]" in note for note in raised.value.__notes__)
    bad = good[1].clone()
    bad[0, 3, 5] = float("nan")
    with pytest.raises(WeightError, match=r"blocks\.0\.gate: the inputs.*in sample 1"):
        qcompile.calibrate(model, [good[0], bad], policy="int4_g32")
    with pytest.raises(CalibrationError, match="nothing to calibrate.*leaves it in floating point"):
        qcompile.calibrate(model, good, policy="float")
    with pytest.raises(OptionError, match="method 'gptk' is no way to calibrate. Did you mean 'gptq'"):
        qcompile.calibrate(model, good, policy="int4_g32", method="gptk")
    assert not [t for t in threading.enumerate() if "calibration" in t.name], "no thread is left behind"


def test_a_hessian_without_a_factor_is_damped_more_or_refused() -> None:
    x = torch.randn(300, WIDTH)
    hessian = x.t() @ x
    values, vectors = torch.linalg.eigh(hessian.double())
    values[0] = -0.05 * float(hessian.diagonal().mean())  # beyond what one hundredth of the diagonal makes up for
    slightly = (vectors * values) @ vectors.t()
    assert gptq.Curvature.of(hessian, WIDTH).damping == gptq.DAMPING
    assert gptq.Curvature.of(slightly.float(), WIDTH).damping == pytest.approx(0.1)
    values[0] = -1e4 * float(hessian.diagonal().mean())
    with pytest.raises(WeightError, match=r"mlp\.up: H = XᵀX has no Cholesky factor"):
        gptq.Curvature.of(((vectors * values) @ vectors.t()).float(), WIDTH, "mlp.up")


def test_stronger_damping_is_told_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    damped = gptq._damped
    monkeypatch.setattr(gptq, "_damped", lambda h, cols, share: None if share < 0.5 else damped(h, cols, share))
    calibrated = qcompile.calibrate(Model(1), samples(2), policy="int4_g32")
    assert all(e.note == "damping 1" for _, e in calibrated) and str(calibrated).count("damping 1") == 4


def test_statistics_are_sums_over_all_samples() -> None:
    inputs = list(enumerate(samples(5)))
    rows = torch.cat([x.reshape(-1, WIDTH) for _, x in inputs]).double()
    seen = Seen.of(inputs, "layer", with_hessian=True)
    assert seen.rows == len(rows) and seen.sample.shape[1] == WIDTH
    torch.testing.assert_close(seen.mean_square.double(), rows.square().mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen.mean_abs.double(), rows.abs().mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen.largest.double(), rows.abs().amax(0), rtol=1e-5, atol=1e-6)
    assert seen.hessian is not None
    torch.testing.assert_close(seen.hessian.double(), rows.t() @ rows, rtol=1e-4, atol=1e-4)


def test_output_errors_are_those_of_the_kernels() -> None:
    """Of a scaled format with int8 activations, as of plain ones."""
    x, weight = samples(1)[0].view(-1, WIDTH), torch.randn(32, WIDTH)
    int8, int4 = qcompile.formats.get("int8"), qcompile.formats.get("int4_g32")
    for scheme in (qcompile.Scheme(int8, "int8"), qcompile.Scheme(scaled(int8), "int8"), qcompile.Scheme(int4)):
        factors = torch.rand(WIDTH).add(0.5) if scheme.format.scaled else None
        planes = reference.quantize(scheme.format, weight, factors=factors)
        decoded = reference.decode(scheme.format, planes, 32, WIDTH)
        got = F.linear(x, qcompile.tensor.tensor_class(scheme)(planes, weight.shape, weight.dtype))
        expected = float((got - x @ weight.t()).norm() / (x @ weight.t()).norm())
        assert relative_error(*outputs(x, weight, decoded, scheme.activations, factors)) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("method,another", [("gptq", "awq"), ("awq", "gptq")])
def test_a_second_run_reads_everything_and_other_data_nothing(method: str, another: str) -> None:
    first = qcompile.calibrate(Model(), samples(), policy="int4_g32", method=method)
    assert COUNTS["calibrated"] == 5 and COUNTS["quantized"] == 7
    COUNTS.clear()
    again = qcompile.calibrate(Model(), samples(), policy="int4_g32", method=method)
    assert same(first, again) and COUNTS["calibrated"] == 0 and COUNTS["quantized"] == 0 and COUNTS["calibration read"] == 5
    other = qcompile.calibrate(Model(), samples(seed=3), policy="int4_g32", method=method)
    assert COUNTS["calibrated"] == 5 and not same(first, other)
    qcompile.calibrate(Model(), samples(), policy="int4_g32", method=another)
    assert COUNTS["calibrated"] == 10


PROGRAM = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
import test_calibrate as t
import qcompile
from qcompile.passes import session
if len(sys.argv) > 3:
    serve, served = session.Session.serve, []
    def until(self, weights, *stops):
        serve(self, weights, *stops)
        served.append(weights)
        if len(served) == int(sys.argv[3]):
            os.kill(os.getpid(), 9)
    session.Session.serve = until
torch.set_num_threads(1)
found = qcompile.calibrate(t.Model(), t.samples(), policy="int4_g32")
found.save(sys.argv[2])
print(t.COUNTS["calibrated"], t.COUNTS["calibration read"])
"""


def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    def run(folder: str, *until: str, cache: str = "one") -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"QCOMPILE_CACHE_DIR": str(tmp_path / cache)}
        command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), str(tmp_path / folder), *until]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    killed = run("killed", "3")
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "killed").exists(), killed.stderr
    resumed, whole = run("resumed"), run("whole", cache="two")
    assert resumed.stdout.split() == ["2", "3"], resumed.stderr
    assert whole.stdout.split() == ["5", "0"], whole.stderr
    assert same(qcompile.Calibration.load(tmp_path / "resumed"), qcompile.Calibration.load(tmp_path / "whole"))


def test_progress_is_shown_where_it_is_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    qcompile.calibrate(Model(1), samples(2), policy="int4_g32", progress=True)
    assert "qcompile: gptq" in (shown := capfd.readouterr().err) and "4/4" in shown
    qcompile.calibrate(Model(1), samples(2), policy="int4_g32", progress=False)
    assert capfd.readouterr().err == ""


def test_the_documentation_names_every_method() -> None:
    text = (Path(__file__).parents[1] / "docs" / "calibration.md").read_text()
    assert not [name for name in METHODS if f"`{name}`" not in text]
