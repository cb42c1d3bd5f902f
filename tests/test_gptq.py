"""Rounding by GPTQ: smaller errors at layers' outputs, through the one line, for every kind of linear layer."""

import warnings
from collections.abc import Callable, Iterator

import models
import pytest
import torch
import torch.nn.functional as F
from calibration import CALIBRATION
from torch import nn

import qcompile
from qcompile import formats
from qcompile.errors import FormatError, OptionError, WeightError
from qcompile.formats import FormatSpec, Plane, reference, search, symbols
from qcompile.formats.codes import nearest_code
from qcompile.options import Options
from qcompile.passes.convert import Conversion
from qcompile.passes.pipeline import Compilation
from qcompile.recorder import recorder_of
from qcompile.rounding import gptq
from qcompile.tensor import QuantizedTensor

SPECS = list(formats.REGISTRY.values())
OPTIONS = {"policy": "int4_g32", "rounding": "gptq"}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def correlated(tokens: int, width: int) -> torch.Tensor:
    """Inputs [tokens, width] of a few strong directions and of channels that differ in size, as real layers have."""
    mixed = torch.randn(tokens, width // 4) @ torch.randn(width // 4, width) + 0.3 * torch.randn(tokens, width)
    return mixed * torch.rand(width).add(0.1).pow(2)


def output_error(weight: torch.Tensor, rounded: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (weight - rounded).t()).norm() / (x @ weight.t()).norm())


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
@pytest.mark.parametrize("n,k", [(37, 100), (64, 256)])
def test_outputs_change_less_than_under_nearest(spec: FormatSpec, n: int, k: int) -> None:
    weight, x = torch.randn(n, k), correlated(600, k)
    train, held_out = x[:400], x[400:]
    by = {}
    for name, planes in [("nearest", reference.quantize(spec, weight)), ("gptq", gptq.quantize(spec, weight, train.t() @ train))]:
        by[name] = output_error(weight, reference.decode(spec, planes, n, k), held_out)
    assert by["gptq"] < 0.8 * by["nearest"]


def test_rows_in_chunks_are_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, weight, x = formats.get("int4_g32"), torch.randn(80, 64), correlated(200, 64)
    whole = gptq.quantize(spec, weight, x.t() @ x)
    monkeypatch.setattr(gptq, "CHUNK_ELEMENTS", 16 * 64)
    decoded = [reference.decode(spec, p, 80, 64) for p in (whole, gptq.quantize(spec, weight, x.t() @ x))]
    # Sums in another order may turn a tie; outputs are as good.
    assert (decoded[0] == decoded[1]).float().mean() > 0.99


def test_uncorrelated_inputs_leave_nothing_to_make_up_for() -> None:
    spec, weight = formats.get("int4_g32"), torch.randn(16, 64)
    planes = gptq.quantize(spec, weight, torch.eye(64))
    found = search.fit(spec, weight, None, shrinks=gptq.SHRINKS)
    scale, zero = found.scale.unsqueeze(-1), found.offset.unsqueeze(-1)
    code = nearest_code(spec, (weight.view(16, 2, 32) - zero) / scale)
    expected = (scale * (code.float() - 8) + zero).view(16, 64)
    torch.testing.assert_close(reference.decode(spec, planes, 16, 64), expected)


def test_dead_and_few_inputs() -> None:
    spec, weight = formats.get("int4_g32"), torch.randn(16, 64)
    for x in (torch.zeros(4, 64), F.pad(torch.randn(3, 32), (0, 32))):
        decoded = reference.decode(spec, gptq.quantize(spec, weight, x.t() @ x), 16, 64)
        assert (decoded - weight).norm() < 0.3 * weight.norm()


def test_bad_inputs_are_named() -> None:
    spec, weight = formats.get("int4_g32"), torch.randn(16, 64)
    with pytest.raises(WeightError, match=r"mlp\.up.*inputs.*NaN"):
        gptq.quantize(spec, weight, torch.full((64, 64), float("nan")), "mlp.up")
    with pytest.raises(WeightError, match=r"mlp\.up.*weight has NaN"):
        gptq.quantize(spec, weight.index_fill(0, torch.tensor([3]), float("nan")), torch.eye(64), "mlp.up")
    with pytest.raises(FormatError, match=r"mlp\.up.*two_scales.*rounding='nearest'"):
        gptq.quantize(two_scales(), weight, torch.eye(64), "mlp.up")
    with pytest.raises(OptionError, match="rounding.*'best'"):
        torch.compile(nn.Linear(64, 64), backend="qcompile", options={"rounding": "best"})(torch.randn(2, 64))


def two_scales() -> FormatSpec:
    """A format that GPTQ does not serve: it has a quantizer of its own."""
    q, scale, row = symbols("q scale row")

    def quantizer(spec: FormatSpec, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        groups = weight.view(len(weight), -1, 32)
        top = groups.abs().amax(-1, keepdim=True) / 7
        code = (groups / top).round().add(8).to(torch.uint8)
        return {"scale": top.squeeze(-1), "row": torch.ones(len(weight), 1), "q": code.view(weight.shape)}

    planes = (Plane("scale", "f32", 32), Plane("row", "f32", formats.ROW), Plane("q", "u4"))
    return FormatSpec("two_scales", planes, scale * row * (q - 8), quantizer=quantizer)


class Conv1D(nn.Module):
    """GPT-2's linear layer: the weight is [K, N]."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(k, n) / k**0.5), nn.Parameter(torch.zeros(n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


class Mixed(nn.Module):
    """A tied embedding, an addmm, a product with a parameter, a shared layer, linears of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 64)
        self.gate, self.up, self.conv = nn.Linear(64, 128), nn.Linear(64, 128), Conv1D(128, 64)
        self.shared = nn.Linear(64, 64)
        self.factor = nn.Parameter(torch.randn(64, 64) / 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        h = self.embed(ids)
        h = h + self.conv(F.silu(self.gate(h)) * self.up(h))
        h = h + self.shared(torch.tanh(self.shared(h)))
        return F.linear(F.layer_norm(h, (64,)) @ self.factor, self.embed.weight)


def packed(model: nn.Module) -> list[str]:
    return [n for n, p in model.named_parameters() if isinstance(p, QuantizedTensor)]


def test_every_kind_of_site_in_one_model() -> None:
    outputs, ids = {}, torch.randint(0, 96, (8, 50))
    for rounding in ("float", "nearest", "gptq"):
        torch.manual_seed(1)
        model = Mixed().eval()
        if rounding == "float":
            outputs[rounding] = model(ids)
            continue
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="rounding=")
            policy = {"embed": "float", "*": "int4_g32"}
            compiled = torch.compile(model, backend="qcompile", options={"policy": policy, "rounding": rounding})
            outputs[rounding] = compiled(ids)
        assert packed(model) == ["factor", "gate.weight", "up.weight", "conv.weight", "shared.weight"]
        assert model.calls == 1, "calibration must not count as a call"
        rules = [r.decision.rule for r in recorder_of(model).plan if r.decision.scheme is not None]
        assert all(("rounded by GPTQ" in rule) == (rounding == "gptq") for rule in rules)
    error = {name: float((out - outputs["float"]).norm()) for name, out in outputs.items()}
    assert error["gptq"] < 0.9 * error["nearest"]


def test_a_table_that_is_also_a_head_is_rounded_to_nearest_and_says_so() -> None:
    model, ids = Mixed().eval(), torch.randint(0, 96, (8, 50))
    floats = model.embed.weight.detach().clone()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="rounding=")
        torch.compile(model, backend="qcompile", options=OPTIONS)(ids)
    table = next(r for r in recorder_of(model).plan if r.decision.site.operator == "embedding")
    assert "rounded to nearest: rows of an embedding" in table.decision.rule
    planes = reference.quantize(formats.get("int4_g32"), floats)
    assert all(map(torch.equal, planes, model.embed.weight.planes))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_layers_compiled_one_by_one_are_told_apart() -> None:
    model = Stack().eval()
    for layer in model.layers:
        layer.compile(backend="qcompile", options=OPTIONS)
    with pytest.warns(UserWarning, match=r"4 weights to nearest \(layers\.1\.up.*whole model is compiled"):
        model(correlated(100, 64))
    report = str(qcompile.explain(model, correlated(100, 64)).unfolded())
    assert report.count("rounded by GPTQ") == 2
    assert report.count("rounded to nearest: the layer's inputs were not seen") == 4


def test_formats_that_gptq_does_not_serve_say_so() -> None:
    model = Stack().eval()
    compiled = torch.compile(model, backend="qcompile", options={"policy": two_scales(), "rounding": "gptq"})
    with pytest.warns(UserWarning, match="6 weights to nearest"):
        compiled(torch.randn(20, 64))
    report = str(qcompile.explain(compiled, torch.randn(20, 64)).unfolded())
    assert report.count("rounded to nearest: format two_scales has its own quantizer") == 6


@pytest.mark.parametrize("dynamic", [None, True])
def test_dynamic_shapes_and_half_precision(dynamic: bool | None) -> None:
    model = Stack().eval().to(torch.bfloat16)
    compiled = torch.compile(model, backend="qcompile", dynamic=dynamic, options=OPTIONS)
    for tokens in (64, 48, 7):
        x = correlated(tokens, 64).to(torch.bfloat16)
        out = compiled(x)
        assert (out - model(x)).norm() < 0.02 * out.norm()
    assert len(packed(model)) == 6


def test_calibration_draws_no_random_numbers() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5)).requires_grad_(False)
    state = torch.get_rng_state()
    with torch.random.fork_rng():
        torch.compile(model, backend="qcompile", options=OPTIONS | {"rounding": "nearest"})(torch.ones(4, 64))
        nearest = torch.get_rng_state()
    torch._dynamo.reset()
    again = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5)).requires_grad_(False)
    torch.set_rng_state(state)
    torch.compile(again, backend="qcompile", options=OPTIONS)(torch.ones(4, 64))
    assert torch.equal(torch.get_rng_state(), nearest)


def convert(model: nn.Module, options: dict[str, object], inputs: dict[str, torch.Tensor]) -> None:
    """What the backend does to a model at its first call, without Inductor's compilation."""
    found: list[Conversion] = []

    def look(gm: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Callable[..., object]:
        found.extend(Compilation(gm, example_inputs, Options.parse(options, None)).conversions())
        return gm.forward

    torch.compile(model, backend=look)(**inputs)
    for conversion in found:
        conversion.run()


@pytest.mark.parametrize("policy,bound", [("int4_g32", 0.99), ("int4_g128", 0.97)])
def test_the_sentence_encoder_on_sentences_it_was_not_fitted_to(policy: str, bound: float) -> None:
    """Mean cosine to float over 40 sentences; they, and what was compiled on, share none."""
    assert not set(CALIBRATION) & set(models.sentences())
    batch = models.encoder_batch()
    model, floats = models.encoder(), models.encoder()(**batch)
    convert(model, {"policy": policy, "rounding": "gptq"}, models.encoder_example.tokenize(list(CALIBRATION)))
    assert len(packed(model)) == 36
    assert F.cosine_similarity(model(**batch), floats).mean() >= bound
