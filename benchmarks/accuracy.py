"""What does each policy cost? Perplexity and divergence of the trained decoder, and cosines of the sentence encoder, to float."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from qcompile.rounding.methods import METHODS

from . import readme
from .calibration import WINDOWS, draws, packed

NEAREST = ("fp8", "int8", "int8_dynamic", "int4", "int4_g32", "int4_dynamic", "int3_g64", "int2_g64", "nf4", "mxfp4", "nvfp4",
           "mixed", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")  # fmt: skip
CALIBRATED = (("int4", "gptq"), ("int4", "awq"), ("int4", "awq+gptq"), ("int3_g64", "gptq"), ("int3_g64", "awq"),
              ("int2_g64", "gptq"), ("Q4_K_M", "gptq"), ("Q2_K", "gptq"))  # fmt: skip
SEARCHED = ("3.5 bits", "4.25 bits", "5 bits")
ENCODER: dict[str, dict[str, Any]] = {
    **{name: {"policy": name} for name in NEAREST},
    **{f"{name}, gptq": {"policy": name, "rounding": "gptq"} for name in ("int4", "int4_g32", "int3_g64", "int2_g64")},
}
COMPARED, BATCH = 64, 8
"""Windows that the divergence and the agreement are over; the perplexity is over nearly all held-out text."""

SHOWN = ("int8", "int8_dynamic", "fp8", "mixed", "Q8_0", "Q6_K", "Q5_K_M", "int4", "int4, gptq", "int4, awq", "nf4", "nvfp4",
         "mxfp4", "searched, 4.25 bits", "searched, 4.25 bits, gptq", "Q4_K_M", "Q4_K_M, gptq", "int3_g64", "int3_g64, gptq",
         "int3_g64, awq", "searched, 3.5 bits, gptq", "Q3_K_M", "Q2_K", "Q2_K, gptq")  # fmt: skip
"""Rows of README's table."""


def policies(model: torch.nn.Module, drawn: Sequence[list[Any]]) -> Iterator[tuple[str, Iterable[Any]]]:
    """Names, and what a model is packed by, one at a time: to nearest, calibrated on each of the ``drawn`` samples, searched on
    eight items of the first, and both."""

    def calibrated(policy: Any, method: str) -> Iterable[Any]:
        return (qcompile.calibrate(model, data, policy=policy, method=method, progress=False) for data in drawn)

    for name in NEAREST:
        yield name, [name]
    for name, method in CALIBRATED:
        yield f"{name}, {method}", calibrated(name, method)
    found = qcompile.search(model, drawn[0][:8], SEARCHED[0], progress=False)
    for budget in SEARCHED:
        policy = found.at(budget).policy
        yield f"searched, {budget}", [policy]
        yield f"searched, {budget}, gptq", calibrated(policy, "gptq")


def decoder_rows() -> list[dict[str, Any]]:
    """On held-out text; calibrations and searches look at windows of training text, and of calibrations it is the mean over the
    draws. KL in nats a token."""
    model, tokenizer, held_out = training.trained_decoder()
    ids = training.encode(tokenizer, [held_out])
    starts = torch.linspace(0, len(ids) - training.WINDOW, COMPARED).long()
    windows = ids[starts[:, None] + torch.arange(training.WINDOW)]
    data = [{"input_ids": group.contiguous(), "use_cache": False} for group in windows.split(BATCH)]
    float_perplexity, whole = training.perplexity(model, ids, WINDOWS), stored_bytes(model)

    def measured(policy: Any) -> dict[str, float]:
        made = packed(model, policy, data[0])
        found, perplexity = qcompile.evaluate(model, made, data), training.perplexity(made, ids, WINDOWS)
        assert found.divergence is not None and found.agreement is not None
        return {"bytes": stored_bytes(made) / whole, "perplexity": perplexity, "over float": perplexity / float_perplexity - 1,
                "KL": found.divergence, "agreement": found.agreement}  # fmt: skip

    rows: list[dict[str, Any]] = []
    for name, each in policies(model, draws(tokenizer)):
        found = [measured(policy) for policy in each]
        means = {figure: statistics.mean(f[figure] for f in found) for figure in found[0]}
        rows.append({"model": "decoder", "policy": name, "draws": len(found), **means})
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


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """README's table of the decoder's ``rows``."""
    found = {row["policy"]: row for row in rows if row["model"] == "decoder"}
    lines = ["| policy | bytes | perplexity | KL, nats | same token likeliest |", "|---|---|---|---|---|"]
    for name in SHOWN:
        row = found[name]
        lines.append(f"| {_label(name)} | {row['bytes']:.3f} | {100 * row['over float']:+.2f} % | {row['KL']:.4f} | "
                     f"{100 * row['agreement']:.1f} % |")  # fmt: skip
    return "\n".join(lines) + "\n"


def _label(name: str) -> str:
    first, *others = name.split(", ")
    return ", ".join([first if first == "searched" else f"`{first}`", *(o.upper() if o in METHODS else o for o in others)])


def publish(rows: Iterable[Mapping[str, Any]]) -> None:
    """Puts the table of ``rows`` into README."""
    readme.put("accuracy", table(rows))
