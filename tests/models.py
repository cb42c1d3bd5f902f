"""Real models for tests: the sentence encoder of a package, and a decoder trained once on this machine.

Compiling with qcompile converts a model's parameters in place, so every call gives a copy of one loaded
model. Import as `from models import encoder`: `tests/` and `examples/` are on pytest's path.
"""

import copy
import functools
import sys
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion

EXAMPLES = str(Path(__file__).resolve().parent.parent / "examples")
if EXAMPLES not in sys.path:  # a test that runs in a process of its own has no path from pytest
    sys.path.insert(0, EXAMPLES)

import encoder as encoder_example  # noqa: E402
import sentences as sentences_example  # noqa: E402
import training  # noqa: E402
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

GROWING_PADDED = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.12",
    reason="this torch's Inductor writes C++ that does not compile for the mask of a padded batch of growing length",
)

@functools.cache
def _encoder() -> encoder_example.SentenceEncoder:
    return encoder_example.load()


@functools.cache
def _decoder() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, str]:
    return training.trained_decoder()


@functools.cache
def _decoder_ids() -> torch.Tensor:
    _, tokenizer, text = _decoder()
    return training.encode(tokenizer, [text])


@functools.cache
def _batch() -> dict[str, torch.Tensor]:
    return encoder_example.tokenize(sentences())


def sentences() -> list[str]:
    """Forty varied sentences."""
    return list(sentences_example.SENTENCES)


def encoder() -> encoder_example.SentenceEncoder:
    """A copy of the sentence encoder: float32, eval mode, CPU."""
    return copy.deepcopy(_encoder())


def encoder_batch(count: int | None = None) -> dict[str, torch.Tensor]:
    """Keyword arguments of `encoder()`: the first `count` sentences (all, without it), int64 [count, tokens].

    Padded to the longest of all forty, so that only the batch size differs between counts.
    """
    return {name: ids[:count].clone() for name, ids in _batch().items()}


def trained_decoder() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, str]:
    """A copy of the trained decoder (float32, eval mode, CPU), its tokenizer, and held-out text.

    The first call on a machine trains for some minutes; see examples/training.py.
    """
    model, tokenizer, text = _decoder()
    return copy.deepcopy(model), tokenizer, text


def perplexity(model: torch.nn.Module, windows: int = 64) -> float:
    """Perplexity of a decoder, compiled or not, on `windows` (a multiple of 8) windows of held-out text."""
    return training.perplexity(model, _decoder_ids(), windows)
