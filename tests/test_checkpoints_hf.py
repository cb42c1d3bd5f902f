"""transformers loads and saves packed models through its own functions; the command line converts files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import llama, logits, pack, packed
from gguf_files import mixture, model_of, write_gguf
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import qcompile
from qcompile import QCompileConfig
from qcompile.cli import app
from qcompile.errors import CheckpointError, OptionError, PolicyError, UnknownFormatError
from qcompile.recorder import recorder_of

pytestmark = pytest.mark.usefixtures("one_thread")
POLICY = {"attention.q_proj": "int4", "embed_tokens": "Q8_0", "*": "int8"}
"""A role, which only the graph tells; an embedding that is tied to the head; and all other linear layers."""


def same(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    first, second = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert list(first) == list(second)
    for name, parameter in second.items():
        assert type(first[name]) is type(parameter) and torch.equal(first[name], parameter), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float")
    llama(tie_word_embeddings=True).save_pretrained(path)
    return path


def loaded(folder: Path, policy: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=QCompileConfig(policy=policy))


def test_packed_while_loading(folder: Path) -> None:
    """As :func:`qcompile.quantize_` packs the loaded model."""
    model = loaded(folder, POLICY)
    wanted = llama(tie_word_embeddings=True)
    report = qcompile.quantize_(wanted, torch.zeros(1, 8, dtype=torch.long), policy=POLICY)
    same(model, wanted)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), logits(wanted))
    ours = {r.decision.site.name: r for r in recorder_of(model).plan if r.decision.scheme is not None}
    theirs = {r.decision.site.name: r for r in report.plan if r.decision.scheme is not None}
    assert len(ours) == len(theirs) == 16
    for name, record in ours.items():
        if "layers" in name:
            assert (record.sqnr, record.bytes_after) == (theirs[name].sqnr, theirs[name].bytes_after)


def test_a_tied_weight_gets_one_decision(folder: Path) -> None:
    model = loaded(folder, "int8")
    assert type(model.lm_head.weight).__name__ == "Quantized_int8" and model.lm_head.weight is model.model.embed_tokens.weight


def test_saved_and_loaded_by_transformers(folder: Path, tmp_path: Path) -> None:
    model = loaded(folder, POLICY)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for path in (tmp_path / "one", tmp_path / "shards"):
        again = AutoModelForCausalLM.from_pretrained(path)
        same(again, model)
        assert again.lm_head.weight is again.model.embed_tokens.weight
        same(qcompile.load(path), model)
    again.save_pretrained(tmp_path / "again")
    same(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), model)


def test_what_qcompile_saves_transformers_loads(tmp_path: Path) -> None:
    model = pack(llama(), {"*": "nf4_dq", "embed_tokens": "Q8_0"})
    qcompile.save(model, tmp_path)
    same(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_what_qcompile_loads_transformers_saves(tmp_path: Path) -> None:
    model = qcompile.load(write_gguf(tmp_path / "model.gguf", model_of("llama"), "llama", mixture))
    model.save_pretrained(tmp_path / "saved")
    same(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), model)


def test_in_another_dtype(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=QCompileConfig("int8"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    wanted = llama(tie_word_embeddings=True).bfloat16()
    pack(wanted, {"q_proj": "int8"})
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(packed(model)[name], packed(wanted)[name])


def test_policies_that_do_not_fit(folder: Path) -> None:
    with pytest.raises(UnknownFormatError, match="int9"):
        QCompileConfig(policy="int9")
    with pytest.raises(OptionError, match="'polcy'. Did you mean 'policy'"):
        QCompileConfig(polcy="int8")
    with pytest.raises(PolicyError, match="'q_prj'"):
        loaded(folder, {"q_prj": "int8"})


def test_files_without_planes_are_refused(folder: Path, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": {"quant_method": "qcompile"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quant_method 'qcompile'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="quant_method 'qcompile'"):
        qcompile.load(tmp_path)


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    path = write_gguf(tmp_path / "model.gguf", model_of("llama"), "llama", mixture)
    done = CliRunner().invoke(app, ["load", str(path), "--to", str(tmp_path / "own")])
    assert done.exit_code == 0, done.output
    assert all(name in done.stdout for name in ("LlamaForCausalLM", "Q4_K", "Q6_K", "Q8_0", "written to"))
    same(qcompile.load(tmp_path / "own"), qcompile.load(path))
    done = CliRunner().invoke(app, ["load", str(tmp_path / "own"), "--to", str(tmp_path / "b.gguf"), "--like", str(path)])
    assert done.exit_code == 0 and (tmp_path / "b.gguf").stat().st_size == path.stat().st_size
    done = CliRunner().invoke(app, ["load", str(tmp_path / "none")])
    assert done.exit_code == 1 and "no such file" in done.output
