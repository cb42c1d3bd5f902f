"""Train a small Llama-shaped decoder on the text that ships with Python, once, and keep it.

The text is the source, docstrings included, of the standard library of the running interpreter: every machine
with Python has it, so the model needs no download. Three to four minutes on two cores that have bfloat16
instructions; later calls load what was saved.
"""

import json
import math
import os
import shutil
import sysconfig
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import platformdirs
import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NAME = "decoder-v1"  # raise it whenever anything below changes what is trained
END = "<|end|>"
VOCABULARY = 2048
WINDOW = 256  # tokens of context in training and in evaluation
BATCH = 8  # windows a step
STEPS = 750
LEARNING_RATES = {"matrices": 0.02, "others": 0.004}
WARM_UP = 0.05  # fraction of STEPS
SEED = 20

# Not prose and not idiomatic code: tables of code pages, vendored packages, tests.
SKIPPED = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idle_test",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}


def cache_directory() -> Path:
    """Where the trained decoder lives: `$QCOMPILE_EXAMPLES_DIR`, or the user's cache directory, then NAME."""
    root = os.environ.get("QCOMPILE_EXAMPLES_DIR")
    return (Path(root) if root else platformdirs.user_cache_path("qcompile")) / NAME


def standard_library() -> Iterator[tuple[str, str]]:
    """Yield (relative path, text) of the standard library's Python files, ordered by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not SKIPPED.intersection(relative.parts):
            yield relative.as_posix(), path.read_text(encoding="utf-8", errors="replace")


def split(files: Iterator[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Split by file into (training, held-out) texts, about 24 to 1.

    The checksum of a file's path decides, so that a file stays on its side whatever the version of Python.
    """
    training: list[str] = []
    held_out: list[str] = []
    for name, text in files:
        (held_out if zlib.crc32(name.encode()) % 25 == 0 else training).append(text)
    return training, held_out


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of VOCABULARY entries learnt from `texts`; END separates files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts as one int64 vector of token ids, END after each."""
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False):
        ids.extend(encoding.ids)
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids)


def new_model() -> LlamaForCausalLM:
    """Llama at a size two cores can train: 4.2 million weights, grouped key/value heads, an untied head."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embedding, head and norms.

    Measured with one million tokens: held-out perplexity 43 with Muon, 121 with AdamW alone.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=LEARNING_RATES["matrices"], weight_decay=0.01),
        torch.optim.AdamW(others, LEARNING_RATES["others"], betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def schedule(step: int, steps: int) -> float:
    """Factor on the learning rates: linear warm-up, then linear decay to zero at `steps`."""
    warm = WARM_UP * steps
    return min((step + 1) / warm, (steps - step) / (steps - warm))


@torch.enable_grad()
def train(model: LlamaForCausalLM, ids: torch.Tensor, steps: int = STEPS) -> None:
    """`steps` steps on windows drawn from `ids`, a vector of token ids: float32 weights, bfloat16 autocast."""
    draw = torch.Generator().manual_seed(SEED)
    within = torch.arange(WINDOW + 1)
    chosen = optimizers(model)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(one, lambda step: schedule(step, steps)) for one in chosen]
    model.train()
    began = time.perf_counter()
    for step in range(steps):
        starts = torch.randint(len(ids) - WINDOW, (BATCH, 1), generator=draw)
        windows = ids[starts + within]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=windows[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for one in [*chosen, *schedulers]:
            one.step()
        model.zero_grad()
        if step % 50 == 49:
            seconds = time.perf_counter() - began
            print(f"  step {step + 1}/{steps}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)
    model.eval()


def perplexity(model: torch.nn.Module, ids: torch.Tensor, windows: int = 64, batch: int = 8) -> float:
    """exp of the mean negative log-likelihood (nats a token) over `windows` windows spread evenly over `ids`.

    Each window has WINDOW predicted tokens; the windows go through the model `batch` at a time, so every call
    has the shape [batch, WINDOW] and a compiled model compiles once. ValueError if `ids` is too short.
    """
    if len(ids) < windows * (WINDOW + 1) or windows % batch:
        raise ValueError(f"{windows} windows in batches of {batch} do not fit a text of {len(ids)} tokens")
    starts = torch.linspace(0, len(ids) - WINDOW - 1, windows).long()
    rows = ids[starts[:, None] + torch.arange(WINDOW + 1)]
    total = 0.0
    with torch.no_grad():
        for group in rows.split(batch):
            logits = model(input_ids=group[:, :-1].contiguous(), use_cache=False).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), group[:, 1:].flatten(), reduction="sum")
            total += loss.item()
    return math.exp(total / (windows * WINDOW))


def unigram_perplexity(training: torch.Tensor, held_out: torch.Tensor) -> float:
    """Perplexity on `held_out` of the token frequencies of `training`, each count raised by one."""
    counts = torch.bincount(training, minlength=VOCABULARY).double() + 1
    return math.exp(-(counts / counts.sum()).log()[held_out].mean().item())


def train_and_save(directory: Path) -> None:
    """Train from the fixed seed and write model, tokenizer, held-out text and figures into `directory`."""
    began = time.perf_counter()
    texts, held_out = split(standard_library())
    tokenizer = train_tokenizer(texts)
    ids, held_out_ids = encode(tokenizer, texts), encode(tokenizer, held_out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = new_model()
        print(f"training {NAME}: {len(ids):,} tokens of the standard library, {STEPS} steps", flush=True)
        train(model, ids)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "held_out.txt").write_text(END.join(held_out), encoding="utf-8")
    figures = {
        "training_tokens": len(ids),
        "held_out_tokens": len(held_out_ids),
        "unigram_perplexity": unigram_perplexity(ids, held_out_ids),
        "perplexity": perplexity(model, held_out_ids),
        "seconds": time.perf_counter() - began,
    }
    (directory / "figures.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")


def figures() -> dict[str, Any]:
    """What training measured: tokens of both texts, held-out perplexity, that of unigrams, seconds taken."""
    return json.loads((cache_directory() / "figures.json").read_text(encoding="utf-8"))


def trained_decoder() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, str]:
    """The trained decoder in float32 and eval mode, its tokenizer, and text that it was not trained on.

    The first call trains (minutes) and saves under `cache_directory()`; processes calling meanwhile wait for
    it. The directory appears by one rename: an interrupted training leaves nothing behind.
    """
    directory = cache_directory()
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock"):
        if not directory.exists():
            scratch = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=directory.parent))
            try:
                train_and_save(scratch)
                scratch.rename(directory)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    return model, tokenizer, (directory / "held_out.txt").read_text(encoding="utf-8")
