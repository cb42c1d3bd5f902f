"""What does each policy cost? Held-out perplexity of the trained decoder, and cosines of the sentence encoder, to float."""

from __future__ import annotations

import copy
import sys
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

Options = dict[str, Any]
POLICIES: dict[str, Options] = {
    **{name: {"policy": name} for name in (
        "fp8", "int8", "int8_dynamic", "int4", "int4_g32", "int4_dynamic", "int3_g64", "int2_g64", "nf4", "mxfp4", "nvfp4",
        "mixed", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")},
    **{f"{name}, GPTQ": {"policy": name, "rounding": "gptq"} for name in ("int4", "int4_g32", "int3_g64", "int2_g64")},
}  # fmt: skip
WINDOWS = 64


def decoder_rows() -> list[dict[str, Any]]:
    """Perplexity over 64 windows of held-out text; GPTQ looks at eight windows of other text that was held out."""
    model, tokenizer, held_out = training.trained_decoder()
    ids = training.encode(tokenizer, [held_out])
    whole, float_perplexity = parameter_bytes(model), training.perplexity(model, ids, WINDOWS)
    rows = [{"model": "decoder", "policy": "float", "bytes": 1.0, "perplexity": float_perplexity, "ratio": 1.0}]
    first = ids[-8 * training.WINDOW :].view(8, training.WINDOW)
    for name, options in POLICIES.items():
        torch._dynamo.reset()
        packed = copy.deepcopy(model)
        compiled = torch.compile(packed, backend="qcompile", options=options)
        compiled(first, use_cache=False)
        found = training.perplexity(compiled, ids, WINDOWS)
        rows.append({"model": "decoder", "policy": name, "bytes": parameter_bytes(packed) / whole, "perplexity": found,
                     "ratio": found / float_perplexity})  # fmt: skip
    return rows


def encoder_rows() -> list[dict[str, Any]]:
    """Cosines of embeddings of forty sentences to those of the float model; GPTQ looks at other sentences."""
    model = encoder_example.load()
    batch, first = encoder_example.tokenize(list(SENTENCES)), encoder_example.tokenize(list(CALIBRATION))
    reference, whole = model(**batch), parameter_bytes(model)
    rows = []
    for name, options in POLICIES.items():
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
