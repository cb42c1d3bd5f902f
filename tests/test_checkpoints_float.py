"""FP8, FP4 and integers as compressed-tensors, ModelOpt, fbgemm and torchao write them, by their own libraries where they
run here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import Encoder, check, encoded, linears, llama, logits, write
from safetensors.torch import save_file

from qcompile import load
from qcompile.errors import CheckpointError, CorruptCheckpointError, UnsupportedCheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def fp8(kind: str, end: str, dtype: torch.dtype = torch.float32, extra: tuple[str, ...] = ()) -> Encoder:
    """Scales per "tensor", "row" or "block" of 128×128, rounded to ``dtype`` before the weights are divided by them."""

    def encode(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        n, k = weight.shape
        rows, cols = {"tensor": (n, k), "row": (1, k), "block": (128, 128)}[kind]
        padded = torch.nn.functional.pad(weight, (0, -k % cols, 0, -n % rows))
        tiles = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // cols, cols)
        scale = (tiles.abs().amax((1, 3)) / 448).to(dtype)
        wide = scale.float().repeat_interleave(rows, 0).repeat_interleave(cols, 1)[:n, :k]
        codes = (weight / wide).to(torch.float8_e4m3fn)
        stored = scale.reshape(()) if kind == "tensor" else scale
        return {"weight": codes, end: stored, **{e: torch.ones(1) for e in extra}}, codes.float() * wide

    return encode


def test_fbgemm(tmp_path: Path) -> None:
    model = llama()
    tensors = encoded(model, fp8("row", "weight_scale", extra=("input_scale_ub",)))
    check(write(tmp_path, model, tensors, {"quant_method": "fbgemm_fp8"}), model, {"fp8_e4m3"}, run=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fine_grained(tmp_path: Path, dtype: torch.dtype) -> None:
    """Sizes that are no multiples of a block: the last blocks cover less."""
    model = llama(intermediate_size=320, hidden_size=192, head_dim=48)
    tensors = encoded(model, fp8("block", "weight_scale_inv", dtype))
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    check(write(tmp_path, model, tensors, settings), model, {"fp8_e4m3_b128"}, run=dtype == torch.float32)


def test_blocks_of_another_size_are_refused(tmp_path: Path) -> None:
    model = llama()
    tensors = encoded(model, fp8("block", "weight_scale_inv"))
    tensors["model.layers.0.mlp.up_proj.weight_scale_inv"] = torch.ones(4, 2)
    with pytest.raises(UnsupportedCheckpointError, match=r"layers\.0\.mlp\.up_proj\.weight_scale_inv: \[4, 2\]"):
        load(write(tmp_path, model, tensors, {"quant_method": "fp8"}))


def test_float8_without_its_scale_is_an_error(tmp_path: Path) -> None:
    model = llama()
    tensors = encoded(model, fp8("row", "weight_scale"))
    del tensors["model.layers.1.mlp.down_proj.weight_scale"]
    with pytest.raises(CorruptCheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight: .*scales are missing"):
        load(write(tmp_path, model, tensors, {"quant_method": "fbgemm_fp8"}))


def test_modelopt_fp8(tmp_path: Path) -> None:
    model = llama()
    tensors = encoded(model, fp8("tensor", "weight_scale", extra=("input_scale",)))
    tensors["model.layers.0.self_attn.k_proj.k_scale"] = torch.ones(1)
    path = write(tmp_path, model, tensors, None)
    settings = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
    (path / "hf_quant_config.json").write_text(json.dumps(settings))
    check(path, model, {"fp8_e4m3_tensor"}, run=True)


def nvfp4(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    top = weight.abs().max() / (448 * 6)
    groups = weight.unflatten(1, (-1, 16))
    scale = (groups.abs().amax(-1) / 6 / top).to(torch.float8_e4m3fn)
    codes = (groups / (scale.float() * top).unsqueeze(-1)).unsqueeze(-1).sub(E2M1).abs().argmin(-1)
    value = (E2M1[codes] * scale.float().unsqueeze(-1) * top).flatten(1)
    codes = codes.flatten(1).to(torch.uint8)
    parts = {"weight": codes[:, ::2] | codes[:, 1::2] << 4, "weight_scale": scale, "weight_scale_2": top,
             "input_scale": torch.tensor(0.5)}  # fmt: skip
    return parts, value


def test_modelopt_nvfp4(tmp_path: Path) -> None:
    model = llama()
    settings = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    check(write(tmp_path, model, encoded(model, nvfp4), settings), model, {"nvfp4"}, run=True)


def test_other_algorithms_of_modelopt_are_refused(tmp_path: Path) -> None:
    model = llama()
    settings = {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}
    with pytest.raises(UnsupportedCheckpointError, match="W4A8_AWQ"):
        load(write(tmp_path, model, encoded(model, nvfp4), settings))


def compressed(layout: str, **args: Any) -> tuple[Encoder, dict[str, Any]]:
    """An encoder by the compressors of compressed-tensors, and the settings of such a checkpoint."""
    from compressed_tensors import quantization
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4 import unpack_fp4_from_uint8
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    weights = quantization.QuantizationArgs(**args)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = BaseCompressor.get_value_from_registry(layout)

    def encode(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        rows = weight
        if weights.strategy in ("group", "tensor_group"):
            rows = weight.unflatten(1, (-1, weights.group_size))
        elif weights.strategy == "tensor":
            rows = weight.reshape(1, -1)
        low, high = rows.amin(-1), rows.amax(-1)
        top = generate_gparam(weight.min(), weight.max()) if weights.strategy == "tensor_group" else None
        scale, zero = calculate_qparams(low, high, weights, **({} if top is None else {"global_scale": top}))
        if weights.strategy in ("channel", "tensor"):
            scale, zero = (t.reshape(-1, 1) if weights.strategy == "channel" else t.reshape(1) for t in (scale, zero))
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        if top is not None:
            state["weight_global_scale"] = top
        stored = compressor.compress(dict(state), scheme)
        value = compressor.decompress(dict(stored), scheme)["weight"]
        if top is not None:  # it decompresses in bfloat16: the same in float32
            codes = unpack_fp4_from_uint8(stored["weight_packed"], *weight.shape, dtype=torch.float32)
            exact = codes * (stored["weight_scale"].float() / top).repeat_interleave(16, 1)
            assert torch.allclose(value.float(), exact, rtol=2**-6)
            value = exact
        return {n: torch.as_tensor(t) for n, t in stored.items()}, value.float()

    group = {"targets": ["Linear"], "weights": json.loads(weights.model_dump_json()), "format": layout}
    settings = {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group},
                "ignore": ["lm_head"], "quantization_status": "compressed"}  # fmt: skip
    return encode, settings


@pytest.mark.parametrize(
    "layout,args,formats,run",
    [
        ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 64}, {"int4_sym_f32_g64"}, True),
        ("pack-quantized", {"num_bits": 3, "strategy": "group", "group_size": 32}, {"int3_sym_f32_g32"}, False),
        ("pack-quantized", {"num_bits": 4, "strategy": "channel"}, {"int4_sym_f32_g128", "int4_sym_f32_g256"}, False),
        ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": False},
         {"int4_zp_f32_g64"}, False),
        ("pack-quantized", {"num_bits": 8, "strategy": "group", "group_size": 64}, {"int8_f32_g64"}, False),
        ("int-quantized", {"num_bits": 8, "strategy": "channel"}, {"int8"}, True),
        ("int-quantized", {"num_bits": 8, "strategy": "tensor"}, {"int8"}, False),
        ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False},
         {"int8_zp_f32_g128", "int8_zp_f32_g256"}, False),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, {"fp8_e4m3"}, False),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, {"fp8_e4m3_tensor"}, False),
        ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
         {"nvfp4"}, False),
        ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32,
                                  "scale_dtype": torch.uint8, "zp_dtype": torch.uint8}, {"mxfp4"}, True),
    ],
)  # fmt: skip
def test_compressed_tensors(tmp_path: Path, layout: str, args: dict[str, Any], formats: set[str], run: bool) -> None:
    model = llama()
    encode, settings = compressed(layout, **args)
    check(write(tmp_path, model, encoded(model, encode), settings), model, formats, run=run)


def test_compressed_tensors_words_with_unused_bits(tmp_path: Path) -> None:
    """3 bits as releases before 0.13 packed them: ten codes in a word."""

    def encode(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        scale = weight.abs().amax(1, keepdim=True) / 4
        codes = (weight / scale).round().clamp(-4, 3).to(torch.int64)
        words = torch.nn.functional.pad(codes + 4, (0, -weight.shape[1] % 10)).unflatten(1, (-1, 10))
        packed = (words << (3 * torch.arange(10))).sum(-1).to(torch.int32)
        return {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}, codes * scale

    model = llama()
    _, settings = compressed("pack-quantized", num_bits=3, strategy="channel")
    path = write(tmp_path, model, encoded(model, encode), settings)
    check(path, model, {"int3_sym_f32_g128", "int3_sym_f32_g256"})


def test_compressed_tensors_in_activation_order(tmp_path: Path) -> None:
    """The column of each group as ``weight_g_idx`` says; releases until 2026 wrote it."""
    encode, settings = compressed("pack-quantized", num_bits=4, strategy="group", group_size=32)
    generator = torch.Generator().manual_seed(0)

    def shuffled(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

        order = torch.randperm(weight.shape[1], generator=generator)
        parts, value = encode(name, weight[:, order])
        groups, back = torch.arange(weight.shape[1]) // 32, torch.argsort(order)
        codes = unpack_from_int32(parts["weight_packed"], 4, weight.shape)[:, back]
        more = {"weight_packed": pack_to_int32(codes.contiguous(), 4), "weight_g_idx": groups[back].to(torch.int32)}
        return parts | more, value[:, back]

    model = llama()
    check(write(tmp_path, model, encoded(model, shuffled), settings), model, {"int4_sym_f32_g32_order"}, run=True)


@pytest.mark.parametrize(
    "settings",
    [{"format": "marlin-24"}, {"format": "mxfp8-quantized"}, {"sparsity_config": {"format": "sparse-24-bitmask"}},
     {"transform_config": {"config_groups": {"r1": {}}}}],
)  # fmt: skip
def test_other_layouts_of_compressed_tensors_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = llama()
    encode, usual = compressed("int-quantized", num_bits=8, strategy="channel")
    with pytest.raises(UnsupportedCheckpointError, match="compressed-tensors"):
        load(write(tmp_path, model, encoded(model, encode), usual | settings))


@pytest.mark.parametrize(
    "end,change",
    [
        ("weight_packed", lambda t: t[:, :-1]),
        ("weight_scale", lambda t: t[:, :-1]),
        ("weight_scale", lambda t: t / 0),
        ("weight_shape", lambda t: -t),
        ("weight_shape", lambda t: t * 2**40),
        ("weight_zero_point", lambda t: t[:-1]),
    ],
)
def test_compressed_tensor_that_does_not_fit_is_named(tmp_path: Path, end: str, change: Any) -> None:
    model = llama()
    encode, settings = compressed("pack-quantized", num_bits=4, strategy="group", group_size=64, symmetric=False)
    tensors = encoded(model, encode)
    name = f"model.layers.1.self_attn.o_proj.{end}"
    tensors[name] = change(tensors[name]).contiguous()
    with pytest.raises(CorruptCheckpointError, match=r"model\.layers\.1\.self_attn\.o_proj\."):
        load(write(tmp_path, model, tensors, settings))


def torchao_file(folder: Path, model: torch.nn.Module, config: Any) -> None:
    """``model`` quantized by torchao as its safetensors; ``model`` gets the weights that they stand for."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import quantize_

    quantize_(model, config, lambda module, name: name in linears(model))
    state = {n: p.detach() for n, p in model.named_parameters()}
    tensors, metadata = flatten_tensor_state_dict(state)
    write(folder, model, {}, {"quant_method": "torchao"})
    save_file(tensors, folder / "model.safetensors", metadata)
    for name in linears(model):
        layer = model.get_submodule(name)
        layer.weight = torch.nn.Parameter(layer.weight.dequantize().float())


def _torchao(name: str) -> Any:
    import torchao.quantization as q

    return {
        "int8": lambda: q.Int8WeightOnlyConfig(version=2),
        "int8 dynamic": lambda: q.Int8DynamicActivationInt8WeightConfig(version=2),
        "int8 groups": lambda: q.Int8WeightOnlyConfig(version=2, granularity=q.PerGroup(64)),
        "int4": lambda: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(64)),
        "int4 zero points": lambda: q.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=q.PerGroup(64), mapping_type=q.MappingType.ASYMMETRIC),
        "int3": lambda: q.IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=q.PerGroup(32)),
        "float8": lambda: q.Float8WeightOnlyConfig(version=2),
    }[name]()  # fmt: skip


@pytest.mark.parametrize(
    "name,formats,run",
    [("int8", {"int8"}, True), ("int8 dynamic", {"int8"}, False), ("int8 groups", {"int8_f32_g64"}, False),
     ("int4", {"int4_sym_f32_g64"}, False), ("int4 zero points", {"int4_zp_f32_g64"}, False),
     ("int3", {"int3_sym_f32_g32"}, False), ("float8", {"fp8_e4m3"}, False)],
)  # fmt: skip
def test_torchao(tmp_path: Path, name: str, formats: set[str], run: bool) -> None:
    model = llama()
    torchao_file(tmp_path, model, _torchao(name))
    check(tmp_path, model, formats, run=run)


def test_torchao_fp4(tmp_path: Path) -> None:
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    model = llama()
    state = {n: p.detach() for n, p in model.named_parameters()}
    for i, name in enumerate(linears(model)):
        weight = state[f"{name}.weight"].bfloat16()
        if i % 2:
            made = NVFP4Tensor.to_nvfp4(weight, 16, per_tensor_scale=weight.abs().max().float() / (448 * 6))
        else:
            made = MXTensor.to_mx(weight, torch.float4_e2m1fn_x2, 32)
        state[f"{name}.weight"] = made
        model.get_submodule(name).weight = torch.nn.Parameter(made.dequantize(torch.float32))
    tensors, metadata = flatten_tensor_state_dict(state)
    write(tmp_path, model, {}, {"quant_method": "torchao"})
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    check(tmp_path, model, {"nvfp4", "mxfp4"})


def test_torchao_tensor_that_does_not_fit_is_named(tmp_path: Path) -> None:
    model = llama()
    torchao_file(tmp_path, model, _torchao("int8"))
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        tensors, metadata = {n: file.get_tensor(n) for n in file.keys()}, file.metadata()
    name = "model.layers.1.mlp.up_proj"
    for changed, entry in (({}, '{"_type": "Int4TilePackedTo4dTensor"}'), ({f"{name}._weight_scale": None}, None),
                           ({f"{name}._weight_qdata": torch.zeros(3, 3, dtype=torch.int8)}, None)):  # fmt: skip
        held = {n: t for n, t in (tensors | changed).items() if t is not None}
        save_file(held, tmp_path / "model.safetensors", metadata | ({f"{name}.weight": entry} if entry else {}))
        with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj"):
            load(tmp_path)


def test_activations_and_logits_stay_in_the_models_dtype(tmp_path: Path) -> None:
    model = llama()
    tensors = encoded(model, fp8("row", "weight_scale"))
    path = write(tmp_path, model, tensors, {"quant_method": "fbgemm_fp8"})
    loaded = load(path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16} and logits(loaded).dtype == torch.bfloat16
