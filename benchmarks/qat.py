"""What does quantization-aware training win back, and what does a step cost? The trained decoder, fine-tuned on its own text."""

from __future__ import annotations

import copy
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import qcompile

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import training

from .calibration import packed, samples

STEPS, BATCH, WINDOWS = 200, 4, 64
SAMPLES = 64
"""Windows that GPTQ looks at."""
LEARNING_RATE = 2e-4
ROUNDS = 9
"""Of interleaved steps, for their medians."""

BITS = {"int4_g128": 4, "int3_g128": 3, "int2_g32": 2}
TIMED = ("int4", "int8", "nf4", "Q4_K", "int2_g32", "int8_dynamic")


@torch.enable_grad()
def tuned(model: Any, run: Any, ids: torch.Tensor) -> float:
    """Fine-tunes ``model``, called as ``run``, on the same windows in the same order whatever it is; returns seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 20, (STEPS - s) / (STEPS - 20)))
    draw, began = torch.Generator().manual_seed(7), time.perf_counter()
    for _ in range(STEPS):
        step(run, windows(ids, draw), optimizer)
        schedule.step()
    return time.perf_counter() - began


def windows(ids: torch.Tensor, draw: torch.Generator, batch: int = BATCH) -> torch.Tensor:
    starts = torch.randint(len(ids) - training.WINDOW, (batch, 1), generator=draw)
    return ids[starts + torch.arange(training.WINDOW + 1)]


def step(run: Any, rows: torch.Tensor, optimizer: torch.optim.Optimizer, brain: bool = True) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=brain):
        logits = run(input_ids=rows[:, :-1], use_cache=False).logits
    F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


def loss(model: Any, held_out: torch.Tensor) -> float:
    return math.log(training.perplexity(model, held_out, WINDOWS))


def of_torchao(policy: str) -> Callable[[Any], Any] | None:
    """torchao's fake quantization of the same bits and groups: integers with a scale and a zero point for each group."""
    if importlib.util.find_spec("torchao") is None:
        return None
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    group, dtype = int(policy.split("_g")[1]), {4: torch.int4, 3: torch.int3, 2: torch.int2}[BITS[policy]]

    def prepared(model: Any) -> Any:
        config = IntxFakeQuantizeConfig(dtype, group_size=group, is_symmetric=False)
        quantize_(model, QATConfig(weight_config=config, step="prepare"))
        return torch.compile(model)

    return prepared


def accuracy() -> Iterator[dict[str, Any]]:
    """One row a format and way; ``recovered``: the share of what rounding the float model to nearest loses."""
    model, tokenizer, text = training.trained_decoder()
    model.requires_grad_(True)
    texts, _ = training.split(training.standard_library())
    ids, held_out = training.encode(tokenizer, texts), training.encode(tokenizer, [text])
    floats = copy.deepcopy(model)
    seconds = tuned(floats.train(), torch.compile(floats), ids)
    best = loss(floats.eval(), held_out)
    yield {"format": "float32", "way": "fine-tuned", "loss": best, "perplexity": math.exp(best), "seconds": seconds}
    data = samples(tokenizer, SAMPLES)
    for policy in BITS:
        torch._dynamo.reset()
        nearest = loss(packed(floats, policy, data[0]), held_out)

        def row(way: str, value: float, seconds: float, nearest: float = nearest, policy: str = policy) -> dict[str, Any]:
            return {"format": policy, "way": way, "loss": value, "perplexity": math.exp(value),
                    "recovered": (nearest - value) / (nearest - best), "seconds": seconds}  # fmt: skip

        yield row("rounded to nearest", nearest, 0.0)
        began = time.perf_counter()
        with torch.no_grad():
            found = qcompile.calibrate(floats, data, policy=policy, method="gptq", progress=False)
        yield row("GPTQ", loss(packed(floats, found, data[0]), held_out), time.perf_counter() - began)
        own = copy.deepcopy(model).train()
        run = torch.compile(own, backend="qcompile", options={"qat": True, "policy": policy})
        seconds = tuned(own, run, ids)
        yield row("trained", loss(packed(own.eval(), policy, data[0]), held_out), seconds)
        if (prepare := of_torchao(policy)) is not None:
            other = copy.deepcopy(model).train()
            run = prepare(other)
            seconds = tuned(other, run, ids)
            yield row("trained by torchao", loss(run.eval(), held_out), seconds)


def times() -> Iterator[dict[str, Any]]:
    """Seconds of a whole training step on 2048 tokens beside plain Inductor's, all in one run, interleaved."""
    torch._dynamo.reset()
    rows = torch.randint(0, training.VOCABULARY, (8, training.WINDOW + 1), generator=torch.Generator().manual_seed(0))
    base = training.new_model().train()
    for brain in (False, True):
        steps: dict[str, Callable[[], None]] = {}
        for name in ("Inductor", *TIMED):
            model = copy.deepcopy(base)
            how: dict[str, Any] = {"backend": "qcompile", "options": {"qat": True, "policy": name}}
            run = torch.compile(model, **({} if name == "Inductor" else how))
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
            steps[name] = lambda run=run, optimizer=optimizer, brain=brain: step(run, rows, optimizer, brain)  # type: ignore
        taken = _interleaved(steps)
        for name, own in taken.items():
            ratio = statistics.median(a / b for a, b in zip(own, taken["Inductor"], strict=True))
            yield {"format": name, "way": "step, bf16 autocast" if brain else "step, float32", "seconds": statistics.median(own),
                   "× Inductor": ratio}  # fmt: skip


def _interleaved(steps: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Processor seconds of this process, of all its threads: others on the machine do not count."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(ROUNDS + 2):
        for name, one in steps.items():
            began = time.process_time()
            one()
            if turn >= 2:
                taken[name].append(time.process_time() - began)
    return taken


def run() -> list[dict[str, Any]]:
    """Rows of steps, then of accuracy."""
    return [*times(), *accuracy()]
