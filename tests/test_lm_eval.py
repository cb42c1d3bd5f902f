"""The bridge to lm-evaluation-harness: registered, packed, and its scores are those of the packed model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import trained_decoder
from torch.nn import functional as F

import qcompile
from qcompile.errors import PolicyError
from qcompile.tensor import QuantizedTensor

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "one_thread")


def scored(policy: Any, **options: Any) -> tuple[Any, float]:
    """The bridge's model, and the sum of log-probabilities of a text that it gives."""
    from lm_eval.api.instance import Instance

    from qcompile.lm_eval import QCompileLM

    model, tokenizer, text = trained_decoder()
    lm = QCompileLM(model, policy=policy, tokenizer=tokenizer, device="cpu", max_length=256, **options)
    request = Instance("loglikelihood_rolling", {}, (text[:400],), 0)
    (total,) = lm.loglikelihood_rolling([request], disable_tqdm=True)
    return lm, float(total)


def by_hand(model: Any) -> float:
    _, tokenizer, text = trained_decoder()
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text[:400], add_special_tokens=False)["input_ids"]]])
    assert ids.shape[1] <= 256
    return -float(F.cross_entropy(model(ids, use_cache=False).logits[0, :-1].float(), ids[0, 1:], reduction="sum"))


def test_scores_are_those_of_the_packed_model(tmp_path: Path) -> None:
    from lm_eval.api.registry import get_model

    lm, total = scored("int4", compiled=False)
    assert get_model("qcompile") is type(lm)
    assert isinstance(lm._model.model.layers[0].mlp.up_proj.weight, QuantizedTensor)
    reference = trained_decoder()[0]
    packed = trained_decoder()[0]
    qcompile.quantize_(packed, torch.ones(1, 2, dtype=torch.long), policy="int4")
    assert total == pytest.approx(by_hand(packed), rel=1e-4) and total != pytest.approx(by_hand(reference), rel=1e-4)
    path = tmp_path / "policy.json"
    path.write_text(qcompile.Policy.parse("int4").to_json())
    assert scored(str(path), compiled=False)[1] == total


def test_the_compiled_model_gives_the_same_scores() -> None:
    assert scored("int4")[1] == pytest.approx(scored("int4", compiled=False)[1], rel=1e-4)


def test_float_is_the_float_model_and_a_policy_that_packs_nothing_is_refused() -> None:
    assert scored("float", compiled=False)[1] == pytest.approx(by_hand(trained_decoder()[0]), rel=1e-4)
    with pytest.raises(PolicyError, match="packs no layer of LlamaForCausalLM"):
        scored({"role:embed_tokens": "float", "*self_attn": "int8"}, compiled=False)
