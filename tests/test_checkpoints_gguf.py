"""GGUF files of several architectures and types: loaded, run, and written back byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoint_files import floats, logits, packed
from gguf_files import MODELS, mixture, model_of, write_gguf
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

import qcompile
from qcompile.checkpoints.gguf_blocks import BLOCKS
from qcompile.checkpoints.gguf_header import read_header
from qcompile.errors import CheckpointError, MissingTensorError, UnsupportedCheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")


def same_weights(loaded: torch.nn.Module, model: torch.nn.Module) -> None:
    wanted = floats(model)
    for name, value in floats(loaded).items():
        assert torch.allclose(value, wanted[name], rtol=1e-6, atol=1e-7), name


def same_bytes(first: Path, second: Path) -> None:
    """All tensors of both files: order, type, shape and bytes."""
    ours, theirs = gguf.GGUFReader(first).tensors, gguf.GGUFReader(second).tensors
    assert [t.name for t in ours] == [t.name for t in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.tensor_type == b.tensor_type and a.shape.tolist() == b.shape.tolist(), a.name
        assert a.data.tobytes() == b.data.tobytes(), a.name


@pytest.mark.parametrize("kind", MODELS)
def test_architecture(tmp_path: Path, kind: str) -> None:
    """Weights and logits of the model that the file was made of, and the same bytes when it is written again."""
    model = model_of(kind)
    path = write_gguf(tmp_path / "model.gguf", model, kind, mixture)
    loaded = qcompile.load(path)
    assert {p.scheme.format.name for p in packed(loaded).values()} >= {"Q4_K", "Q6_K", "Q5_K"}
    same_weights(loaded, model)
    ours, theirs = logits(loaded), logits(model)
    assert (ours - theirs).norm() <= 1e-3 * theirs.norm()
    again = qcompile.save(loaded, tmp_path / "again.gguf", like=path)
    same_bytes(path, again)


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_loaded_model_compiles(tmp_path: Path) -> None:
    loaded = qcompile.load(write_gguf(tmp_path / "model.gguf", model_of("llama"), "llama", mixture))
    eager = logits(loaded)
    compiled = torch.compile(loaded, backend="qcompile", options={"policy": "float"})  # v is F16 in the file: it stays so
    assert (logits(compiled) - eager).norm() <= 1e-4 * eager.norm()
    report = qcompile.explain(compiled, torch.zeros(1, 4, dtype=torch.long))
    kernels = {r.kernel.split()[-1] for r in report.plan if r.decision.site.is_linear and r.kernel}
    assert kernels >= {"Q4_0", "Q4_K", "Q5_K", "Q8_0"}


def test_metadata_come_back(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", model_of("llama"), "llama", mixture)
    again = qcompile.save(qcompile.load(path), tmp_path / "again.gguf", like=path)
    ours, theirs = gguf.GGUFReader(again).fields, gguf.GGUFReader(path).fields
    assert list(ours) == list(theirs)
    for key, field in theirs.items():
        if not key.startswith("GGUF."):
            assert ours[key].types == field.types and ours[key].contents() == field.contents(), key


@pytest.mark.parametrize("kind", MODELS)
def test_written_from_the_configuration_alone(tmp_path: Path, kind: str) -> None:
    path = write_gguf(tmp_path / "model.gguf", model_of(kind), kind, mixture)
    loaded = qcompile.load(path)
    again = qcompile.load(qcompile.save(loaded, tmp_path / "again.gguf"))
    same_weights(again, loaded)
    assert torch.equal(logits(again), logits(loaded))


@pytest.mark.parametrize("kind", MODELS)
def test_llama_cpp_computes_the_same(tmp_path: Path, kind: str) -> None:
    """llama.cpp rounds activations to 8 bits before it multiplies by packed weights; floats it takes as they are."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp computes the other side: make peers")
    loaded = qcompile.load(write_gguf(tmp_path / "model.gguf", model_of(kind), kind, lambda tensor: "F32"))
    path = qcompile.save(loaded, tmp_path / "again.gguf")
    theirs = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    ids = [i * 11 % 160 for i in range(6)]
    theirs.eval(ids)
    with torch.no_grad():
        ours = loaded(torch.tensor([ids])).logits[0]
    assert (ours - torch.from_numpy(np.array(theirs.scores[:6]))).norm() <= 1e-3 * ours.norm()


@pytest.mark.parametrize("name", BLOCKS)
def test_every_type(tmp_path: Path, name: str) -> None:
    model = model_of("llama")
    path = write_gguf(tmp_path / "model.gguf", model, "llama", lambda tensor: name)
    loaded = qcompile.load(path)
    same_weights(loaded, model)
    same_bytes(path, qcompile.save(loaded, tmp_path / "again.gguf", like=path))


def test_tied_head(tmp_path: Path) -> None:
    model = model_of("llama", tie_word_embeddings=True)
    path = write_gguf(tmp_path / "model.gguf", model, "llama", lambda tensor: "Q8_0")
    loaded = qcompile.load(path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert type(loaded.lm_head.weight).__name__ == "Quantized_Q8_0"
    same_weights(loaded, model)
    same_bytes(path, qcompile.save(loaded, tmp_path / "again.gguf", like=path))


def test_biases_of_q_and_k_are_reordered_with_them(tmp_path: Path) -> None:
    model = model_of("llama", attention_bias=True)
    path = write_gguf(tmp_path / "model.gguf", model, "llama", lambda tensor: "F32")
    loaded = qcompile.load(path)
    assert loaded.config.attention_bias and not packed(loaded)
    same_weights(loaded, model)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip


def with_factors(writer: gguf.GGUFWriter) -> None:
    model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_attention_heads=1, num_hidden_layers=1, vocab_size=8,
                                         intermediate_size=8, rope_scaling=LLAMA3, rope_theta=10000.0))  # fmt: skip
    usual = 10000.0 ** -(np.arange(32) / 32)
    writer.add_tensor("rope_freqs.weight", (usual / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32))


def test_factors_of_rotary_frequencies(tmp_path: Path) -> None:
    model = model_of("llama", rope_scaling=LLAMA3)
    path = write_gguf(tmp_path / "model.gguf", model, "llama", lambda tensor: "Q8_0", with_factors)
    loaded = qcompile.load(path)
    wanted = model.model.rotary_emb.inv_freq
    assert not torch.allclose(wanted, model_of("llama").model.rotary_emb.inv_freq, rtol=1e-2)
    assert torch.allclose(loaded.model.rotary_emb.inv_freq, wanted, rtol=1e-6)
    given = qcompile.load(path, model_of("llama", rope_scaling=LLAMA3))
    assert torch.equal(given.model.rotary_emb.inv_freq, wanted)
    same_bytes(path, qcompile.save(loaded, tmp_path / "again.gguf", like=path))
    with pytest.raises(UnsupportedCheckpointError, match="like="):
        qcompile.save(loaded, tmp_path / "again.gguf")


def test_long_and_short_factors_of_phi3(tmp_path: Path) -> None:
    factors = {"long": np.linspace(1, 4, 32, dtype=np.float32), "short": np.linspace(1, 2, 32, dtype=np.float32)}

    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_orig_ctx_len(16)
        for name, values in factors.items():
            writer.add_tensor(f"rope_factors_{name}.weight", values)

    path = write_gguf(tmp_path / "model.gguf", model_of("phi3"), "phi3", lambda tensor: "Q8_0", edit)
    scaling = qcompile.load(path).config.rope_parameters
    assert scaling["rope_type"] == "longrope" and scaling["original_max_position_embeddings"] == 16
    for name, values in factors.items():
        assert np.allclose(scaling[f"{name}_factor"], values)


def test_into_a_given_model(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", model_of("mistral"), "mistral", mixture)
    given = model_of("mistral").to(torch.bfloat16)
    loaded = qcompile.load(path, given)
    assert loaded is given and {p.dtype for p in given.parameters()} == {torch.bfloat16}
    assert type(given).__name__ == "MistralForCausalLM" and type(given.lm_head.weight).__name__ == "Quantized_Q8_0"
    assert qcompile.load(path, dtype=torch.float16).lm_head.weight.dtype == torch.float16


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", model_of("llama"), "llama", mixture)
    with pytest.raises(MissingTensorError, match=r"no tensor for model\.layers\.0\.self_attn\.q_norm\.weight"):
        qcompile.load(path, model_of("qwen3"))
    with pytest.raises(MissingTensorError, match=r"no parameter for blk\.1\.attn_q\.weight"):
        qcompile.load(path, model_of("llama", num_hidden_layers=1))
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight: the checkpoint has \[512, 256\], the model \[256, 256\]"):
        qcompile.load(path, model_of("llama", intermediate_size=256))


def test_parts_of_a_split_file(tmp_path: Path) -> None:
    model = model_of("llama")
    whole = write_gguf(tmp_path / "whole.gguf", model, "llama", mixture)
    reader, half = gguf.GGUFReader(whole), 11
    for part in (1, 2):
        writer = gguf.GGUFWriter(tmp_path / f"model-0000{part}-of-00002.gguf", "llama")
        writer.add_uint16("split.no", part - 1)
        writer.add_uint16("split.count", 2)
        if part == 1:
            for key, value in read_header(whole).metadata.items():
                if key != "general.architecture":
                    held = value.value.tolist() if isinstance(value.value, np.ndarray) else value.value
                    writer.add_key_value(key, held, value.type, value.item)
        for tensor in reader.tensors[:half] if part == 1 else reader.tensors[half:]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    for part in (1, 2):
        same_weights(qcompile.load(tmp_path / f"model-0000{part}-of-00002.gguf"), model)
    (tmp_path / "model-00002-of-00002.gguf").unlink()
    with pytest.raises(MissingTensorError, match=r"model-00002-of-00002\.gguf"):
        qcompile.load(tmp_path / "model-00001-of-00002.gguf")


def test_formats_that_gguf_has_not_are_refused(tmp_path: Path) -> None:
    model = model_of("llama")
    qcompile.quantize_(model, torch.zeros(1, 4, dtype=torch.long), policy="nf4")
    with pytest.raises(UnsupportedCheckpointError, match=r"self_attn\.q_proj\.weight: GGUF has no type for .*nf4"):
        qcompile.save(model, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedCheckpointError, match="'mamba' is not read"):
        qcompile.load(path)
    with pytest.raises(UnsupportedCheckpointError, match="model_type 'gpt2' is not written"):
        qcompile.save(_gpt2(), tmp_path / "gpt2.gguf")


def _gpt2() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=16))
