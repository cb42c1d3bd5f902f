"""GPTQ and AWQ checkpoints, written bit by bit from the layouts' descriptions, and bitsandbytes' from its own quantizer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import Encoder, check, encoded, llama, packed, write

from qcompile import load
from qcompile.errors import CheckpointError, CorruptCheckpointError, UnsupportedCheckpointError
from qcompile.formats import reference
from qcompile.formats.layout import by_plane, unpack_plane

pytestmark = pytest.mark.usefixtures("one_thread")


def grouped(weight: torch.Tensor, group_of: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [N, K], zero points [N, G] and float16 scales [N, G] by the range of each group; g of a column: ``group_of``."""
    w, groups = weight.numpy(), int(group_of.max()) + 1
    scale, zero = np.zeros((len(w), groups), np.float16), np.zeros((len(w), groups), np.int64)
    codes = np.zeros(w.shape, np.int64)
    for g in range(groups):
        part = w[:, group_of == g]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        scale[:, g] = (high - low) / (2**bits - 1)
        zero[:, g] = np.rint(-low / scale[:, g]).clip(0, 2**bits - 1)
        codes[:, group_of == g] = np.rint(part / scale[:, g : g + 1] + zero[:, g : g + 1]).clip(0, 2**bits - 1)
    return codes, zero, scale


def stream(codes: np.ndarray, bits: int) -> torch.Tensor:
    """[rows, codes] → int32 words of a row: each code's bits after those of the one before, the lowest first."""
    each = (codes[..., None] >> np.arange(bits)) & 1
    data = np.packbits(each.reshape(len(codes), -1).astype(np.uint8), axis=1, bitorder="little")
    return torch.from_numpy(data.view(np.int32).copy())


def gptq(bits: int, group: int, shuffled: bool, first_layout: bool, scale_dtype: torch.dtype = torch.float16) -> Encoder:
    def encode(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        k = weight.shape[1]
        group_of = np.arange(k) // (group if group > 0 else k)
        if shuffled:
            group_of = np.random.default_rng(1).permutation(group_of)
        codes, zero, scale = grouped(weight, group_of, bits)
        value = scale.astype(np.float32)[:, group_of] * (codes - zero[:, group_of])
        stored = zero - 1 if first_layout else zero
        parts = {
            "qweight": stream(codes, bits).t(), "qzeros": stream(stored.T & (2**bits - 1), bits),
            "scales": torch.from_numpy(scale).t().to(scale_dtype), "g_idx": torch.from_numpy(group_of.astype(np.int32)),
        }  # fmt: skip
        return parts, torch.from_numpy(value.astype(np.float32))

    return encode


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "activation order"])
def test_gptq(tmp_path: Path, bits: int, shuffled: bool) -> None:
    model = llama()
    tensors = encoded(model, gptq(bits, 32, shuffled, first_layout=False))
    settings = {"quant_method": "gptq", "bits": bits, "group_size": 32, "checkpoint_format": "gptq_v2", "desc_act": shuffled}
    name = f"int{bits}_zp_g32" + ("_order" if shuffled else "")
    check(write(tmp_path, model, tensors, settings), model, {name}, run=bits == 4)


def test_gptq_zero_points_less_one(tmp_path: Path) -> None:
    model = llama()
    tensors = encoded(model, gptq(4, 64, shuffled=False, first_layout=True))
    path = write(tmp_path, model, tensors, {"quant_method": "gptq", "bits": 4, "group_size": 64})
    check(path, model, {"int4_zp_g64"})


def test_gptq_zero_point_of_all_ones_is_two_to_the_bits(tmp_path: Path) -> None:
    model = llama()
    tensors = encoded(model, gptq(4, 64, shuffled=False, first_layout=True))
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.qzeros"] |= 15
    path = write(tmp_path, model, tensors, {"quant_method": "gptq", "bits": 4, "group_size": 64})
    loaded = packed(load(path))[f"{name}.weight"]
    assert loaded.scheme.format.name == "int4_zpw_g64"
    nibble = (tensors[f"{name}.qweight"][0, 0].item()) & 15
    value = reference.decode(loaded.scheme.format, loaded.planes, *loaded.nk)[0, 0]
    assert value == tensors[f"{name}.scales"][0, 0].float() * (nibble - 16)


def test_gptq_one_group_for_a_row_and_other_scales(tmp_path: Path) -> None:
    model = llama()
    tensors = encoded(model, gptq(4, -1, shuffled=False, first_layout=False, scale_dtype=torch.float32))
    settings = {"quant_method": "gptq", "bits": 4, "group_size": -1, "checkpoint_format": "gptq_v2"}
    check(write(tmp_path, model, tensors, settings), model, {"int4_zp_f32_g128", "int4_zp_f32_g256"})


@pytest.mark.parametrize(
    "end,change,error",
    [
        ("qweight", lambda t: t[:-1], CorruptCheckpointError),
        ("qzeros", lambda t: t[:, :-1], CorruptCheckpointError),
        ("scales", lambda t: t[:-1], CorruptCheckpointError),
        ("scales", lambda t: t.float().fill_(torch.nan).half(), CorruptCheckpointError),
        ("g_idx", lambda t: t - 1, CorruptCheckpointError),
        ("g_idx", lambda t: t * 0, CorruptCheckpointError),
        ("g_idx", lambda t: t * 1000000, CorruptCheckpointError),
        ("qweight", lambda t: t.long(), CorruptCheckpointError),
    ],
)
def test_gptq_tensor_that_does_not_fit_is_named(tmp_path: Path, end: str, change: Any, error: type[CheckpointError]) -> None:
    model = llama()
    tensors = encoded(model, gptq(4, 32, shuffled=True, first_layout=False))
    name = f"model.layers.1.self_attn.v_proj.{end}"
    tensors[name] = change(tensors[name]).contiguous()
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}
    with pytest.raises(error, match=r"model\.layers\.1\.self_attn\.v_proj\."):
        load(write(tmp_path, model, tensors, settings))


@pytest.mark.parametrize("settings", [{"checkpoint_format": "marlin"}, {"bits": 5}, {"bits": None}])
def test_other_layouts_of_gptq_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = llama()
    tensors = encoded(model, gptq(4, 32, shuffled=False, first_layout=False))
    with pytest.raises(UnsupportedCheckpointError, match="GPTQ"):
        load(write(tmp_path, model, tensors, {"quant_method": "gptq", "bits": 4, "group_size": 32, **settings}))


def awq(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    group_of = np.arange(weight.shape[1]) // 64
    codes, zero, scale = grouped(weight, group_of, 4)

    def words(outputs: np.ndarray) -> torch.Tensor:
        """[rows, N] → [rows, N/8]: nibble i is output (0, 2, 4, 6, 1, 3, 5, 7)[i] of each eight."""
        eights = outputs.reshape(len(outputs), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].astype(np.uint32)
        word = sum(eights[..., i] << np.uint32(4 * i) for i in range(8))
        return torch.from_numpy(np.asarray(word, np.uint32).view(np.int32).copy())

    parts = {"qweight": words(codes.T), "qzeros": words(zero.T), "scales": torch.from_numpy(scale).t()}
    return parts, torch.from_numpy(scale.astype(np.float32)[:, group_of] * (codes - zero[:, group_of])).float()


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}


def test_awq(tmp_path: Path) -> None:
    model = llama()
    check(write(tmp_path, model, encoded(model, awq), AWQ), model, {"int4_zp_g64"}, run=True)


@pytest.mark.parametrize("end", ["qweight", "qzeros", "scales"])
def test_awq_tensor_that_does_not_fit_is_named(tmp_path: Path, end: str) -> None:
    model = llama()
    tensors = encoded(model, awq)
    name = f"model.layers.0.mlp.gate_proj.{end}"
    tensors[name] = tensors[name][:-1].contiguous()
    with pytest.raises(CorruptCheckpointError, match=r"model\.layers\.0\.mlp\.gate_proj\."):
        load(write(tmp_path / "short", model, tensors, AWQ))
    del tensors[name]
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.gate_proj\."):
        load(write(tmp_path / "none", model, tensors, AWQ))


@pytest.mark.parametrize("change", [{"version": "gemv"}, {"bits": 3}])
def test_other_layouts_of_awq_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    model = llama()
    with pytest.raises(UnsupportedCheckpointError, match="AWQ"):
        load(write(tmp_path, model, encoded(model, awq), AWQ | change))


def test_awq_without_zero_points_has_them_in_the_middle(tmp_path: Path) -> None:
    """As gptqmodel writes it: zero points of 8 are in the file all the same."""
    model = llama()
    tensors = encoded(model, awq)
    for name in [n for n in tensors if n.endswith(".qzeros")]:
        tensors[name] = torch.full_like(tensors[name], -0x77777778)
    loaded = load(write(tmp_path, model, tensors, AWQ | {"zero_point": False}))
    weight = loaded.model.layers[0].mlp.gate_proj.weight
    zeros = unpack_plane(weight.scheme.format.planes[1], by_plane(weight.scheme.format, weight.planes)["zero"], weight.nk[0])
    assert weight.scheme.label == "int4_zp_g64" and (zeros == 8).all()


WRITER = """
import sys
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from models import trained_decoder
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

method, bits, order, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True", sys.argv[4]
model, tokenizer, text = trained_decoder()
model.save_pretrained(f"{folder}/float"), tokenizer.save_pretrained(f"{folder}/float")
awq = {"quant_method": "awq", "format": "gemm"} if method == "awq" else {}
settings = QuantizeConfig(bits=bits, group_size=128, desc_act=order, device="cpu", **awq)
dtype = torch.float16 if method == "awq" else torch.float32  # the only ones that it takes
ids = tokenizer(text[:60000])["input_ids"]
batch = [{"input_ids": ids[i * 256 : (i + 1) * 256], "attention_mask": [1] * 256} for i in range(16)]
written = GPTQModel.load(f"{folder}/float", settings, dtype=dtype)
written.quantize(batch, batch_size=1)
written.save(f"{folder}/packed")
run = AwqConfig(bits=bits, backend="auto") if method == "awq" else GPTQConfig(bits=bits, backend="gptq_torch")
theirs = AutoModelForCausalLM.from_pretrained(f"{folder}/packed", dtype=dtype, device_map="cpu", quantization_config=run)
with torch.no_grad():
    torch.save(theirs(torch.arange(1, 40)[None]).logits.float(), f"{folder}/logits.pt")
"""


@pytest.mark.parametrize(
    "method,bits,order,name",
    [("gptq", 4, False, "int4_zp_g128"), ("gptq", 3, True, "int3_zp_g128_order"), ("awq", 4, False, "int4_zp_g128")],
)
def test_written_by_gptqmodel(tmp_path: Path, method: str, bits: int, order: bool, name: str) -> None:
    pytest.importorskip("gptqmodel", reason="gptqmodel quantizes and writes the file: make peers")
    tests = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), *sys.path]), "GPTQMODEL_CPU_WORKERS": "2"}
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", WRITER, method, str(bits), str(order), str(tmp_path)],
                         env=env, cwd=tmp_path, capture_output=True, text=True)  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    loaded = load(tmp_path / "packed").float()
    assert packed(loaded) and {w.scheme.label for w in packed(loaded).values()} == {name}
    with torch.no_grad():
        ours, theirs = loaded(torch.arange(1, 40)[None]).logits.float(), torch.load(tmp_path / "logits.pt")
    assert (ours - theirs).norm() <= 1e-3 * theirs.norm()


def bnb4(kind: str, nested: bool, block: int = 64, storage: torch.dtype = torch.uint8) -> Encoder:
    from bitsandbytes import functional

    def encode(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        data, state = functional.quantize_4bit(
            weight, blocksize=block, quant_type=kind, compress_statistics=nested, quant_storage=storage
        )
        value = functional.dequantize_4bit(data, state)
        parts = {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
        return {"weight": data, **parts}, value

    return encode


BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.mark.parametrize(
    "kind,nested,block,name",
    [("nf4", False, 64, "nf4"), ("nf4", True, 64, "nf4"), ("fp4", False, 64, "fp4"), ("fp4", True, 128, "fp4_g128")],
)
def test_bitsandbytes_4_bits(tmp_path: Path, kind: str, nested: bool, block: int, name: str) -> None:
    model = llama()
    tensors = encoded(model, bnb4(kind, nested, block))
    settings = BNB4 | {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested}
    check(write(tmp_path, model, tensors, settings), model, {name}, run=kind == "nf4" and nested)


def test_bitsandbytes_bytes_kept_as_another_dtype(tmp_path: Path) -> None:
    model = llama()
    check(write(tmp_path, model, encoded(model, bnb4("nf4", True, storage=torch.bfloat16)), BNB4), model, {"nf4"})


def bnb8(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    top = weight.abs().amax(1)
    codes = (weight * 127 / top[:, None]).round().to(torch.int8)
    parts = {"weight": codes, "SCB": top, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, codes * top[:, None] / 127


BNB8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}


def test_bitsandbytes_8_bits(tmp_path: Path) -> None:
    model = llama()
    check(write(tmp_path, model, encoded(model, bnb8), BNB8), model, {"int8"}, run=True)


def test_bitsandbytes_8_bits_in_other_orders_are_refused(tmp_path: Path) -> None:
    model = llama()
    tensors = encoded(model, bnb8)
    tensors["model.layers.0.mlp.up_proj.weight_format"] = torch.tensor(2, dtype=torch.uint8)
    with pytest.raises(UnsupportedCheckpointError, match=r"layers\.0\.mlp\.up_proj\.weight_format"):
        load(write(tmp_path, model, tensors, BNB8))


def test_bitsandbytes_blocks_over_rows_are_refused(tmp_path: Path) -> None:
    model = llama()
    with pytest.raises(UnsupportedCheckpointError, match=r"\.weight: blocks of 256 weights reach over rows of 128"):
        load(write(tmp_path, model, encoded(model, bnb4("nf4", False, 256)), BNB4))


STATE = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    "end,change",
    [
        ("weight", lambda t: t[:-2]),
        ("weight.absmax", lambda t: t[:-1]),
        ("weight.quant_map", lambda t: t * 2),
        ("weight.nested_absmax", lambda t: t * torch.nan),
        ("weight.nested_quant_map", lambda t: t[:-1]),
        (STATE, lambda t: t[:-1]),
        (STATE, lambda t: edited(t, shape=[-128, 128])),
        (STATE, lambda t: edited(t, shape=[2**40, 2**40])),
        (STATE, lambda t: edited(t, blocksize=0)),
        (STATE, lambda t: edited(t, nested_offset=None)),
    ],
)
def test_bitsandbytes_tensor_that_does_not_fit_is_named(tmp_path: Path, end: str, change: Any) -> None:
    model = llama()
    tensors = encoded(model, bnb4("nf4", True))
    name = f"model.layers.1.mlp.down_proj.{end}"
    tensors[name] = change(tensors[name]).contiguous()
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj"):
        load(write(tmp_path, model, tensors, BNB4))


def edited(state: torch.Tensor, **changes: Any) -> torch.Tensor:
    """The JSON of a weight with other entries."""
    content = json.loads(bytes(state.tolist())) | changes
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)
