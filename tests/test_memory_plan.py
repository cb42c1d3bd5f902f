"""What a model takes on each device, planned from its configuration, against what conversions on the meta device count."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import qcompile
from qcompile.checkpoints.models import empty_model
from qcompile.cli import app
from qcompile.errors import CheckpointError, OptionError
from qcompile.kv_cache import KVCache
from qcompile.tensor import QuantizedTensor

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

LLAMA_3_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192,
    "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    "max_position_embeddings": 8192, "rope_theta": 500000.0, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip
SMALL = LLAMA_3_70B | {"vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2,
                       "num_attention_heads": 8}  # fmt: skip
GB = 1_000_000_000


def counted(config: dict, policy: object) -> int:  # type: ignore[type-arg]
    """Bytes of all parameters and buffers of a model that was packed on the meta device."""
    model = empty_model(config)
    qcompile.quantize_(model, torch.zeros(1, 8, dtype=torch.long, device="meta"), policy=policy, use_cache=False)
    assert any(isinstance(p, QuantizedTensor) for p in model.parameters())
    return sum(getattr(p, "packed_nbytes", p.nbytes) for p in [*model.parameters(), *model.buffers()])


RULES = {"lm_head": "nf4", "attention.o_proj": "float", "*": "int8"}


@pytest.mark.parametrize("policy", ["int4", "fp8", "mixed", "Q4_K_M", RULES])
def test_one_device_takes_what_a_conversion_counts(policy: object) -> None:
    plan = qcompile.memory_plan(SMALL, policy=policy)
    assert plan.weights_nbytes == plan.weights_device_nbytes == counted(SMALL, policy)


def test_experts_are_counted_as_they_are_packed_and_on_every_device() -> None:
    config = {name: value for name, value in SMALL.items() if name != "rope_theta"} | {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2,
        "intermediate_size": 520}  # fmt: skip
    plan = qcompile.memory_plan(config, policy="int4_g32", devices=2)
    assert plan.weights_nbytes == counted(config, "int4_g32")
    experts = [g for g in plan.groups if "gate_proj" in g.layer or "down_proj" in g.layer]
    assert experts and all(g.format == "int4_g32" and g.nbytes == g.device_nbytes for g in experts)
    assert any("4 experts of one stack are on every device" in note for note in plan.notes)


def test_tied_weights_count_once() -> None:
    tied = SMALL | {"tie_word_embeddings": True}
    plan = qcompile.memory_plan(tied, policy="int4", devices=2)
    assert plan.weights_nbytes == counted(tied, "int4")


def test_shares_of_devices_are_those_of_their_planes() -> None:
    from qcompile.sharding import shard, split_of

    plan, model = qcompile.memory_plan(SMALL, policy="int4", devices=4), empty_model(SMALL)
    report = qcompile.quantize_(model, torch.zeros(1, 8, dtype=torch.long, device="meta"), policy="int4", use_cache=False)
    roles = {r.decision.site.parameter: r.decision.site.roles for r in report.plan if r.decision.site.is_linear}
    own = sum(b.nbytes for b in model.buffers())
    for name, p in model.named_parameters():
        split = split_of(roles.get(name, ()))
        own += shard(p, split, 0, 4, name).packed_nbytes if split is not None else getattr(p, "packed_nbytes", p.nbytes)
    assert plan.weights_device_nbytes == own and not plan.notes


def test_what_cannot_be_divided_is_on_every_device_and_says_so() -> None:
    plan = qcompile.memory_plan(SMALL | {"vocab_size": 1000}, policy="int4", devices=8)
    head = next(g for g in plan.groups if g.layer == "lm_head")
    assert head.split == "replicated" and head.nbytes == head.device_nbytes
    assert any("lm_head: the 1000×512 weight in int8 has 1000 = 8 × 125 rows" in note and "multiple of 16" in note
               for note in plan.notes)  # fmt: skip
    assert any("mlp.down_proj" not in note and "self_attn.o_proj" in note and "multiple of 128" in note for note in plan.notes)


@pytest.mark.parametrize("kv", ["fp8", "int4", ("int8", "fp8"), None])
def test_the_cache_takes_what_caches_take(kv: object) -> None:
    plan = qcompile.memory_plan(SMALL, policy="float", context=96, batch=3, kv=kv, devices=16)
    k = torch.zeros(3, 8, 96, 64, dtype=torch.bfloat16)
    own = 2 * k.nbytes
    if kv is not None:
        cache = KVCache(kv, capacity=96)
        cache.append(k, k)
        own = cache.nbytes
    assert plan.kv_nbytes == 2 * own and plan.kv_device_nbytes == plan.kv_nbytes // 8, "8 heads: each device has one at least"


def test_sliding_windows_bound_the_float_cache() -> None:
    config = SMALL | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 64}
    whole, window = (qcompile.memory_plan(config, policy="float", context=n).kv_nbytes for n in (64, 4096))
    assert whole == window > 0
    assert qcompile.memory_plan(config, policy="float", context=4096, kv="int8").kv_nbytes > window


def totals(policy: object) -> int:
    """Bytes of the weights of Llama-3-70B: its layers are alike, so two models of fewer tell."""
    one, two = (qcompile.memory_plan(LLAMA_3_70B | {"num_hidden_layers": n}, policy=policy).weights_nbytes for n in (1, 2))
    return one + 79 * (two - one)


def test_llama_3_70b(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_70B))
    words = f"plan --model {tmp_path} --policy int4 --devices 4 --kv fp8 --json"
    done = CliRunner().invoke(app, words.split())
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    # 36.36 GB of layers at 4.25 bits, 1.05 GB of the head in int8, 2.10 GB of the embedding, which "int4" leaves in bfloat16
    assert plan["weights_nbytes"] == totals("int4") == pytest.approx(39.52 * GB, rel=1e-3)
    assert plan["kv_nbytes"] == 80 * 8 * (2 * 8192 * (128 + 4) + 2 * 128)  # and the center of keys in bfloat16
    assert plan["kv_device_nbytes"] == plan["kv_nbytes"] // 4
    small = totals({"embed_tokens": "int4", "lm_head": "int8", "*": "int4"})
    mixed, fp8 = totals("mixed"), totals("fp8")
    assert small <= 38 * GB < mixed < fp8 <= 73 * GB


def test_the_table_and_errors(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    done = CliRunner().invoke(app, ["plan", "--model", str(path), "--policy", "int4", "--devices", "2", "--context", "128"])
    assert done.exit_code == 0 and "mlp.down_proj" in done.stdout and "KV cache of 1 × 128" in done.stdout
    assert "policy int4, 2 devices" in done.stdout
    missing = CliRunner().invoke(app, ["plan", "--model", str(tmp_path / "none.json")])
    assert missing.exit_code == 1 and "CheckpointError" in missing.output and "none.json" in missing.output
    with pytest.raises(OptionError, match="devices must be a whole number of 1 or more, found 0"):
        qcompile.memory_plan(SMALL, devices=0)
    with pytest.raises(CheckpointError, match="model_type 'abacus'"):
        qcompile.memory_plan({"model_type": "abacus"})


def test_models_without_a_cache_have_none() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(64, 256), nn.Linear(256, 64)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(ids))

    with torch.device("meta"):
        plan = qcompile.memory_plan(Layers(), policy="int8")
    assert plan.kv_nbytes == 0 and plan.weights_nbytes == 64 * 256 * 4 + 64 * 256 + 64 * 4 + 64 * 4
