"""What does quantization-aware training win back, and what does a step cost? The trained decoder, taught by itself in float."""

from __future__ import annotations

import copy
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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

@dataclass(frozen=True)
class Training:
    """The format ``scales`` that float weights are trained in, and learning rates ``fresh``, from them, and ``after`` GPTQ. The
    coarser the steps of a format, the further weights must move."""

    scales: str
    fresh: float
    after: float


TRAININGS = {
    "int4_g128": Training("int4_range_g128", 1e-4, 1e-4),
    "int3_g128": Training("int3_range_g128", 2e-4, 3e-4),
    "int2_g32": Training("int2_g32", 3e-4, 3e-4),
}

TIMED = ("int4", "int4_range_g128", "int8", "nf4", "Q4_K", "int2_g32", "int8_dynamic")

STEP_SIZES = {8: (ROUNDS, (False, True), TIMED), 32: (5, (True,), ("int4", "Q4_K", "int2_g32"))}
"""Windows a step, and how many rounds, under autocast or not, of which formats."""


@torch.enable_grad()
def tuned(model: Any, run: Any, taught: list[torch.Tensor], ids: torch.Tensor, rate: float) -> float:
    """Trains ``model``, called as ``run``, to predict what the float teacher does (Hinton et al. 2015), whose logits on windows
    of ``ids`` are ``taught``, step by step; returns seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 20, (STEPS - s) / (STEPS - 20)))
    draw, began = torch.Generator().manual_seed(7), time.perf_counter()
    for logits in taught:
        rows, wanted = windows(ids, draw)[:, :-1], logits.float().log_softmax(-1)
        with torch.autocast("cpu", torch.bfloat16):
            found = run(input_ids=rows, use_cache=False).logits.float().log_softmax(-1)
        (F.kl_div(found, wanted, log_target=True, reduction="sum") / rows.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return time.perf_counter() - began


@torch.no_grad()
def lessons(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """bfloat16 logits of the float ``model`` for each step: all trainings see the same windows in the same order."""
    teacher, draw = torch.compile(copy.deepcopy(model)), torch.Generator().manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16):
        return [teacher(input_ids=windows(ids, draw)[:, :-1], use_cache=False).logits for _ in range(STEPS)]


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
    taught, data = lessons(model, ids), samples(tokenizer, SAMPLES)
    best = loss(model, held_out)
    model.requires_grad_(True)
    yield {"format": "float32", "way": "as it is", "loss": best, "perplexity": math.exp(best)}
    for policy, how in TRAININGS.items():
        torch._dynamo.reset()
        nearest = loss(packed(model, policy, data[0]), held_out)

        def row(way: str, value: float, seconds: float, nearest: float = nearest, policy: str = policy) -> dict[str, Any]:
            return {"format": policy, "way": way, "loss": value, "perplexity": math.exp(value),
                    "recovered": (nearest - value) / (nearest - best), "seconds": seconds}  # fmt: skip

        def trained(start: Any, policy: str, rate: float) -> tuple[float, float]:
            own = copy.deepcopy(start).train()
            run = torch.compile(own, backend="qcompile", options={"qat": True, "policy": policy})
            seconds = tuned(own, run, taught, ids, rate)
            return loss(packed(own.eval(), policy, data[0]), held_out), seconds

        yield row("rounded to nearest", nearest, 0.0)
        began = time.perf_counter()
        with torch.no_grad():
            found = qcompile.calibrate(model, data, policy=policy, method="gptq", progress=False)
        yield row("GPTQ", loss(packed(model, found, data[0]), held_out), time.perf_counter() - began)
        yield row("trained", *trained(model, how.scales, how.fresh)) | {"scales": how.scales, "rate": how.fresh}
        yield row("GPTQ, then trained", *trained(found.round_(copy.deepcopy(model)), policy, how.after)) | {"rate": how.after}
        if (prepare := of_torchao(policy)) is not None:
            other = copy.deepcopy(model).train()
            run = prepare(other)
            seconds = tuned(other, run, taught, ids, how.fresh)
            yield row("trained by torchao", loss(run.eval(), held_out), seconds) | {"rate": how.fresh}


def times() -> Iterator[dict[str, Any]]:
    """Seconds of a whole training step beside plain Inductor's, all in one run, interleaved: fake quantization costs by the
    weight, not by the token."""
    torch._dynamo.reset()
    base = training.new_model().train()
    for count, (rounds, casts, formats) in STEP_SIZES.items():
        draw = torch.Generator().manual_seed(0)
        rows = torch.randint(0, training.VOCABULARY, (count, training.WINDOW + 1), generator=draw)
        for brain in casts:
            taken = _interleaved({name: _stepping(base, name, rows, brain) for name in ("Inductor", *formats)}, rounds)
            for name, own in taken.items():
                ratio = statistics.median(a / b for a, b in zip(own, taken["Inductor"], strict=True))
                yield {"format": name, "way": "step, bf16 autocast" if brain else "step, float32",
                       "tokens": count * training.WINDOW, "seconds": statistics.median(own), "× Inductor": ratio}  # fmt: skip


def _stepping(base: Any, policy: str, rows: torch.Tensor, brain: bool) -> Callable[[], None]:
    model = copy.deepcopy(base)
    how: dict[str, Any] = {"backend": "qcompile", "options": {"qat": True, "policy": policy}}
    run = torch.compile(model, **({} if policy == "Inductor" else how))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return lambda: step(run, rows, optimizer, brain)


def _interleaved(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of this process, of all its threads: others on the machine do not count."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
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
