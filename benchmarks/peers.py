"""Models packed by other libraries, to be timed beside ours. Each library is optional; one that is missing is named."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

Model = Callable[[torch.Tensor], Any]
"""Takes ids ``[1, tokens]`` of a prompt that starts anew."""


def missing() -> list[str]:
    """Names of the peers that are not installed here."""
    return [name for name in ("torchao", "llama_cpp") if importlib.util.find_spec(name) is None]


def compiled(model: nn.Module, frozen: bool = False) -> Model:
    """``model`` through Inductor, without a cache of keys and values. ``frozen``: Inductor packs weights for the vendor's
    library when it compiles; Dynamo reads that setting too, so it does nothing as an option of ``torch.compile``."""
    run = torch.compile(model, dynamic=False)

    def call(ids: torch.Tensor) -> Any:
        with torch._inductor.config.patch(freezing=frozen):
            return run(ids, use_cache=False)

    return call


def of_torch(floats: nn.Module) -> Iterator[tuple[str, Model]]:
    """bf16 with the weights packed at compilation."""
    yield "bf16, frozen", compiled(copy.deepcopy(floats), frozen=True)


def of_torchao(floats: nn.Module) -> Iterator[tuple[str, Model]]:
    """torchao's weight-only and dynamic schemes as its wheel has them for CPUs, int8 also with frozen weights. Its settings
    for Inductor are global and would change the baseline too; they are left out."""
    if "torchao" in missing():
        return
    from torchao import quantization as ao
    from torchao.prototype.quantization.int4 import inference_workflow as int4

    schemes = {
        "torchao int8": (ao.Int8WeightOnlyConfig(set_inductor_config=False), False),
        "torchao int8, frozen": (ao.Int8WeightOnlyConfig(set_inductor_config=False), True),
        "torchao int8_dynamic, frozen": (ao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False), True),
        "torchao int4 g128": (int4.PrototypeInt4WeightOnlyConfig(group_size=128, set_inductor_config=False), False),
    }
    for name, (config, frozen) in schemes.items():
        model = copy.deepcopy(floats)
        ao.quantize_(model, config)
        yield name, compiled(model, frozen)


def of_llama_cpp(floats: nn.Module, threads: int) -> Iterator[tuple[str, Model]]:
    """llama.cpp on GGUF files of the same sizes. Codes are random, which changes nothing in its time."""
    if "llama_cpp" in missing():
        return
    import llama_cpp

    with tempfile.TemporaryDirectory() as folder:
        for kind in ("Q8_0", "Q4_0", "Q4_K"):
            path = Path(folder) / f"{kind}.gguf"
            write_gguf(path, floats.config, kind)
            model = llama_cpp.Llama(str(path), n_ctx=512, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads,
                                    verbose=False)  # fmt: skip

            def run(ids: torch.Tensor, model: Any = model) -> None:
                model.reset()
                model.eval(ids[0].tolist())

            yield f"llama.cpp {kind}", run


def write_gguf(path: Path, config: Any, kind: str) -> None:
    """A model of ``config``'s sizes (transformers' names) whose matrices are random blocks of GGUF type ``kind``."""
    import gguf

    heads, kv, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    width, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(config.max_position_embeddings), file.add_embedding_length(width)
    file.add_block_count(config.num_hidden_layers), file.add_feed_forward_length(inner)
    file.add_head_count(heads), file.add_head_count_kv(kv), file.add_rope_dimension_count(size)
    file.add_layer_norm_rms_eps(1e-5), file.add_vocab_size(vocabulary), file.add_tokenizer_model("none")
    file.add_tensor("token_embd.weight", np.full((vocabulary, width), 0.01, np.float32))
    file.add_tensor("output_norm.weight", np.ones(width, np.float32))
    matrices = {"attn_q": (heads * size, width), "attn_k": (kv * size, width), "attn_v": (kv * size, width),
                "attn_output": (width, heads * size), "ffn_gate": (inner, width), "ffn_up": (inner, width),
                "ffn_down": (width, inner)}  # fmt: skip
    quantized = gguf.GGMLQuantizationType[kind]
    weights, nbytes = gguf.GGML_QUANT_SIZES[quantized]
    random = np.random.default_rng(0)
    for layer in range(config.num_hidden_layers):
        for name in ("attn_norm", "ffn_norm"):
            file.add_tensor(f"blk.{layer}.{name}.weight", np.ones(width, np.float32))
        for name, (n, k) in matrices.items():
            blocks = random.integers(0, 256, (n, k // weights, nbytes), np.uint8)
            scales = np.full(2 if kind == "Q4_K" else 1, 1e-4, np.float16).view(np.uint8)  # first in every block
            blocks[..., : len(scales)] = scales
            file.add_tensor(f"blk.{layer}.{name}.weight", blocks.reshape(n, -1), raw_dtype=quantized)
    file.write_header_to_file(), file.write_kv_data_to_file(), file.write_tensors_to_file(), file.close()
