"""AWQ aims at the float model's outputs: every sample goes through the float model as well, beside the packed layers."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcompile
from qcompile.errors import WeightError
from qcompile.formats import Scheme, get
from qcompile.rounding import seen, target
from qcompile.rounding.layers import Layer
from qcompile.rounding.methods import METHODS
from qcompile.rounding.seen import Seen

WIDTH = 64


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh_dynamo: None, one_thread: None) -> None:
    monkeypatch.setenv("QCOMPILE_CACHE_DIR", str(tmp_path / "cache"))
    torch.manual_seed(0)


@dataclass
class Met:
    """What one layer was packed for: by sample, its inputs and those of the float model."""

    packed: dict[int, torch.Tensor]
    in_float: dict[int, torch.Tensor]


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Met]]:
    """By layer."""
    found: dict[str, Met] = {}
    drift_of = seen.drift

    def looking(inputs: Any, in_float: Any, layer: str) -> torch.Tensor:
        found[layer] = Met({n: x.clone() for n, x in inputs}, {n: x.clone() for n, x in in_float.items()})
        return drift_of(inputs, in_float, layer)

    monkeypatch.setattr("qcompile.passes.session.drift", looking)
    yield found
    assert not [t for t in threading.enumerate() if "calibration" in t.name], "no thread is left behind"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.third = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(F.silu(self.second(F.silu(self.first(x)))))


def samples(count: int = 4, seed: int = 2) -> list[torch.Tensor]:
    """``[1, tokens, WIDTH]`` of few strong directions."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH // 8, WIDTH, generator=torch.Generator().manual_seed(7))
    low = [torch.randn(1, 50 + 7 * (at % 3), WIDTH // 8, generator=draw) @ mix for at in range(count)]
    return [x + 0.2 * torch.randn(x.shape, generator=draw) for x in low]


def test_layers_see_what_the_float_model_gives_them(met: dict[str, Met]) -> None:
    model, data = Model(), samples()
    qcompile.calibrate(model, data, policy="int3_g32", method="awq")
    assert list(met) == ["first", "second", "third"]
    for number, x in enumerate(data):
        for name in met:
            torch.testing.assert_close(met[name].in_float[number], x, rtol=1e-5, atol=1e-5)
            off = (met[name].packed[number] - x).norm() / x.norm()
            assert off == 0 if name == "first" else off > 0.02
            x = F.silu(model.get_submodule(name)(x))


def test_outputs_are_nearer_than_where_layers_look_at_themselves_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = Model()

    def error() -> float:
        made = qcompile.calibrate(model, samples(), policy="int3_g32", method="awq").round_(Model())
        return sum(float((made(x) - model(x)).norm() / model(x).norm()) for x in samples(3, seed=99))

    together = error()
    monkeypatch.setenv("QCOMPILE_CACHE_DIR", str(tmp_path / "another"))
    monkeypatch.setitem(METHODS, "awq", replace(METHODS["awq"], with_float=False))
    assert together < 0.97 * error()


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.with_float])
def test_other_methods_do_without(met: dict[str, Met], method: str) -> None:
    policy = "int8_dynamic" if method == "smoothquant" else "int3_g32"
    assert len(qcompile.calibrate(Model(), samples(1), policy=policy, method=method)) == 3 and not met


class Astray(Model):
    """Whether a layer is used is decided by values, which the packed model has otherwise than the float one."""

    def __init__(self) -> None:
        super().__init__()
        self.exact = self.first(samples(3)[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if x.shape == self.exact.shape and torch.dist(x, self.exact) < 1e-3:
            x = self.second(x)
        return self.third(x)


def test_a_sample_that_goes_another_way_in_float_counts_with_its_own_inputs(met: dict[str, Met]) -> None:
    calibrated = qcompile.calibrate(Astray(), samples(3), policy="int3_g32", method="awq")
    assert calibrated.weights["second.weight"].note == "no sample reached a linear layer that multiplies by it"
    assert calibrated.weights["third.weight"].method == "awq"
    assert set(met["third"].packed) == {0, 1, 2} and set(met["third"].in_float) == {1, 2}


class Dropping(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(F.dropout(self.first(F.dropout(x, 0.5, self.training)), 0.5, self.training))


def test_random_numbers_are_the_same_in_float(met: dict[str, Met]) -> None:
    qcompile.calibrate(Dropping().train(), samples(), policy="int3_g32", method="awq")
    for number, x in met["first"].packed.items():
        assert torch.equal(x, met["first"].in_float[number]) and (x == 0).float().mean() > 0.4
    for number, x in met["second"].packed.items():
        assert torch.equal(x == 0, met["second"].in_float[number] == 0)


class Remembering(Model):
    def forward(self, x: torch.Tensor, past: list[torch.Tensor]) -> torch.Tensor:
        keep(past, self.first(x))
        return self.third(torch.stack(past).sum(0))


@torch._dynamo.disable
def keep(past: list[torch.Tensor], x: torch.Tensor) -> None:
    past.append(x)


def test_what_the_float_model_writes_to_its_arguments_is_not_seen_by_the_packed_one(met: dict[str, Met]) -> None:
    data: list[Any] = [(x, []) for x in samples(2)]
    qcompile.calibrate(Remembering(), data, policy="int3_g32", method="awq")
    for number, (x, past) in enumerate(data):
        assert len(past) == 1 and torch.equal(met["third"].packed[number], past[0])
        torch.testing.assert_close(met["third"].in_float[number], Model().first(x), rtol=1e-5, atol=1e-5)


def test_inputs_that_are_part_of_a_graph_of_gradients_are_taken() -> None:
    with torch.enable_grad():
        data = [nn.Linear(WIDTH, WIDTH)(x) for x in samples(2)]
    assert all(x.requires_grad and not x.is_leaf for x in data)
    assert len(qcompile.calibrate(Model(), data, policy="int4_g32", method="awq")) == 3


def test_what_cannot_be_copied_is_named() -> None:
    x = samples(1)[0]
    with pytest.raises(TypeError, match="cannot pickle") as raised:
        qcompile.calibrate(Model(), [x, {"x": x, "lock": threading.Lock()}], policy="int4_g32", method="awq")
    assert any("copying sample 1" in n and "lock=lock" in n and "method='gptq'" in n for n in raised.value.__notes__)


def drifted(weight: torch.Tensor, x: torch.Tensor, exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight aimed at, and H."""
    one = Seen.of([(0, x)], "up", with_hessian=True)
    one = replace(one, drift=seen.drift([(0, x)], {0: exact}, "up"))
    (aimed,) = target.aimed([Layer("up", Scheme(get("int4_g32")), weight)], one)
    assert one.hessian is not None
    return aimed.matrix, one.hessian


def off_by_little(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of a packed model and of the float one, off by what is linear in them and by noise."""
    exact = torch.cat(samples(12, seed=3), 1)[0, :, :width]
    return exact + 0.1 * exact @ torch.randn(width, width) / width**0.5 + 0.05 * torch.randn_like(exact), exact


def test_the_weight_aimed_at_is_where_the_gradient_is_zero() -> None:
    (x, exact), weight = off_by_little(48), torch.randn(20, 48)
    found, hessian = drifted(weight, x, exact)
    wanted = exact.double() @ weight.double().t()

    def gradient(at: torch.Tensor) -> torch.Tensor:
        v = at.double().requires_grad_()
        with torch.enable_grad():
            outputs = (x.double() @ v.t() - wanted).square().sum()
            near = (hessian.diagonal() * (v - weight).square()).sum()
            return torch.autograd.grad(outputs + target.DAMPING * near, v)[0]

    assert gradient(found).norm() < 1e-4 * gradient(weight).norm()
    assert (x @ found.t() - wanted).norm() < 0.7 * (x @ weight.t() - wanted).norm()


def test_sizes_of_columns_do_not_matter_and_inputs_that_are_always_zero_change_nothing() -> None:
    (x, exact), weight, size = off_by_little(48), torch.randn(20, 48), torch.logspace(-1.5, 1.5, 48)
    found, _ = drifted(weight, x, exact)
    torch.testing.assert_close(drifted(weight / size, x * size, exact * size)[0] * size, found, rtol=1e-3, atol=1e-3)
    x, exact = (torch.cat([t, torch.zeros(len(t), 2)], 1) for t in (x, exact))
    wider, _ = drifted(torch.cat([weight, torch.ones(20, 2)], 1), x, exact)
    torch.testing.assert_close(wider, torch.cat([found, torch.ones(20, 2)], 1))
    assert torch.equal(drifted(weight, x[:, :48], x[:, :48])[0], weight)


def test_an_h_that_is_no_sum_of_squares_is_refused() -> None:
    x = off_by_little(48)[0]
    one = replace(Seen.of([(0, x)], "up", with_hessian=True), hessian=-x.t() @ x, drift=x.t() @ x)
    with pytest.raises(WeightError, match=r"up: H = XᵀX has no Cholesky factor with 0\.3"):
        target.aimed([Layer("up", Scheme(get("int4_g32")), torch.randn(20, 48))], one)


def test_drift_is_of_the_samples_that_the_float_model_has_in_the_same_shape() -> None:
    x, exact = torch.randn(3, 2, 10, 8), torch.randn(3, 2, 10, 8)
    found = seen.drift(list(enumerate(x)), {1: exact[1], 2: exact[2, :1]}, "up")
    torch.testing.assert_close(found, (exact[1] - x[1]).flatten(0, 1).t() @ x[1].flatten(0, 1))
    exact[1, 0, 3, 5] = float("inf")
    with pytest.raises(WeightError, match=r"up: .* NaN or infinite values: in sample 1, at 1 of 8 inputs \(first: \[5\]\)"):
        seen.drift(list(enumerate(x)), {1: exact[1]}, "up")
