"""Mixtures of experts as transformers has them: all experts packed, logits of the decoded weights, nothing compiled twice."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from zoo import EXPERTS, LLAMA, causal

import qcompile
from qcompile.plan import Plan
from qcompile.tensor import QuantizedTensor

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "one_thread")

PROMPT = torch.arange(1, 10).reshape(1, 9)
STEPS = 2
ONE = LLAMA | {"num_hidden_layers": 1}
MODELS = {
    "mixtral": causal("Mixtral", **ONE, num_local_experts=4),
    "qwen3_moe": causal("Qwen3Moe", **ONE, **EXPERTS),
    "gpt_oss": causal("GptOss", **ONE, num_local_experts=4, num_experts_per_tok=2),
}
"""Experts [E, N, K] by two models, and [E, K, N] with biases by the third."""


def built(name: str, experts: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.config._experts_implementation = experts  # type: ignore[assignment]
    return model


def generated(model: nn.Module, call: nn.Module) -> list[torch.Tensor]:
    """Logits of a prompt, and of some tokens after it with what a static cache holds."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        found = [call(PROMPT, past_key_values=cache).logits]
        return found + [call(torch.full((1, 1), 7 + step), past_key_values=cache).logits for step in range(STEPS)]


def decoded(model: nn.Module, packed: nn.Module) -> nn.Module:
    """The float ``model`` with the weights that the ones of ``packed`` stand for."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in packed.named_parameters():
            if isinstance(weight, QuantizedTensor):
                made.get_parameter(name).copy_(weight.dequantize())
    return made


def share(plan: Plan) -> float:
    """Of the bytes of experts' matrices, what is quantized."""
    experts = [r for r in plan if ".experts" in r.decision.site.name and len(r.decision.site.shape) == 3]
    assert experts
    return sum(r.bytes_before for r in experts if r.decision.scheme) / sum(r.bytes_before for r in experts)


def assert_close(results: list[torch.Tensor], wanted: list[torch.Tensor], limit: float) -> None:
    for result, want in zip(results, wanted, strict=True):
        assert (result - want).norm() <= limit * want.norm()


CASES = [("mixtral", "grouped_mm", "int4"), ("qwen3_moe", "batched_mm", "Q4_K"), ("gpt_oss", "grouped_mm", "int8_dynamic")]


@pytest.mark.parametrize("name,experts,policy", CASES)
def test_compiled(name: str, experts: str, policy: str) -> None:
    """Prefill and decoding: no graph and no break beyond those of the float model."""
    model = built(name, experts)
    seen = []
    for backend, options in (("eager", None), ("qcompile", {"policy": policy})):
        torch._dynamo.reset()
        counters.clear()
        packed = copy.deepcopy(model)
        results = generated(packed, torch.compile(packed, backend=backend, options=options))  # type: ignore[arg-type]
        seen.append((counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())))
    assert seen[0] == seen[1]
    plan = qcompile.explain(packed, PROMPT, use_cache=False).plan
    assert share(plan) >= 0.99
    reference = decoded(model, packed)
    assert_close(results, generated(reference, reference), 2e-2 if "dynamic" in policy else 1e-4)
    assert_close(results, generated(packed, packed), 1e-2 if "dynamic" in policy else 1e-4)


@pytest.mark.parametrize("policy", ["int4", "int8", "nf4", "Q4_K"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_eager(name: str, policy: str) -> None:
    """Whichever way transformers multiplies by experts: by groups, by chosen ones, or by one after the other."""
    model = built(name, "grouped_mm")
    packed = copy.deepcopy(model)
    plan = qcompile.quantize_(packed, PROMPT, use_cache=False, policy=policy).plan
    assert share(plan) >= 0.99
    wanted = generated(reference := decoded(model, packed), reference)
    for experts in ("grouped_mm", "batched_mm", "eager"):
        packed.config._experts_implementation = experts  # type: ignore[assignment]
        assert_close(generated(packed, packed), wanted, 1e-4)


def test_explain_names_experts_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = causal("Mixtral", hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
                       num_key_value_heads=2, vocab_size=128, num_local_experts=8)()  # fmt: skip
    report = qcompile.explain(model, PROMPT.to("meta"), use_cache=False, policy="int4")
    shapes = {r.decision.site.name: r.decision.site.shape for r in report.plan if "experts" in r.decision.site.name}
    experts = "model.layers.0.mlp.experts"
    assert shapes == {f"{experts}.gate_up_proj": (8, 192, 64), f"{experts}.down_proj": (8, 64, 96)}
    lines = str(report).splitlines()
    assert any("gate_up_proj" in line and "8×192×64" in line for line in lines)


SECOND = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from test_experts_graphs import Mixture
import qcompile
from qcompile.store import COUNTS

model = Mixture("chosen")
qcompile.quantize_(model, torch.ones(3, 64), policy="int4")
print(json.dumps([dict(COUNTS), sum(p.double().sum().item() for p in model.down_proj.planes)]))
"""


def test_a_second_process_reads_packed_experts(tmp_path: Path) -> None:
    env = os.environ | {"QCOMPILE_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SECOND, str(Path(__file__).parent)]
    runs = [subprocess.run(command, capture_output=True, text=True, env=env) for _ in range(2)]
    assert all(run.returncode == 0 for run in runs), runs[-1].stderr
    (first, total), (second, again) = (json.loads(run.stdout.splitlines()[-1]) for run in runs)
    assert first["quantized"] == 2 and "quantized" not in second and second["packed read"] == 2
    assert total == again


def test_transformers_packs_saves_and_loads_experts(tmp_path: Path) -> None:
    """Checkpoints have a tensor for each expert, which transformers stacks; packed ones are saved stacked."""
    from transformers import AutoModelForCausalLM

    built("mixtral", "grouped_mm").save_pretrained(tmp_path / "float")
    config = qcompile.QCompileConfig(policy="int4")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    packed.save_pretrained(tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    for model in (packed, loaded):
        experts = model.model.layers[0].mlp.experts
        assert isinstance(experts.gate_up_proj, QuantizedTensor) and isinstance(experts.down_proj, QuantizedTensor)
    assert torch.equal(packed(PROMPT, use_cache=False).logits, loaded(PROMPT, use_cache=False).logits)
