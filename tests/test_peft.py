"""Adapters of the peft library over packed models: wrapped before and after packing, trained, merged, saved."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import models
import peft
import pytest
import torch
import training
from torch import nn
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

import qcompile
from qcompile.tensor import QuantizedTensor

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
                         "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96}  # fmt: skip
IDS = torch.randint(1, 96, (2, 12), generator=torch.Generator().manual_seed(3))
MATRICES = 7 + 1

pytestmark = pytest.mark.usefixtures("reset_dynamo")


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def adapted(model: nn.Module, targets: str | list[str] = "all-linear", **settings: Any) -> Any:
    torch.manual_seed(1)
    chosen: dict[str, Any] = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, **settings}
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, **chosen))


def compiled(model: nn.Module, policy: Any = "int8") -> Any:
    return torch.compile(model, backend="qcompile", options={"policy": policy})


def loss_of(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def packed(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_one_line_trains_adapters_over_packed_layers() -> None:
    model = adapted(llama())
    step = compiled(model)
    loss_of(step).backward()
    assert len(packed(model)) == MATRICES and not any("lora_" in name for name in packed(model))
    assert len(trained(model)) == 2 * (MATRICES - 1) and all(p.grad is not None for p in trained(model).values())
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    eager = copy.deepcopy(model)
    eager.zero_grad()
    loss_of(eager).backward()
    assert_same_gradients(model, eager)


def test_roles_are_those_of_the_layers_below_adapters() -> None:
    model = adapted(llama())
    roles = {"attention.q_proj": "int8", "attention.v_proj": "nf4", "attention.o_proj": "fp8", "mlp.gate_proj": "int4_g32",
             "mlp.down_proj": "int5_g32", "lm_head": "float"}  # fmt: skip
    loss_of(compiled(model, roles)).backward()
    parameters = dict(model.named_parameters())
    for i in (0,):
        for role, policy in roles.items():
            part, _, name = role.rpartition(".")
            if not part:
                continue
            block = "self_attn" if part == "attention" else part
            weight = parameters[f"base_model.model.model.layers.{i}.{block}.{name}.base_layer.weight"]
            wanted = "fp8_e4m3" if policy == "fp8" else policy
            assert isinstance(weight, QuantizedTensor) and weight.scheme.format.name == wanted, (role, type(weight))


@pytest.mark.parametrize("way", ["quantize_", "load"])
def test_packed_models_are_wrapped_later(way: str, tmp_path: Path) -> None:
    """peft reads dtype, device and shape of the packed layer; the first call is an evaluation."""
    base = llama()
    qcompile.quantize_(base, IDS, policy="int4_g32")
    if way == "load":
        qcompile.save(base, tmp_path / "model")
        base = qcompile.load(tmp_path / "model")
    before = packed(base)
    model = adapted(base.bfloat16())
    assert {p.dtype for p in trained(model).values()} == {torch.float32}  # peft's own choice for bfloat16 models
    step = compiled(model, "float" if way == "load" else "int4_g32")
    with torch.no_grad():
        loss_of(step)
    loss_of(step).backward()
    assert len(packed(model)) == len(before) == MATRICES
    assert all(p.grad is not None for p in trained(model).values())


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("policy,bound", [("int8", 0.02), ("nf4", 0.25)])
def test_adapters_are_merged_into_packed_layers(safe: bool, policy: str, bound: float) -> None:
    base = llama()
    qcompile.quantize_(base, IDS, policy=policy)
    model = adapted(base).eval()
    with torch.no_grad():
        for name, p in trained(model).items():
            p.mul_(0.2) if "lora_B" in name else None
        expected, plain = model(IDS).logits, model.get_base_model()
        with model.disable_adapter():
            without = model(IDS).logits
        merged = model.merge_and_unload(safe_merge=safe)
        assert merged is plain and len(packed(merged)) == MATRICES
        found = merged(IDS).logits
    assert (found - expected).norm() <= bound * expected.norm() < 0.8 * (without - expected).norm()


def test_adapters_are_saved_and_loaded_over_a_packed_model(tmp_path: Path) -> None:
    base = llama().eval()
    qcompile.quantize_(base, IDS, policy="nf4")
    again = copy.deepcopy(base)
    model = adapted(base).eval()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(again, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
        torch.testing.assert_close(compiled(loaded, "float")(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    assert len(packed(loaded)) == MATRICES


def test_gradient_checkpointing_in_one_graph() -> None:
    """The hook that transformers adds for reentrant checkpoints would break the graph; others do without it."""
    plain, model = adapted(llama()), adapted(llama())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()
    loss_of(compiled(model.train())).backward()
    assert len(packed(model)) == MATRICES and not counters["graph_break"]
    qcompile.quantize_(plain, IDS, policy="int8")
    loss_of(plain).backward()
    assert_same_gradients(model, plain)


def test_gradient_checkpointing_over_breaks() -> None:
    """Dynamo leaves checkpoints outside a graph to eager PyTorch: weights that were packed before serve there too."""
    plain, model = adapted(llama()), adapted(llama())
    for each in (plain, model):
        qcompile.quantize_(each, IDS, policy="int8")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    loss_of(compiled(model.train())).backward()
    assert counters["graph_break"]
    loss_of(plain).backward()
    assert_same_gradients(model, plain)


def assert_same_gradients(model: nn.Module, other: nn.Module) -> None:
    assert trained(model).keys() == trained(other).keys()
    for name, p in trained(other).items():
        grad = trained(model)[name].grad
        assert grad is not None and (grad - p.grad).norm() <= 1e-4 * p.grad.norm(), name


def test_models_prepared_for_training_in_few_bits() -> None:
    """``prepare_model_for_kbit_training`` freezes, and makes every 16-bit parameter float32: packed ones by name only."""
    base = llama().bfloat16()
    qcompile.quantize_(base, IDS, policy="int8")
    planes = [p.data_ptr() for p in base.lm_head.weight.planes]
    model = adapted(peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False))
    assert [p.data_ptr() for p in model.get_base_model().lm_head.weight.planes] == planes
    loss_of(compiled(model)).backward()
    assert len(packed(model)) == MATRICES and all(p.grad is not None for p in trained(model).values())


def test_magnitudes_of_dora_are_trained() -> None:
    base = llama()
    qcompile.quantize_(base, IDS, policy="int8")
    model = adapted(base, ["q_proj", "down_proj"], use_dora=True)
    loss_of(model).backward()
    assert all(p.grad is not None for p in trained(model).values()) and len(trained(model)) == 6


def test_starts_that_change_the_weight_are_refused() -> None:
    """PiSSA splits the weight itself: of a packed one it would be rounded twice."""
    base = llama()
    qcompile.quantize_(base, IDS, policy="int8")
    with pytest.raises(qcompile.errors.UnsupportedOnTensorError, match="_linalg_svd.*packed as int8; call .dequantize"):
        adapted(base, init_lora_weights="pissa")


@pytest.mark.parametrize("policy", ["nf4", "int4_g32"])
def test_the_trained_decoder_learns_as_over_floats(policy: str) -> None:
    """Another text (its capitals): the loss falls, to within 2 % of the float model's."""
    start, exact = learnt("float")
    _, found = learnt(policy)
    assert exact < 0.9 * start
    assert found <= 1.02 * exact, (start, exact, found)


@functools.cache
def learnt(policy: str) -> tuple[float, float]:
    """Loss before and after 24 steps, on text that they do not see."""
    model, tokenizer, text = models.trained_decoder()
    ids = training.encode(tokenizer, [text[:60000].upper()])[: 104 * 96].view(104, 96)
    if policy != "float":
        qcompile.quantize_(model, ids[:1], policy=policy)
    model = adapted(model, ["q_proj", "v_proj", "gate_proj", "down_proj"], r=8, init_lora_weights=True)
    optimizer = torch.optim.AdamW(trained(model).values(), 4e-3, fused=True)
    with torch.no_grad():
        start = float(loss_of(model, ids[-8:]))
    for step in range(24):
        loss_of(model, ids[4 * step : 4 * step + 4]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return start, float(loss_of(model, ids[-8:]))
