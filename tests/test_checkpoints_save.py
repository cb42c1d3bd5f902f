"""A model saved in qcompile's own layout and read back, and exported for other libraries."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import floats, llama, logits, pack, packed
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

import qcompile
from qcompile import FormatSpec, Plane, register_format, symbols
from qcompile.errors import CheckpointError, CorruptCheckpointError, MissingTensorError, UnsupportedCheckpointError
from qcompile.formats import BUILT_IN, Scheme, get, scaled, serial
from qcompile.recorder import recorder_of
from qcompile.tensor import as_parameter, quantize

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(6).view(1, 6)


def quantized(formats: str | dict[str, str], **changes: Any) -> Any:
    return pack(llama(**changes), {"*": formats} if isinstance(formats, str) else formats)


def same(loaded: nn.Module, model: nn.Module) -> None:
    """Every parameter: class, dtype and planes."""
    ours, theirs = dict(loaded.named_parameters()), dict(model.named_parameters())
    assert list(ours) == list(theirs)
    for name, parameter in theirs.items():
        assert type(ours[name]) is type(parameter) and ours[name].dtype == parameter.dtype, name
        assert torch.equal(ours[name], parameter), name


MIXED = {"q_proj": "int4", "k_proj": "nf4_dq", "v_proj": "Q4_K", "up_proj": "int8_dynamic", "embed_tokens": "Q8_0",
         "lm_head": "fp8", "down_proj": "nvfp4"}  # fmt: skip


def test_a_directory_holds_all(tmp_path: Path) -> None:
    model = llama(hidden_size=256)
    qcompile.quantize_(model, IDS, policy=MIXED)
    file = qcompile.save(model, tmp_path)
    assert file == tmp_path / "model.safetensors" and not list(tmp_path.glob(".*"))
    loaded = qcompile.load(tmp_path)
    same(loaded, model)
    assert loaded.model.layers[0].mlp.up_proj.weight.scheme.activations == "int8"
    assert torch.equal(logits(loaded), logits(model))
    assert recorder_of(loaded).plan == recorder_of(model).plan and len(recorder_of(model).plan)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = quantized({"embed_tokens": "Q8_0", "*": "int8"}, tie_word_embeddings=True)
    loaded = qcompile.load(qcompile.save(model, tmp_path).parent)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    same(loaded, model)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.register_buffer("count", torch.zeros(3, dtype=torch.long))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def test_any_module_into_one_made_by_the_user(tmp_path: Path) -> None:
    model = Tied()
    model.second.weight = model.first.weight = as_parameter(quantize(model.first.weight, Scheme(get("int8"))))
    model.count += 7
    file = qcompile.save(model, tmp_path / "model.safetensors")
    with torch.device("meta"):
        empty = Tied()
    empty.scratch = torch.ones(2)
    loaded = qcompile.load(file, empty)
    assert loaded is empty and loaded.first.weight is loaded.second.weight and loaded.count.tolist() == [7, 7, 7]
    assert torch.equal(loaded.first.weight, model.first.weight) and torch.equal(loaded.second.bias, model.second.bias)
    with pytest.raises(MissingTensorError, match="no config.json"):
        qcompile.load(file)
    with pytest.raises(MissingTensorError, match=r"no parameter for first\.weight"):
        qcompile.load(file, nn.ModuleDict({"second": nn.Linear(32, 32)}))


def test_conv1d_keeps_its_orientation(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=160, n_positions=32)).eval()
    pack(model, {"c_attn": "int8", "c_fc": "int8", "attn.c_proj": "int8"})
    loaded = qcompile.load(qcompile.save(model, tmp_path).parent)
    same(loaded, model)
    assert loaded.transformer.h[0].attn.c_proj.weight.transposed


def user_format() -> FormatSpec:
    q, d, s = symbols("q d s")
    return FormatSpec("thirds_g32", (Plane("d", "f32", 64), Plane("s", "u4", 32), Plane("q", "u3")),
                      value=d * (s + 1) * (q - 3.5) / 3)  # fmt: skip


def test_formats_of_the_users_own_come_with_the_file(tmp_path: Path) -> None:
    register_format(user_format())
    model = Tied()
    model.first.weight = as_parameter(quantize(model.first.weight, Scheme(get("thirds_g32"))))
    file = qcompile.save(model, tmp_path / "model.safetensors")
    program = (
        "import torch, qcompile; from torch import nn; from qcompile.formats import reference\n"
        "model = nn.Module(); model.first, model.second = nn.Linear(32, 32), nn.Linear(32, 32)\n"
        "model.register_buffer('count', torch.zeros(3, dtype=torch.long))\n"
        f"w = qcompile.load({str(file)!r}, model).first.weight\n"
        "print(float(reference.decode(w.scheme.format, w.planes, *w.nk).double().abs().sum()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) == float(floats(model)["first.weight"].double().abs().sum())


def test_a_format_that_means_something_else_here_is_refused(tmp_path: Path) -> None:
    model = Tied()
    model.first.weight = as_parameter(quantize(model.first.weight, Scheme(get("int8"))))
    file = qcompile.save(model, tmp_path / "model.safetensors")
    q, scale = symbols("q scale")
    other = FormatSpec("int8", get("int8").planes, value=scale * q / 2)
    rewrite(file, lambda entry: entry["formats"].update(int8=serial.to_dict(other)))
    with pytest.raises(CheckpointError, match="the file's format 'int8' is not the one of this process"):
        qcompile.load(file, Tied())


def rewrite(file: Path, change: Any, tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Changes the header's entry, and tensors."""
    with safe_open(file, "pt") as opened:
        held, metadata = {n: opened.get_tensor(n).clone() for n in opened.keys()}, opened.metadata()
    entry = json.loads(metadata["qcompile"])
    change(entry)
    save_file(held | (tensors or {}), file, metadata | {"qcompile": json.dumps(entry)})


WEIGHT = "model.layers.0.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e["weights"][WEIGHT].update(shape=[256, 64]),
        lambda e: e["weights"][WEIGHT].update(shape=[-256, 128]),
        lambda e: e["weights"][WEIGHT].update(shape=[2**62, 2**62]),
        lambda e: e["weights"][WEIGHT].update(format="nf4"),
        lambda e: e["weights"][WEIGHT].update(dtype="int8"),
        lambda e: e["weights"][WEIGHT].update(dtype="load"),
        lambda e: e["weights"][WEIGHT].update(activations=["int8"]),
        lambda e: e["weights"].update({WEIGHT: None}),
        lambda e: e["formats"]["int8"].update(value=["^", 10, 1000000000]),
        lambda e: e["formats"]["int8"].update(value=["*", "scale", ["+", *(["q"] * 1000)]]),
        lambda e: e["formats"]["int8"].update(value=["call", "exec", "q"]),
        lambda e: e["formats"]["int8"].update(planes=[["scale", "f32", -1, 1]]),
        lambda e: e["formats"]["int8"].update(fingerprint="0" * 16),
        lambda e: e.pop("formats"),
        lambda e: e.update(version=2),
    ],
)
def test_headers_that_do_not_hold(tmp_path: Path, change: Any) -> None:
    file = qcompile.save(quantized("int8"), tmp_path)
    rewrite(file, change)
    with pytest.raises(CheckpointError, match="gate_proj|format|version"):
        qcompile.load(tmp_path)


def test_scales_and_orders_that_do_not_hold(tmp_path: Path) -> None:
    model = llama()
    weight = quantize(model.model.layers[0].mlp.gate_proj.weight, Scheme(get("int4_zp_g128_order_scaled")))
    model.model.layers[0].mlp.gate_proj.weight = as_parameter(weight)
    bad_planes = (("scale", weight.planes[0] * torch.nan), ("order", weight.planes[-2] * 0), ("factors", -weight.planes[-1]))
    for plane, bad in bad_planes:
        file = qcompile.save(model, tmp_path / plane)
        rewrite(file, lambda entry: None, {f"{WEIGHT}.{plane}": bad})
        with pytest.raises(CorruptCheckpointError, match=rf"gate_proj\.weight\.{plane}"):
            qcompile.load(tmp_path / plane)


@pytest.mark.parametrize("spec", [*BUILT_IN, scaled(get("Q4_K")), user_format()], ids=lambda s: s.name)
def test_every_declaration_comes_back_from_json(spec: FormatSpec) -> None:
    again = serial.from_dict(json.loads(json.dumps(serial.to_dict(spec))))
    assert again.fingerprint == spec.fingerprint and again.part_names == spec.part_names


def test_a_float_model_passes_through(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "hf")
    same(qcompile.load(tmp_path / "hf"), model)
    model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    same(qcompile.load(tmp_path / "shards"), model)
    next((tmp_path / "shards").glob("*-00002-*.safetensors")).unlink()
    with pytest.raises(MissingTensorError, match="model-00002-of-"):
        qcompile.load(tmp_path / "shards")


def test_tensors_of_the_meta_device_are_not_saved(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    with pytest.raises(CheckpointError, match="weight: is on the meta device"):
        qcompile.save(model, tmp_path / "model.safetensors")


def rel(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize(
    "policy",
    [{"q_proj": "int4_sym_g64", "k_proj": "int4_sym_g32", "up_proj": "int8", "down_proj": "int8_g64", "o_proj": "int3_sym_g64"},
     {"q_proj": "fp8_e4m3", "k_proj": "fp8_e4m3_tensor", "v_proj": "fp8_e4m3_b128"},
     {"up_proj": "mxfp4"}, {"down_proj": "nvfp4"}],
    ids=["integers", "fp8", "mxfp4", "nvfp4"],
)  # fmt: skip
def test_exported_to_compressed_tensors(tmp_path: Path, policy: dict[str, str]) -> None:
    """transformers and compressed-tensors load it and decompress the same weights; so does :func:`qcompile.load`."""
    model = quantized(policy)
    qcompile.save(model, tmp_path, layout="compressed-tensors")
    again = qcompile.load(tmp_path)
    ours, wanted = floats(again), floats(model)
    assert set(packed(again)) == set(packed(model))
    assert all(torch.allclose(ours[n], w, rtol=1e-6) for n, w in wanted.items())
    # It decompresses 4-bit floats to bfloat16 whatever dtype is asked for.
    dtype, bound = (torch.bfloat16, 2e-2) if set(policy.values()) & {"mxfp4", "nvfp4"} else (torch.float32, 1e-3)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    reference = llama()
    reference.load_state_dict(wanted)
    assert rel(logits(theirs).float(), logits(reference)) <= bound


@pytest.mark.parametrize("name", ["int4_zp_g64", "int8_zp_g32", "int3_zp_g64"])
def test_zero_points_exported_to_compressed_tensors(tmp_path: Path, name: str) -> None:
    """Its compressor reads them. (transformers refuses all checkpoints with packed zero points as of compressed-tensors 0.20: a
    model on the meta device gets them unpacked.)"""
    from compressed_tensors import quantization
    from compressed_tensors.compressors import PackedQuantizationCompressor

    model = quantized({"q_proj": name})
    file = qcompile.save(model, tmp_path, layout="compressed-tensors")
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    scheme = quantization.QuantizationConfig(**settings).config_groups["group_0"]
    layer = "model.layers.1.self_attn.q_proj"
    with safe_open(file, "pt") as opened:
        state = {n.removeprefix(f"{layer}."): opened.get_tensor(n) for n in opened.keys() if n.startswith(layer)}
    state["weight_scale"] = state["weight_scale"].float()
    value = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    assert torch.equal(value, floats(model)[f"{layer}.weight"])
    assert torch.equal(floats(qcompile.load(tmp_path))[f"{layer}.weight"], value)


GPTQ = ["int4_sym_g64", "int4_zp_g32", "int8_g32", "int3_zp_g64", "int2_zp_g64", "int4_zp_g32_order"]


def packed_layers(name: str, **changes: Any) -> Any:
    """A model whose linear layers, all but the head, are in format ``name``."""
    model = llama(**changes)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.lm_head:
            module.weight = as_parameter(quantize(module.weight, Scheme(get(name))))
            if name.endswith("_order"):
                shuffled(module.weight)
    return model


@pytest.mark.parametrize("name", GPTQ)
def test_gptq_exports_load_in_transformers(tmp_path: Path, name: str) -> None:
    pytest.importorskip("gptqmodel", reason="transformers needs gptqmodel and optimum to load GPTQ: make peers")
    from transformers import GPTQConfig

    model = packed_layers(name, hidden_size=256, intermediate_size=512)
    qcompile.save(model, tmp_path, layout="gptq")
    bits = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["bits"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, device_map="cpu",
                                                  quantization_config=GPTQConfig(bits=bits, backend="gptq_torch"))  # fmt: skip
    assert type(loaded.model.layers[0].mlp.up_proj).__module__.startswith("gptqmodel.")
    reference = llama(hidden_size=256, intermediate_size=512)
    reference.load_state_dict(floats(model))
    assert rel(logits(loaded).float(), logits(reference)) <= 1e-3


@pytest.mark.parametrize("name", GPTQ)
def test_exported_to_gptq(tmp_path: Path, name: str) -> None:
    model = packed_layers(name)
    qcompile.save(model, tmp_path, layout="gptq")
    ours, wanted = floats(qcompile.load(tmp_path)), floats(model)
    assert all(torch.equal(ours[n], w) for n, w in wanted.items())
    for layer in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        assert torch.equal(by_description(tmp_path, layer), wanted[f"{layer}.weight"])


def shuffled(weight: Any) -> None:
    order = torch.randperm(weight.nk[1], generator=torch.Generator().manual_seed(0))
    weight.planes[-1].copy_(order)


def by_description(folder: Path, layer: str) -> torch.Tensor:
    """weight[n, k] = scales[g, n] · (code[k, n] − zero[g, n]), g = g_idx[k], with Python's integers."""
    bits = json.loads((folder / "config.json").read_text())["quantization_config"]["bits"]
    with safe_open(folder / "model.safetensors", "pt") as file:
        words, zeros, scales, groups = (file.get_tensor(f"{layer}.{e}") for e in ("qweight", "qzeros", "scales", "g_idx"))

    def codes(column: torch.Tensor, count: int) -> torch.Tensor:
        number = sum((int(w) & 0xFFFFFFFF) << (32 * i) for i, w in enumerate(column.tolist()))
        return torch.tensor([(number >> (bits * i)) & (2**bits - 1) for i in range(count)])

    k, n = len(groups), words.shape[1]
    code = torch.stack([codes(words[:, i], k) for i in range(n)])
    zero = torch.stack([codes(row, n) for row in zeros], 1)
    at = groups.long()
    return scales.float().t()[:, at] * (code - zero[:, at])


def test_layers_that_differ_are_told_apart_for_gptq(tmp_path: Path) -> None:
    model = quantized({"q_proj": "int4_sym_g64", "up_proj": "int8_g32"})
    qcompile.save(model, tmp_path, layout="gptq")
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert settings["bits"] == 4 and {v.get("bits") for v in settings["dynamic"].values()} == {8, None}
    ours, wanted = floats(qcompile.load(tmp_path)), floats(model)
    assert all(torch.equal(ours[n], w) for n, w in wanted.items())


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq"])
def test_what_has_no_equal_is_refused_by_name(tmp_path: Path, layout: str) -> None:
    model = quantized({"v_proj": "int4"})
    with pytest.raises(UnsupportedCheckpointError, match=r"layers\.0\.self_attn\.v_proj: .* has nothing equal to int4_g128"):
        qcompile.save(model, tmp_path, layout=layout)
    with pytest.raises(UnsupportedCheckpointError, match=r"model\.embed_tokens\.weight: packed in Embedding"):
        qcompile.save(quantized({"embed_tokens": "int8"}), tmp_path, layout=layout)
    with pytest.raises(CheckpointError, match="layout='awq': use None or one of compressed-tensors, gptq"):
        qcompile.save(model, tmp_path, layout="awq")
    assert not list(tmp_path.iterdir())


def test_saving_leaves_the_model_alone(tmp_path: Path) -> None:
    model = quantized("int8")
    before = copy.deepcopy(model)
    qcompile.save(model, tmp_path)
    same(model, before)
