"""What does each policy cost? Perplexity and divergence of the trained decoder, and cosines of the sentence encoder, to float."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import encoder as encoder_example
import training
from calibration import CALIBRATION
from measure import parameter_bytes
from sentences import SENTENCES

import qcompile
from qcompile.evaluation import parameter_bytes as stored_bytes

from .calibration import samples

NEAREST = ("fp8", "int8", "int8_dynamic", "int4", "int4_g32", "int4_dynamic", "int3_g64", "int2_g64", "nf4", "mxfp4", "nvfp4",
           "mixed", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")  # fmt: skip
CALIBRATED = (("int4", "gptq"), ("int4", "awq"), ("int4", "awq+gptq"), ("int3_g64", "gptq"), ("int3_g64", "awq"),
              ("int2_g64", "gptq"), ("Q4_K_M", "gptq"), ("Q2_K", "gptq"))  # fmt: skip
SEARCHED = ("3.5 bits", "4.25 bits", "5 bits")
ENCODER: dict[str, dict[str, Any]] = {
    **{name: {"policy": name} for name in NEAREST},
    **{f"{name}, gptq": {"policy": name, "rounding": "gptq"} for name in ("int4", "int4_g32", "int3_g64", "int2_g64")},
}
WINDOWS, BATCH = 64, 8


def policies(model: torch.nn.Module, data: list[Any]) -> Iterator[tuple[str, Any]]:
    """Names and what a model is packed by, one at a time: to nearest, calibrated on ``data``, searched on eight items of it, and
    both."""
    for name in NEAREST:
        yield name, name
    for name, method in CALIBRATED:
        yield f"{name}, {method}", qcompile.calibrate(model, data, policy=name, method=method, progress=False)
    found = qcompile.search(model, data[:8], SEARCHED[0], progress=False)
    for budget in SEARCHED:
        policy = found.at(budget).policy
        yield f"searched, {budget}", policy
        yield f"searched, {budget}, gptq", qcompile.calibrate(model, data, policy=policy, method="gptq", progress=False)


def decoder_rows() -> list[dict[str, Any]]:
    """Over 64 windows of held-out text; calibrations and searches look at windows of training text. KL in nats a token."""
    model, tokenizer, held_out = training.trained_decoder()
    ids = training.encode(tokenizer, [held_out])
    starts = torch.linspace(0, len(ids) - training.WINDOW, WINDOWS).long()
    windows = ids[starts[:, None] + torch.arange(training.WINDOW)]
    data = [{"input_ids": group.contiguous(), "use_cache": False} for group in windows.split(BATCH)]
    rows: list[dict[str, Any]] = []
    for name, policy in policies(model, samples(tokenizer)):
        packed = copy.deepcopy(model)
        qcompile.quantize_(packed, **data[0], policy=policy)
        found = qcompile.evaluate(model, packed, data)
        rows.append({"model": "decoder", "policy": name, "bytes": stored_bytes(packed) / stored_bytes(model),
                     "perplexity": found.perplexity, "over float": found.perplexity / found.reference_perplexity - 1,
                     "KL": found.divergence, "agreement": found.agreement})  # fmt: skip
    return rows


def encoder_rows() -> list[dict[str, Any]]:
    """Cosines of embeddings of forty sentences to those of the float model; GPTQ looks at other sentences."""
    model = encoder_example.load()
    batch, first = encoder_example.tokenize(list(SENTENCES)), encoder_example.tokenize(list(CALIBRATION))
    reference, whole = model(**batch), parameter_bytes(model)
    rows = []
    for name, options in ENCODER.items():
        torch._dynamo.reset()
        compiled = encoder_example.quantize(model, options, first)
        cosine = F.cosine_similarity(compiled(**batch), reference)
        rows.append({"model": "encoder", "policy": name, "bytes": parameter_bytes(compiled) / whole,
                     "cosine": float(cosine.mean()), "least cosine": float(cosine.min())})  # fmt: skip
    return rows


@torch.no_grad()
def run() -> list[dict[str, Any]]:
    """One row a model and policy; ``bytes`` are those of all parameters over the float32 model's."""
    return decoder_rows() + encoder_rows()
