"""How long does it take to load a checkpoint of 4 GB, and in how much memory? Against reading its bytes; one process a format."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

SIZES = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
         "num_hidden_layers": 32, "vocab_size": 32000, "max_position_embeddings": 8192}  # fmt: skip
"""Llama-3-8B with a smaller vocabulary."""

ROUNDS = 3


def shapes() -> dict[str, tuple[int, int]]:
    """[N, K] of a layer's matrices."""
    width, inner, kv = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["hidden_size"] // 4
    return {"self_attn.q_proj": (width, width), "self_attn.k_proj": (kv, width), "self_attn.v_proj": (kv, width),
            "self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner)}  # fmt: skip


def write_gguf(folder: Path) -> Path:
    """Q4_K, with v and down in Q6_K as llama.cpp's Q4_K_M has them in half of the layers."""
    import gguf
    import torch
    from gguf import GGMLQuantizationType

    from qcompile.checkpoints.gguf_blocks import row_bytes, to_blocks
    from qcompile.formats import get, reference

    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, name in (("context_length", "max_position_embeddings"), ("embedding_length", "hidden_size"),
                      ("block_count", "num_hidden_layers"), ("feed_forward_length", "intermediate_size"),
                      ("head_count", "num_attention_heads"), ("head_count_kv", "num_key_value_heads")):  # fmt: skip
        getattr(writer, f"add_{key}")(SIZES[name])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    made: dict[tuple[str, int, int], Any] = {}

    def rows(kind: str, n: int, k: int) -> Any:
        if (kind, n, k) not in made:
            small = to_blocks(kind, reference.quantize(get(kind), torch.randn(16, k)), 16, k)
            made[kind, n, k] = small.repeat(n // 16, 1).view(row_bytes(kind, n, k)).numpy()
        return made[kind, n, k]

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SIZES["num_hidden_layers"])
    tensors: list[tuple[str, str, Any]] = []
    for layer in range(SIZES["num_hidden_layers"]):
        for name, (n, k) in shapes().items():
            kind = "Q6_K" if layer % 2 and name.endswith(("v_proj", "down_proj")) else "Q4_K"
            tensors.append((f"{names.get_name(f'model.layers.{layer}.{name}')}.weight", kind, rows(kind, n, k)))
        for norm in ("attn_norm", "ffn_norm"):
            tensors.append((f"blk.{layer}.{norm}.weight", "F32", torch.ones(SIZES["hidden_size"]).numpy()))
    tensors.append(("output_norm.weight", "F32", torch.ones(SIZES["hidden_size"]).numpy()))
    for name in ("token_embd", "output"):
        tensors.append((f"{name}.weight", "Q6_K", rows("Q6_K", SIZES["vocab_size"], SIZES["hidden_size"])))
    for name, kind, data in tensors:
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, _, data in tensors:
        writer.write_tensor_data(data)
    writer.close()
    return path


def write_gptq(folder: Path) -> Path:
    """4 bits in groups of 128, eight layers to a shard; embeddings and head in float16."""
    import torch
    from safetensors.torch import save_file

    layer: dict[str, Any] = {}
    for name, (n, k) in shapes().items():
        layer |= {f"{name}.qweight": torch.randint(-(2**31), 2**31 - 1, (k // 8, n), dtype=torch.int32),
                  f"{name}.qzeros": torch.full((k // 128, n // 8), 0x77777777, dtype=torch.int32),
                  f"{name}.scales": torch.rand(k // 128, n).half() / 100,
                  f"{name}.g_idx": torch.arange(k, dtype=torch.int32) // 128}  # fmt: skip
    for norm in ("input_layernorm", "post_attention_layernorm"):
        layer[f"{norm}.weight"] = torch.ones(SIZES["hidden_size"]).half()
    index: dict[str, str] = {}
    table = torch.randn(SIZES["vocab_size"], SIZES["hidden_size"]).half()
    last = {"model.embed_tokens.weight": table, "lm_head.weight": table.clone(),
            "model.norm.weight": torch.ones(SIZES["hidden_size"]).half()}  # fmt: skip
    for shard in range(SIZES["num_hidden_layers"] // 8 + 1):
        held = {f"model.layers.{8 * shard + i}.{n}": t.clone() for i in range(8) for n, t in layer.items()}
        held = last if shard == SIZES["num_hidden_layers"] // 8 else held
        file = f"model-{shard}.safetensors"
        save_file(held, folder / file)
        index |= dict.fromkeys(held, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
    config = {**SIZES, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "float16",
              "quantization_config": settings}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_float(folder: Path) -> Path:
    """Four layers in bfloat16, in shards of 1 GB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES | {"num_hidden_layers": 4})).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder, max_shard_size="1GB")
    return folder


def _load(path: str) -> Any:
    """What a user calls: files that are not packed yet are given to transformers, which has each weight packed as it loads."""
    import torch
    from transformers import AutoModelForCausalLM

    import qcompile

    config = Path(path) / "config.json"
    if Path(path).is_file() or "quantization_config" in json.loads(config.read_text()):
        return qcompile.load(path)
    chosen = qcompile.QCompileConfig(policy="int8")
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=chosen)


class _Anonymous(threading.Thread):
    """Watches the memory of this process that is no file's pages, every 2 ms; ``peak`` in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self._done = 0, threading.Event()

    def run(self) -> None:
        from benchmarks.memory import _status

        while not self._done.wait(0.002):
            self.peak = max(self.peak, _status("RssAnon"))

    def stop(self) -> int:
        self._done.set()
        self.join()
        return self.peak


WRITERS = {"GGUF Q4_K + Q6_K": write_gguf, "GPTQ int4 g128": write_gptq, "bf16, packed to int8 by transformers": write_float}


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))


def _forget(path: Path) -> None:
    """Drops the files' pages from the page cache, so that the next reader waits for the disk."""
    for file in _files(path):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(path: str) -> dict[str, Any]:
    """In a fresh process: seconds of loading from the disk, and of reading the files' bytes into memory from the disk; the peak
    of resident memory while loading, whole and above that of the process with everything imported; the same of anonymous memory,
    which leaves out the pages of files that are mapped."""
    import transformers

    from benchmarks.memory import _status
    from qcompile.checkpoints.repack import prepare

    prepare()  # compiled once on a machine
    assert transformers.LlamaForCausalLM
    row: dict[str, Any] = {"file": sum(f.stat().st_size for f in _files(Path(path))), "process": _status("VmRSS")}
    _forget(Path(path))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, anonymous = _status("RssAnon"), _Anonymous()
    anonymous.start()
    start = time.perf_counter()
    model = _load(path)
    row["load s"] = time.perf_counter() - start
    row |= {"anonymous": anonymous.stop() - before, "largest": max(p.numel() * p.element_size() for p in model.parameters())}
    row |= {"peak": _status("VmHWM"), "packed": sum(getattr(p, "packed_nbytes", p.nbytes) for p in model.parameters())}
    del model
    _forget(Path(path))
    start = time.perf_counter()
    held = [file.read_bytes() for file in _files(Path(path))]
    row["read s"] = time.perf_counter() - start
    del held
    row |= {"above process": row["peak"] - row["process"], "bound": int(1.15 * row["packed"]) + 300 * 10**6}
    return row


def run() -> list[dict[str, Any]]:
    """Medians over fresh processes. ``bound``: 1.15 × the packed size and 300 MB, which the peak above that of the process is
    held against; ``anonymous`` is held against the packed size and one tensor of the file (``largest``). Nothing is kept in the
    store, so every round packs."""
    rows: list[dict[str, Any]] = []
    for name, write in WRITERS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = write(Path(folder))
            program = f"import json; from benchmarks.load import measure; print('ROW', json.dumps(measure({str(path)!r})))"
            found = []
            for _ in range(ROUNDS):
                done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                                      env=os.environ | {"QCOMPILE_CACHE_SIZE": "0"})  # fmt: skip
                found.append(json.loads(next(x for x in done.stdout.splitlines() if x.startswith("ROW"))[4:]))
        row = {key: statistics.median(r[key] for r in found) for key in found[0]}
        rows.append({"checkpoint": name, **row, "load / read": statistics.median(r["load s"] / r["read s"] for r in found)})
    return rows
