"""Quantization-aware training: what is trained is what is packed, whatever trains it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_backend import Stack, decoded, packed_names, stack
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from workers import trained

import qcompile
from qcompile import qat
from qcompile.errors import OptionError, PolicyError, WeightError
from qcompile.formats import REGISTRY, FormatSpec, Plane, Scheme, find, get, register_scheme, symbols
from qcompile.formats.reference import decode, fake, quantize, scales_shape
from qcompile.formats.surrogate import gradient
from qcompile.recorder import recorder_of
from qcompile.tensor import QuantizedTensor

SPECS = sorted([*REGISTRY.values(), get("int3_range_g128")], key=lambda s: s.name)
DTYPES = [torch.float32, torch.bfloat16]

pytestmark = pytest.mark.usefixtures("reset_dynamo")


def compiled(model: nn.Module, policy: Any = "int4_g32", **options: Any) -> Any:
    return torch.compile(model, backend="qcompile", options={"qat": True, "policy": policy, **options})


def packed(model: nn.Module, *inputs: Any, policy: Any = "int4_g32") -> nn.Module:
    """A copy of ``model``, packed."""
    made = copy.deepcopy(getattr(model, "_orig_mod", model))
    qcompile.quantize_(made, *inputs, policy=policy)
    return made


def planes(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    return {n: p.planes for n, p in model.named_parameters() if isinstance(p, QuantizedTensor)}


# The arithmetic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fake_is_decode_of_quantize_bit_for_bit(spec: FormatSpec, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for n, k in ((40, 512), (5, 300)):
        weight = torch.randn(n, k).to(dtype)
        weight[3] = 0
        made, scales = fake(spec, weight)
        assert made.dtype == dtype and torch.equal(made, decode(spec, quantize(spec, weight), n, k, dtype))
        assert scales.shape == scales_shape(spec, n, k) and scales.dtype == torch.float32 and torch.isfinite(scales).all()
        kept = gradient(spec, torch.ones(n, k), weight, made, scales) != 0
        assert kept[3].all() and kept.float().mean() > 0.6


def test_fake_works_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.formats.reference.CHUNK_ELEMENTS", 16 * 256)
    weight = torch.randn(150, 256)
    for name in ("int4_g128", "fp8_e4m3_b128", "fp8_e4m3_tensor", "nvfp4", "Q4_K"):
        spec = find(name)
        assert spec is not None and torch.equal(fake(spec, weight)[0], decode(spec, quantize(spec, weight), 150, 256))


def test_what_the_format_cuts_off_has_no_gradient() -> None:
    scale, q = symbols("scale q")
    spec = FormatSpec("test_qat_u2", (Plane("scale", "f32", 8), Plane("q", "u2")), value=scale * (q - 2), shrinks=(),
                      quantizer=_ones)  # fmt: skip
    weight = torch.tensor([[-3.0, -2.6, -2.5, -2.4, 0.0, 1.4, 1.5, 1.6]])  # values −2 … 1, half a step further
    assert fake(spec, weight)[0].tolist() == [[-2.0, -2.0, -2.0, -2.0, 0.0, 1.0, 1.0, 1.0]]
    weight.requires_grad_()
    qat.fake_weight(weight, register_scheme(Scheme(spec)), False)[0].backward(torch.arange(1.0, 9.0)[None])
    assert weight.grad is not None and weight.grad.tolist() == [[0.0, 0.0, 3.0, 4.0, 5.0, 6.0, 7.0, 0.0]]


def _ones(spec: FormatSpec, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    codes = (weight + 2).round().clamp(0, 3).to(torch.uint8)
    return {"scale": torch.ones(len(weight), weight.shape[1] // 8), "q": codes}


def test_a_transposed_weight_has_the_transposed_gradient() -> None:
    weight, grad, found = torch.randn(32, 96), torch.randn(32, 96), []
    for transposed in (False, True):
        turned = (weight.t().contiguous() if transposed else weight.clone()).requires_grad_()
        made = qat.fake_weight(turned, register_scheme(Scheme(get("int2_g64"))), transposed)[0]
        (made.t() if transposed else made).backward(grad)
        assert turned.grad is not None
        found.append((made.t() if transposed else made, turned.grad.t() if transposed else turned.grad))
    assert torch.equal(found[0][0], found[1][0]) and not torch.equal(found[0][1], grad)
    torch.testing.assert_close(*(gradients for _, gradients in found))


def test_the_operators_stand_torchs_own_checks() -> None:
    key = register_scheme(Scheme(find("int4_g32")))  # type: ignore[arg-type]
    weight, x = torch.randn(32, 64), torch.randn(3, 64)
    for transposed in (False, True):
        torch.library.opcheck(qat.fake_weight, (weight.clone().requires_grad_(), key, transposed),
                              test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"))  # fmt: skip
    torch.library.opcheck(qat.fake_activations, (x.clone().requires_grad_(), "int8"),
                          test_utils=("test_schema", "test_faketensor"))  # fmt: skip
    for operator, arguments in ((qat.trained_linear, (x, weight, torch.randn(32), key, False)),
                                (qat.trained_rows, (weight, torch.arange(3), key))):  # fmt: skip
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


# Whole models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["int4", "int8", "nf4", "Q4_K", "nvfp4", "fp8", "mixed", "int3_range_g64"])
def test_training_computes_what_the_packed_model_will(policy: str) -> None:
    """Bit for bit what plain Inductor computes with the packed weights decoded; in evaluation what the packed model does."""
    model, x = stack(0, width=256).train(), torch.randn(4, 256)
    run = compiled(model, policy)
    trained = run(x)
    made = packed(model, x, policy=policy)
    assert torch.equal(trained, torch.compile(decoded(made).requires_grad_())(x))
    with torch.no_grad():
        evaluated = run(x)
        assert torch.equal(evaluated, torch.compile(made, backend="qcompile", options={"policy": policy})(x))
    assert packed_names(model) == [] and model.state_dict().keys() == stack(0, width=256).state_dict().keys()
    assert (trained - evaluated).norm() <= 1e-5 * evaluated.norm()


@pytest.mark.parametrize("name", ["int4_g32", "int3_range_g32"])
def test_gradients_are_those_of_the_decoded_weights(name: str) -> None:
    spec, model, x = get(name), stack(0).train(), torch.randn(4, 64)
    compiled(model, name)(x).square().sum().backward()
    reference = decoded(packed(model, x, policy=name)).requires_grad_()
    reference(x).square().sum().backward()
    grads = {n: p.grad for n, p in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        want = grads[name]
        if parameter.dim() == 2:
            weight = parameter.detach()
            want = gradient(spec, want, weight, *fake(spec, weight))
        torch.testing.assert_close(parameter.grad, want, rtol=1e-4, atol=1e-4)


def steps(model: nn.Module, run: Callable[..., torch.Tensor], count: int = 3, **adamw: Any) -> list[float]:
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2, **adamw), []
    for i in range(count):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(i))
        loss = (run(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("adamw", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_evaluation_sees_every_step_of_the_optimizer(adamw: dict[str, Any]) -> None:
    model = stack(0).train()
    run, x, results = compiled(model), torch.randn(4, 64), []
    for _ in range(3):
        steps(model, run, 1, **adamw)
        with torch.no_grad():
            results.append((run(x), packed(model, x)))
            counters.pop("stats")  # of packing
    steps(model, run, 1, **adamw)
    assert counters["stats"]["unique_graphs"] == 0 and counters["graph_break"] == {}
    with torch.no_grad():
        for evaluated, made in results:
            assert torch.equal(evaluated, torch.compile(made, backend="qcompile", options={"policy": "int4_g32"})(x))


def test_training_learns() -> None:
    model = stack(0).train()
    losses = steps(model, compiled(model, "int2_g32"), 30)
    assert losses[-1] < 0.3 * losses[0]


def test_planes_are_packed_once_and_again_after_any_write() -> None:
    model, x = stack(0), torch.randn(4, 64)
    run, weight = compiled(model), model.layers[1].up.weight
    packs = 0
    original = qat.reference.quantize

    def counted(*arguments: Any) -> Any:
        nonlocal packs
        packs += 1
        return original(*arguments)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(qat.reference, "quantize", counted)
        first = run(x)
        assert torch.equal(run(x), first) and packs == 7
        writes: list[Callable[[], Any]] = [
            lambda: weight.mul_(2), lambda: weight.data.copy_(torch.randn_like(weight)),
            lambda: setattr(weight, "data", torch.randn_like(weight)), lambda: weight.data.view(-1).__setitem__(0, 9.0),
        ]  # fmt: skip
        for i, write in enumerate(writes, 1):
            before = run(x)
            write()
            after = run(x)
            assert not torch.equal(after, before) and torch.equal(run(x), after) and packs == 7 + i
    made = packed(model, x)
    with torch.no_grad():
        assert torch.equal(run(x), torch.compile(made, backend="qcompile", options={"policy": "int4_g32"})(x))


def test_planes_go_with_their_weights_and_at_a_step() -> None:
    model, x = stack(0), torch.randn(4, 64)
    run = compiled(model)
    qat._kept.clear()
    with torch.no_grad():
        run(x)
    assert len(qat._kept) == 7
    steps(model, run, 1)
    assert len(qat._kept) == 0
    with torch.no_grad():
        run(x)
    del run, model
    torch._dynamo.reset()
    import gc

    gc.collect()
    assert len(qat._kept) == 0


def test_after_training_quantize_gives_the_planes_of_evaluation() -> None:
    model, x = stack(0).train(), torch.randn(4, 64)
    run = compiled(model)
    steps(model, run)
    with torch.no_grad():
        run(x)
    kept = {n: next(iter(qat._kept[p].values())).planes for n, p in model.named_parameters() if p in qat._kept}
    made = planes(packed(model, x))
    assert made.keys() == kept.keys() and len(made) == 7
    assert all(torch.equal(a, b) for n in made for a, b in zip(made[n], kept[n], strict=True))


def test_gradients_accumulate() -> None:
    x = torch.randn(8, 64)
    grads = []
    for parts in (1, 4):
        model = stack(0).train()
        run = compiled(model)
        for part in x.chunk(parts):
            run(part).sum().backward()
        grads.append(model.layers[0].up.weight.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("policy", ["int4_g32", "int8_dynamic"])
def test_activation_checkpoints(policy: str) -> None:
    class Checkpointed(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)  # type: ignore[assignment]
            return self.head(x)

    x, found = torch.randn(4, 64), []
    for kind in (Stack, Checkpointed):
        torch.manual_seed(0)
        model = kind().train()
        run = compiled(model, policy)
        run(x).square().sum().backward()
        with torch.no_grad():
            evaluated = run(x)
        assert {r.kernel for r in recorder_of(model).plan} == {"fake-quantized in training, packed at evaluation"}
        assert len(recorder_of(model).plan) == 7
        found.append((evaluated, {n: p.grad for n, p in model.named_parameters()}))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])
    assert counters["graph_break"] == {}


def test_checkpoints_recompute_under_training() -> None:
    """The activation between the two layers of a block is made again in the backward, and the weights are not quantized again."""
    from torch._inductor.utils import run_and_get_code

    model, x = stack(0, layers=1).train(), torch.randn(4, 64, requires_grad=True)
    run = torch.compile(lambda x: checkpoint(model.layers[0], x, use_reentrant=False), backend="qcompile",
                        options={"qat": True, "policy": "int4_g32"})  # fmt: skip
    _, codes = run_and_get_code(lambda: run(x).sum().backward())
    forward, backward = codes
    assert forward.count("qcompile.fake_weight.default(") == 2 and "fake_weight.default(" not in backward
    assert "erf" in backward or "tanh" in backward


def test_autocast() -> None:
    model, x = stack(0, width=128).train(), torch.randn(16, 128)
    run = compiled(model)
    with torch.autocast("cpu", torch.bfloat16):
        trained = run(x)
        trained.float().sum().backward()
        with torch.no_grad():
            evaluated, made = run(x), packed(model, x)
            want = torch.compile(made, backend="qcompile", options={"policy": "int4_g32"})(x)
    assert trained.dtype == evaluated.dtype == torch.bfloat16 and torch.equal(evaluated, want)
    assert (trained.float() - evaluated.float()).norm() <= 2e-2 * trained.float().norm()
    assert model.head.weight.grad.dtype == torch.float32  # type: ignore[union-attr]


def test_autocast_inside_the_model() -> None:
    class Cast(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    torch.manual_seed(0)
    model, x = Cast().train(), torch.randn(16, 64)
    run = compiled(model)
    trained = run(x)
    with torch.no_grad():
        evaluated = run(x)
    assert trained.dtype == evaluated.dtype == torch.bfloat16
    assert (trained.float() - evaluated.float()).norm() <= 2e-2 * trained.float().norm()


def test_graph_breaks() -> None:
    model, x = stack(0, breaks=True).train(), torch.randn(4, 64)
    run = compiled(model)
    trained = run(x)
    trained.sum().backward()
    made = packed(model, x)
    with torch.no_grad():
        assert torch.equal(run(x), torch.compile(made, backend="qcompile", options={"policy": "int4_g32"})(x))
    assert len(planes(made)) == 6 and model.layers[2].down.weight.grad is not None


def test_layers_compiled_one_by_one() -> None:
    model, x = stack(0, layers=12).train(), torch.randn(4, 64, requires_grad=True)
    for layer in model.layers:
        layer.compile(backend="qcompile", options={"qat": True, "policy": "int4_g32"})
    model(x).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1
    with torch.no_grad():
        model(x)
    assert {"layers.0.up", "layers.11.down"} <= {r.decision.site.name for r in recorder_of(model).plan}


def test_layers_compiled_one_by_one_must_be_trained_alike() -> None:
    model, x = stack(0, layers=4).train(), torch.randn(4, 64)
    for layer in model.layers:
        layer.compile(backend="qcompile", options={"qat": True, "policy": {"layers.2.*": "int8", "*": "int4_g32"}})
    with pytest.raises(PolicyError, match=r"'layers.0.up' is to be int4_g32 and 'layers.2.up' int8.*Compile the whole model"):
        model(x)


def test_dynamic_shapes() -> None:
    model = stack(0).train()
    run = compiled(model)
    for rows in (2, 3, 5, 17, 40):
        run(torch.randn(rows, 64)).sum().backward()
    assert counters["stats"]["unique_graphs"] == 2


def test_frozen_weights_are_packed_for_good() -> None:
    model, x = stack(0).train().requires_grad_(False), torch.randn(4, 64, requires_grad=True)
    model.layers[1].requires_grad_(True)
    run = compiled(model)
    run(x).sum().backward()
    assert packed_names(model) == [f"layers.{i}.{n}.weight" for i in (0, 2) for n in ("up", "down")] + ["head.weight"]
    assert x.grad is not None and model.layers[1].up.weight.grad is not None
    with torch.no_grad():
        run(x)
    assert isinstance(model.layers[1].up.weight, nn.Parameter) and model.layers[1].up.weight.requires_grad


# Other ways to train -------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(50, 64), nn.Linear(64, 50, bias=False)
        self.lm_head.weight, self.up = self.embed.weight, nn.Linear(64, 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(F.relu(self.up(self.embed(ids))))


@pytest.mark.parametrize("policy", ["int8", {"embed": "int8", "*": "int8"}], ids=str)
def test_tied_embedding_and_head(policy: Any) -> None:
    torch.manual_seed(0)
    model, ids = Tied().train(), torch.randint(0, 50, (2, 5))
    run = compiled(model, policy)
    trained = run(ids)
    trained.sum().backward()
    made = packed(model, ids, policy=policy)
    assert torch.equal(trained, torch.compile(decoded(made).requires_grad_())(ids))
    with torch.no_grad():
        assert torch.equal(run(ids), torch.compile(made, backend="qcompile", options={"policy": policy})(ids))
    assert isinstance(made.embed.weight, QuantizedTensor) and model.embed.weight.grad is not None


def test_an_embedding_where_a_rule_names_it() -> None:
    model, ids = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 8)).train(), torch.randint(0, 50, (2, 5))
    run = compiled(model, {"0": "int4_g32", "*": "float"})
    trained = run(ids)
    trained.sum().backward()
    with torch.no_grad():
        assert torch.allclose(run(ids), trained, atol=1e-6)
    assert torch.allclose(trained, model[1](fake(REGISTRY["int4_g32"], model[0].weight.detach())[0][ids]), atol=1e-6)
    assert model[0].weight.grad is not None


class Products(nn.Module):
    """A weight that is stored [K, N], as GPT-2's, one that is transposed at its use, and a sum that is no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(64, 64) / 8) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.addmm(self.bias, x, self.a)
        x = x @ self.b.t() + self.b.shape[0]
        return torch.addmm(x, mat1=x, mat2=self.c)


def test_other_products() -> None:
    model, x = Products().train(), torch.randn(4, 64)
    for policy in ("int4_g32", "int8_dynamic"):
        run = compiled(model, policy)
        trained = run(x)
        trained.sum().backward()
        made = packed(model, x, policy=policy)
        assert len(planes(made)) == 3 and model.a.grad is not None
        with torch.no_grad():
            bound = {"rtol": 1e-5, "atol": 1e-3} if policy == "int4_g32" else {"rtol": 1e-2, "atol": 1e-1}
            torch.testing.assert_close(trained, run(x), **bound)
            torch.testing.assert_close(run(x), made(x), **bound)


@pytest.mark.parametrize("policy", ["int8_dynamic", "fp8_dynamic", "int4_dynamic"])
def test_inputs_are_rounded_as_the_kernels_do(policy: str) -> None:
    """Of one layer, whose inputs are the same to the last bit in training and in evaluation."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(256, 32)).train(), torch.randn(6, 256, requires_grad=True)
    run = compiled(model, policy)
    trained = run(x)
    trained.sum().backward()
    made = packed(model, x, policy=policy)
    with torch.no_grad():
        torch.testing.assert_close(run(x), trained, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(made(x), trained, rtol=1e-5, atol=1e-5)
        assert (trained - decoded(made)(x)).norm() > 1e-3 * trained.norm()
    torch.testing.assert_close(x.grad, decoded(made)[0].weight.sum(0).expand(6, -1), rtol=1e-5, atol=1e-5)


def test_attention_with_its_projections_inside() -> None:
    torch.manual_seed(0)
    model, x = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True).train(), torch.randn(2, 5, 64)
    run = compiled(model)
    trained = run(x)
    trained.sum().backward()
    made = packed(model, x)
    assert len(planes(made)) == 4
    torch.testing.assert_close(trained, decoded(made)(x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(run(x), decoded(made)(x), rtol=1e-4, atol=1e-5)
    assert model.self_attn.in_proj_weight.grad is not None
    model = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True).train()
    compiled(model, "int8_dynamic")(x)
    reasons = {r.decision.site.name: r.decision.reason for r in recorder_of(model).plan if r.decision.site.is_linear}
    assert reasons["linear1"] is None and "inputs cannot be fake-quantized" in str(reasons["self_attn.out_proj"])


def test_caches_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x = torch.randn(4, 64)
    for turn in range(2):
        torch._dynamo.reset()
        counters.clear()
        model = stack(0).train()
        run = compiled(model)
        run(x).sum().backward()
        with torch.no_grad():
            run(x)
        hits = {name: counters["aot_autograd"][name] for name in counters["aot_autograd"] if "autograd_cache" in name}
        assert hits.get("autograd_cache_bypass", 0) == 0 and counters["inductor"]["fxgraph_cache_bypass"] == 0
        assert hits["autograd_cache_hit" if turn else "autograd_cache_miss"] == 2, hits


def test_train_save_resume_under_another_policy(tmp_path: Path) -> None:
    model, x = stack(0).train(), torch.randn(4, 64)
    run = compiled(model)
    steps(model, run)
    with torch.no_grad():
        before = run(x)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    assert all(type(v) is torch.Tensor for v in model.state_dict().values())
    torch._dynamo.reset()
    other = stack(1).train()
    other.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True))
    resumed = compiled(other)
    with torch.no_grad():
        assert torch.equal(resumed(x), before)
    torch._dynamo.reset()
    changed = compiled(other, "int8")
    assert steps(other, changed)[-1] < 10
    made = packed(other, x, policy="int8")
    with torch.no_grad():
        assert torch.equal(changed(x), torch.compile(made, backend="qcompile", options={"policy": "int8"})(x))


@pytest.mark.parametrize("options, message", [
    ({"qat": 1}, "'qat' must be True or False, found 1"),
    ({"qat": True, "rounding": "gptq"}, "'qat' with rounding='gptq': .*calibrate the trained model"),
    ({"qat": True, "kv_cache": "fp8"}, "'qat' with kv_cache: .*when you compile the trained model"),
], ids=str)  # fmt: skip
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    model = stack(0)
    with pytest.raises(OptionError, match=message):
        torch.compile(model, backend="qcompile", options=options)(torch.randn(4, 64))


def test_a_calibration_is_refused() -> None:
    model, x = stack(0), torch.randn(4, 64)
    with torch.no_grad():
        found = qcompile.calibrate(model, [x], policy="int4_g32", progress=False)
    with pytest.raises(OptionError, match=r"'qat' with a calibration as policy: .*give its .policy"):
        compiled(model, found)(x)


@pytest.mark.parametrize("grad", [True, False])
def test_weights_that_are_not_finite_are_named(grad: bool) -> None:
    model, x = stack(0), torch.randn(4, 64)
    model.layers[1].up.weight.data[3, 5] = float("nan")
    with torch.set_grad_enabled(grad), pytest.raises(WeightError, match="layers.1.up.weight: the weight has NaN or infinite"):
        compiled(model)(x)


def test_nothing_warns_and_the_report_says_what_is_done() -> None:
    import warnings

    model, x = stack(0).train(), torch.randn(4, 64)
    run = compiled(model, {"head": "float", "*": "int4_g32"}, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(x)
    said = {r.decision.site.name: (r.kernel, r.decision.reason) for r in recorder_of(model).plan}
    assert said["layers.0.up"] == ("fake-quantized in training, packed at evaluation", None)
    assert said["head"] == (None, "the policy leaves it in floating point")


# Several processes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [True, False], ids=["split by DDPOptimizer", "whole"])
def test_two_processes_train_one_model(tmp_path: Path, split: bool) -> None:
    torch.multiprocessing.spawn(trained, (str(tmp_path), split), nprocs=2)
    (first, evaluated, said, graphs), (second, other, _, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert set(said.values()) == {"fake-quantized in training, packed at evaluation"} and len(said) == 7
    assert graphs >= 2 if split else graphs == 1
    assert all(torch.equal(first[n], second[n]) for n in first) and torch.equal(evaluated, other)
    alone = stack(0).train()
    run = compiled(alone)
    optimizer = torch.optim.AdamW(alone.parameters(), lr=1e-2)
    batch = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        run(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in alone.state_dict().items():
        assert (first[name] - parameter).norm() <= 0.02 * parameter.norm()
