"""What does quantization-aware training win back, and what does a step cost? The trained decoder, taught by itself in float."""

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

STEPS, BATCH, WINDOWS = 300, 4, 400
SAMPLES = 64
"""Windows that GPTQ looks at."""
ROUNDS = 9
"""Of interleaved steps, for their medians."""

RATES = {"int4_g128": 1e-4, "int3_g128": 2e-4, "int2_g32": 3e-4}
"""Formats and their learning rates: the coarser the steps of a format, the further weights must move."""

TIMED = ("int4", "int8", "nf4", "Q4_K", "int2_g32", "int8_dynamic")


@torch.enable_grad()
def tuned(model: Any, run: Any, teacher: Any, ids: torch.Tensor, rate: float) -> float:
    """Trains ``model``, called as ``run``, to predict what the float ``teacher`` does (Hinton et al. 2015), on the same windows
    in the same order whatever it is; returns seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 20, (STEPS - s) / (STEPS - 20)))
    draw, began = torch.Generator().manual_seed(7), time.perf_counter()
    for _ in range(STEPS):
        rows = windows(ids, draw)[:, :-1]
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                wanted = teacher(input_ids=rows, use_cache=False).logits.float().log_softmax(-1)
            found = run(input_ids=rows, use_cache=False).logits.float().log_softmax(-1)
        (F.kl_div(found, wanted, log_target=True, reduction="sum") / rows.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
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

    bits, group = policy.removeprefix("int").split("_g")
    dtype = {"4": torch.int4, "3": torch.int3, "2": torch.int2}[bits]

    def prepared(model: Any) -> Any:
        config = IntxFakeQuantizeConfig(dtype, group_size=int(group), is_symmetric=False)
        quantize_(model, QATConfig(weight_config=config, step="prepare"))
        return torch.compile(model)

    return prepared


def accuracy() -> Iterator[dict[str, Any]]:
    """One row a format and way; ``recovered``: the share of what rounding the float model to nearest loses."""
    model, tokenizer, text = training.trained_decoder()
    texts, _ = training.split(training.standard_library())
    ids, held_out = training.encode(tokenizer, texts), training.encode(tokenizer, [text])
    teacher, data = torch.compile(copy.deepcopy(model)), samples(tokenizer, SAMPLES)
    best = loss(model, held_out)
    model.requires_grad_(True)
    yield {"format": "float32", "way": "as it is", "loss": best, "perplexity": math.exp(best)}
    for policy, rate in RATES.items():
        torch._dynamo.reset()
        nearest = loss(packed(model, policy, data[0]), held_out)

        def row(way: str, value: float, seconds: float, nearest: float = nearest, policy: str = policy) -> dict[str, Any]:
            return {"format": policy, "way": way, "loss": value, "perplexity": math.exp(value),
                    "recovered": (nearest - value) / (nearest - best), "seconds": seconds}  # fmt: skip

        def trained(start: Any, policy: str = policy, rate: float = rate) -> tuple[float, float]:
            own = copy.deepcopy(start).train()
            run = torch.compile(own, backend="qcompile", options={"qat": True, "policy": policy})
            seconds = tuned(own, run, teacher, ids, rate)
            return loss(packed(own.eval(), policy, data[0]), held_out), seconds

        yield row("rounded to nearest", nearest, 0.0)
        began = time.perf_counter()
        with torch.no_grad():
            found = qcompile.calibrate(model, data, policy=policy, method="gptq", progress=False)
        yield row("GPTQ", loss(packed(model, found, data[0]), held_out), time.perf_counter() - began)
        yield row("trained", *trained(model))
        yield row("GPTQ, then trained", *trained(found.round_(copy.deepcopy(model))))
        if (prepare := of_torchao(policy)) is not None:
            other = copy.deepcopy(model).train()
            run = prepare(other)
            seconds = tuned(other, run, teacher, ids, rate)
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
    torch._dynamo.config.recompile_limit = 64  # one forward, compiled in every way
    return [*times(), *accuracy()]
