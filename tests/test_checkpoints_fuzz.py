"""Damaged files of every reader: a model, or an error of ours, soon and in little memory. ``QCOMPILE_TEST_FUZZ=700`` says how
many files of each; without it there are a few."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import Encoder, encoded, llama, pack, write
from checkpoint_mutations import mutate
from gguf_files import model_of, write_gguf
from test_checkpoints_float import _torchao, compressed, fp8, nvfp4, torchao_file
from test_checkpoints_integer import AWQ, BNB4, BNB8, awq, bnb4, bnb8, gptq

import qcompile
from qcompile.checkpoints.load import open_checkpoint
from qcompile.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT = int(os.environ.get("QCOMPILE_TEST_FUZZ", "25"))
SECONDS, BYTES = 5, 400 * 2**20
"""What one file may take, and by how much all of a reader's may raise the peak of resident memory."""


def _small() -> Any:
    return llama(num_hidden_layers=1, hidden_size=64, intermediate_size=128, vocab_size=32, head_dim=32, num_attention_heads=2,
                 num_key_value_heads=1)  # fmt: skip


def _layered(encoder: Callable[[], Encoder], settings: dict[str, Any]) -> Callable[[Path], Any]:
    def make(folder: Path) -> Any:
        model = _small()
        write(folder, model, encoded(model, encoder()), settings)
        return model

    return make


def _compressed(layout: str, **args: Any) -> Callable[[Path], Any]:
    def make(folder: Path) -> Any:
        encode, settings = compressed(layout, **args)
        return _layered(lambda: encode, settings)(folder)

    return make


def _gguf(folder: Path) -> Any:
    model = model_of("llama", num_hidden_layers=1, intermediate_size=256, vocab_size=32, num_attention_heads=2)
    types = {"token_embd": "Q6_K", "attn_q": "Q4_K", "attn_k": "Q8_0", "ffn_up": "IQ4_XS", "ffn_down": "MXFP4"}
    folder.mkdir(exist_ok=True)
    write_gguf(folder / "model.gguf", model, "llama", lambda name: types.get(name.split(".")[-2], "Q4_0"))
    return model


def _own(folder: Path) -> Any:
    model = pack(_small(), {"q_proj": "int4", "k_proj": "nf4", "v_proj": "Q8_0", "o_proj": "int3_zp_g32_order", "*": "int8"})
    qcompile.save(model, folder)
    return model


def _sharded(folder: Path) -> Any:
    model = _small()
    model.save_pretrained(folder, max_shard_size="60KB")
    return model


def _torchao_int4(folder: Path) -> Any:
    model = _small()
    torchao_file(folder, model, _torchao("int8 groups"))
    return model


READERS: dict[str, Callable[[Path], Any]] = {
    "gguf": _gguf,
    "own": _own,
    "float": _sharded,
    "gptq": _layered(lambda: gptq(4, 32, True, False), {"quant_method": "gptq", "bits": 4, "group_size": 32,
                                                "checkpoint_format": "gptq_v2"}),
    "gptq3": _layered(lambda: gptq(3, 32, False, True), {"quant_method": "gptq", "bits": 3, "group_size": 32}),
    "awq": _layered(lambda: awq, AWQ),
    "nf4": _layered(lambda: bnb4("nf4", True), BNB4),
    "int8": _layered(lambda: bnb8, BNB8),
    "packed": _compressed("pack-quantized", num_bits=4, strategy="group", group_size=32, symmetric=False),
    "int": _compressed("int-quantized", num_bits=8, strategy="channel"),
    "nvfp4": _compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
    "mxfp4": _compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32,
                         scale_dtype=torch.uint8, zp_dtype=torch.uint8),
    "fbgemm": _layered(lambda: fp8("row", "weight_scale"), {"quant_method": "fbgemm_fp8"}),
    "blocks": _layered(lambda: fp8("block", "weight_scale_inv"), {"quant_method": "fp8"}),
    "modelopt": _layered(lambda: nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "torchao": _torchao_int4,
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    made: dict[str, tuple[Path, Any]] = {}

    def get(name: str) -> tuple[Path, Any]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "sound"
            made[name] = folder, READERS[name](folder)
        return made[name]

    return get


def _alarm(*_: Any) -> None:
    raise TimeoutError(f"a damaged file took more than {SECONDS} s")


@pytest.mark.parametrize("name", READERS)
def test_damaged_files(name: str, sound: Callable[[str], tuple[Path, Any]], tmp_path: Path) -> None:
    folder, model = sound(name)
    target = folder / "model.gguf" if name == "gguf" else folder
    qcompile.load(target)
    reached = peak = 0
    signal.signal(signal.SIGALRM, _alarm)
    for seed in range(COUNT):
        rng = random.Random(f"{name} {seed}")
        shutil.rmtree(tmp_path / "damaged", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "damaged")
        done = [mutate(rng, tmp_path / "damaged") for _ in range(rng.choice([1, 1, 1, 2]))]
        path = tmp_path / "damaged" / "model.gguf" if name == "gguf" else tmp_path / "damaged"
        start = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            qcompile.load(path, None if seed % 20 == 0 else model)
            reached += 1
        except CheckpointError as error:
            assert str(error), done
        except Exception as error:
            raise AssertionError(f"seed {seed}: {done} gave {type(error).__name__}: {error}") from error
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        assert time.monotonic() - start < SECONDS, (seed, done)
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak = peak or now
        assert now - peak < BYTES, (seed, done, now - peak)
    assert reached < COUNT, "no damage was found"


def test_errors_name_the_tensor(tmp_path: Path) -> None:
    """One damage of each kind of the checklist, in a GGUF, where they are numbers at known places."""
    _gguf(tmp_path)
    path, name = tmp_path / "model.gguf", b"blk.0.attn_k.weight"
    data = path.read_bytes()
    at = data.index(name) + len(name)  # number of dimensions, dimensions, type, offset
    places = {"dims": (at, 4), "first": (at + 4, 8), "type": (at + 20, 4), "offset": (at + 24, 8)}
    offset = int.from_bytes(data[at + 24 : at + 32], "little")
    for field, value, message in (
        ("dims", 0, "0 dimensions"), ("dims", 2**31, "dimensions"), ("first", 2**63, "no room"), ("first", 2**40, "ends at byte"),
        ("first", 0, "no room"), ("type", 99, "unknown type 99"), ("type", 16, "IQ2_XXS"), ("offset", 2**50, "ends at byte"),
        ("offset", offset - 32, "inside"), ("offset", offset + 1, "multiple of the alignment"),
    ):  # fmt: skip
        start, size = places[field]
        path.write_bytes(data[:start] + value.to_bytes(size, "little") + data[start + size :])
        with pytest.raises(CheckpointError, match=f"(attn_k|attn_v|attn_output).*{message}"):
            open_checkpoint(path)
    path.write_bytes(b"GGML" + data[4:])
    with pytest.raises(CheckpointError, match="GGML"):
        open_checkpoint(path)
    path.write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match="cut off"):
        open_checkpoint(path)
