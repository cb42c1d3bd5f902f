"""Adapters over frozen packed weights under one-line compile: what is packed, what is trained, and to which gradients."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import adapters
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

import qcompile
from qcompile.errors import StrictError
from qcompile.passes.notices import TRAINED
from qcompile.tensor import QuantizedTensor

DATA = torch.randn(4, 9, 64, generator=torch.Generator().manual_seed(1))
TARGET = torch.randn(4, 9, 24, generator=torch.Generator().manual_seed(2))
FROZEN = {f"blocks.{i}.{name}.base.weight" for i in (0, 1) for name in ("up", "down")} | {"head.weight"}

pytestmark = pytest.mark.usefixtures("reset_dynamo")


def compiled(model: nn.Module, policy: Any = "int4_g32", **options: Any) -> Any:
    return torch.compile(model, backend="qcompile", options={"policy": policy, **options})


def packed(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)}


def loss_of(model: nn.Module, rows: slice = slice(None)) -> torch.Tensor:
    return F.mse_loss(model(DATA[rows]).float(), TARGET[rows])


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in adapters.trained(model).items()}


def assert_near(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], bound: float) -> None:
    assert found.keys() == exact.keys() and len(found) == 8
    for name, grad in found.items():
        assert float((grad.double() - exact[name].double()).norm()) <= bound * float(exact[name].double().norm()), name


@pytest.mark.parametrize("policy", ["int8", "int4_g32", "nf4", "Q4_K", "fp8", "int8_dynamic"])
def test_the_first_call_packs_what_is_frozen_and_trains_the_rest(policy: str) -> None:
    """One graph, without warnings; both directions call kernels; gradients are the float64 ones of the decoded weights."""
    model = adapters.Adapted()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _, (forward, backward) = run_and_get_code(lambda: loss_of(compiled(model, policy)).backward())
    assert packed(model) == FROZEN and counters["stats"]["unique_graphs"] == 1
    assert forward.count("qcompile_linear(qcompile_") == 5 and "torch.ops.qcompile" not in forward
    assert "qcompile.linear_grad" in backward and "qcompile.decode" not in forward + backward
    exact = adapters.decoded(model).double()
    F.mse_loss(exact(DATA.double()), TARGET.double()).backward()
    if policy != "int8_dynamic":  # rounds activations
        assert_near(gradients(model), gradients(exact), 1e-5)
    else:
        assert_near(gradients(model), gradients(exact), 0.05)
    assert all(not p.requires_grad for name, p in model.named_parameters() if name in FROZEN)


def test_gradients_are_those_that_finite_differences_give() -> None:
    """Central differences of the loss, in float64 over the decoded weights, along a random direction of all adapters."""
    model = adapters.Adapted()
    loss_of(compiled(model, "nf4")).backward()
    exact = adapters.decoded(model).double()
    steps = {name: torch.randn(p.shape, dtype=torch.float64) for name, p in adapters.trained(exact).items()}

    def moved(by: float) -> float:
        changed = {n: p.detach() + by * steps[n] for n, p in adapters.trained(exact).items()}
        with torch.no_grad():
            return float(F.mse_loss(torch.func.functional_call(exact, changed, DATA.double()), TARGET.double()))

    difference = (moved(1e-5) - moved(-1e-5)) / 2e-5
    along = sum(float((g.double() * steps[name]).sum()) for name, g in gradients(model).items())
    assert along == pytest.approx(difference, rel=1e-5)


@pytest.mark.parametrize("first", ["training", "evaluation"])
def test_evaluating_leaves_what_is_trained(first: str) -> None:
    """A call without gradients packs frozen weights alone, also where it is the first."""
    model = adapters.Adapted()
    step = compiled(model)
    for mode in (first, "evaluation", "training"):
        if mode == "training":
            loss_of(step).backward()
        else:
            with torch.no_grad():
                loss_of(step)
    assert packed(model) == FROZEN and len(adapters.trained(model)) == 8
    assert counters["stats"]["unique_graphs"] == 2
    report = qcompile.explain(model, DATA)
    left = {r.decision.site.parameter: r.decision.reason for r in report.plan if r.decision.scheme is None}
    assert left == dict.fromkeys(adapters.trained(model), TRAINED)
    model.requires_grad_(False)
    with torch.no_grad():
        compiled(adapted := copy.deepcopy(model))(DATA)
    assert len(packed(adapted)) == 13


@torch.no_grad()
def test_models_that_nobody_froze_are_packed_whole() -> None:
    """Every parameter requires grad in an ordinary model that is called without gradients; some are packed in a graph before."""

    class Broken(adapters.Adapted):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.blocks[0](x)
            torch._dynamo.graph_break()
            x = self.blocks[1](x)
            return self.head(x)

    model = Broken().requires_grad_(True)
    compiled(model)(DATA)
    assert len(packed(model)) == 13


def test_forgotten_no_grad_still_warns() -> None:
    model = adapters.Adapted().requires_grad_(True)
    with pytest.warns(UserWarning, match="left 13 linear layers in floating point.*requires grad"):
        loss_of(compiled(model))
    assert not packed(model)


def test_packed_models_take_adapters_later() -> None:
    """Packed ahead of time, frozen and wrapped: the evaluation before training leaves the adapters."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 96), nn.LayerNorm(96), nn.Linear(96, 24))
    qcompile.quantize_(base, DATA, policy="int8")
    base.requires_grad_(False)
    base[0], base[2] = adapters.LoRA(base[0]), adapters.LoRA(base[2])
    step = compiled(base)
    with torch.no_grad():
        loss_of(step)
    loss_of(step).backward()
    assert packed(base) == {"0.base.weight", "2.base.weight"}
    assert all(p.grad is not None for p in adapters.trained(base).values())


def test_a_packed_model_that_nobody_froze_is_packed_on() -> None:
    """As a checkpoint gives it: some weights packed, all that is float requires grad."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.LayerNorm(96), nn.Linear(96, 24))
    qcompile.quantize_(model, DATA, policy={"0": "int8", "2": "float"})
    assert packed(model) == {"0.weight"} and model[2].weight.requires_grad
    with torch.no_grad():
        compiled(copy.deepcopy(model))(DATA)
        other = compiled(again := copy.deepcopy(model))
        other(DATA)
    assert packed(again) == {"0.weight", "2.weight"}


def test_layers_that_are_compiled_one_by_one() -> None:
    """Siblings of the first are packed with it, each with what is frozen of its own."""
    model = adapters.Adapted()
    model.blocks.append(adapters.Block())
    model.blocks[1].up.base.requires_grad_(True)
    for block in model.blocks:
        block.compile(backend="qcompile", options={"policy": "int8"})
    loss_of(model).backward()
    assert packed(model) == {f"blocks.{i}.{name}.base.weight" for i in (0, 1, 2) for name in ("up", "down")} - {
        "blocks.1.up.base.weight"
    }
    assert model.blocks[1].up.base.weight.grad is not None


def test_strict_asks_for_a_rule_for_what_is_trained() -> None:
    with pytest.raises(StrictError, match=r"it requires grad beside frozen weights(.|\n)*a rule with the value 'float'"):
        loss_of(compiled(adapters.Adapted(), strict=True))
    model = adapters.Adapted()
    loss_of(compiled(model, [("*.[ab]", "float"), ("*", "int8")], strict=True))
    assert packed(model) == FROZEN


@pytest.mark.parametrize("way", ["plain", "checkpoint", "autocast", "accumulate", "bfloat16"])
def test_ways_of_training(way: str) -> None:
    """Three steps of fused AdamW as eager PyTorch takes them over the decoded weights: recomputed activations, autocast,
    several backward passes a step, a bfloat16 model."""
    dtype = torch.bfloat16 if way == "bfloat16" else torch.float32
    model = adapters.Adapted(saves=way == "checkpoint").to(dtype)
    with torch.no_grad():
        compiled(model)(DATA.to(dtype))
    torch._dynamo.reset()
    reference = adapters.decoded(model)

    def train(called: Any, trained: nn.Module) -> list[float]:
        optimizer = torch.optim.AdamW(adapters.trained(trained).values(), 1e-2, fused=True)
        losses = []
        for _ in range(3):
            parts = (slice(0, 2), slice(2, 4)) if way == "accumulate" else (slice(None),)
            for rows in parts:
                with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
                    loss = F.mse_loss(called(DATA[rows].to(dtype)).float(), TARGET[rows]) / len(parts)
                loss.backward()
            losses.append(float(loss.detach()))
            optimizer.step()
            optimizer.zero_grad()
        return losses

    found, exact = train(compiled(model), model), train(reference, reference)
    assert exact[2] < 0.95 * exact[0]
    assert found == pytest.approx(exact, rel=2e-2 if way in ("autocast", "bfloat16") else 1e-4)
    assert len(packed(model)) == 5 and counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"]


def test_merged_adapters_are_packed_again() -> None:
    """In place, as ``weight.data += delta``; the sum is rounded once more, by no more than the format's own error."""
    torch.manual_seed(0)
    for policy, bound in (("int8", 0.01), ("int4_g32", 0.12), ("nf4", 0.12)):
        layer, delta = nn.Linear(64, 96), torch.randn(96, 64) / 20
        qcompile.quantize_(layer, DATA, policy=policy)
        before = layer.weight.dequantize()
        layer.weight.data += delta
        merged = layer.weight.dequantize()
        assert isinstance(layer.weight, QuantizedTensor)
        assert 0 < (merged - before - delta).norm() <= bound * (before + delta).norm()
        layer.weight.data -= delta
        assert (layer.weight.dequantize() - before).norm() <= 2 * bound * (before + delta).norm()


def test_data_of_a_packed_weight_is_replaced() -> None:
    layer, other = nn.Linear(64, 96), nn.Linear(64, 96)
    for one in (layer, other):
        qcompile.quantize_(one, DATA, policy="int8")
    layer.weight.data = other.weight.data.bfloat16()
    assert torch.equal(layer.weight.dequantize(), other.weight.dequantize().bfloat16())
    floats = torch.randn(96, 64)
    layer.weight.data = floats
    assert isinstance(layer.weight, QuantizedTensor) and (layer.weight.dequantize() - floats).norm() < 0.01 * floats.norm()
    with pytest.raises(qcompile.errors.UnsupportedOnTensorError, match=r"takes floats of its shape, found torch.float32 \[3\]"):
        layer.weight.data = torch.zeros(3)
