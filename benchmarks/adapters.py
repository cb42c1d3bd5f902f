"""Adapters over packed weights: what they learn, the memory of training and the time of a step, against float weights."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STEPS = 60
WAYS = {"float, all trained": None, "float": None, "nf4": "nf4", "int4": "int4"}
"""What is trained over what: everything, or adapters of rank 16 over weights left in floating point or packed."""

TOKENS = 256


def _wrapped(model: Any, way: str) -> tuple[Any, Any]:
    """(model, compiled): adapters beside every linear layer, compiled by Inductor where nothing is packed."""
    import peft
    import torch

    if way == "float, all trained":
        model.requires_grad_(True)
    else:
        settings = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        model = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
    if WAYS[way] is None:
        return model, torch.compile(model)
    return model, torch.compile(model, backend="qcompile", options={"policy": WAYS[way]})


def learn(way: str) -> dict[str, Any]:
    """The trained decoder on capitals, of which it has seen few: loss on text that the steps do not see, before and after."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
    import torch
    import training

    model, tokenizer, text = training.trained_decoder()
    ids = training.encode(tokenizer, [text[:400000].upper()])
    ids = ids[: len(ids) // 128 * 128].view(-1, 128)
    torch.manual_seed(0)
    model, step = _wrapped(model, way)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 5e-4 if way == "float, all trained" else 2e-3, fused=True)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = step(input_ids=rows, labels=rows, use_cache=False).loss
        return found

    with torch.no_grad():
        start = float(loss_of(ids[-32:]))
    for at in range(STEPS):
        loss_of(ids[4 * at : 4 * at + 4]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return {"loss before": start, "loss": float(loss_of(ids[-32:])), "trained": sum(p.numel() for p in trained)}


def train(way: str) -> dict[str, Any]:
    """In this process: two bfloat16 layers of Llama-3-8B and fused AdamW. Resident memory above that of the process with
    PyTorch's compiler warm, before the model is made: its peak over everything, and over steps once all is compiled."""
    import torch

    from .memory import _status
    from .shapes import llama_layers

    warm = torch.compile(torch.nn.Linear(64, 64))
    warm(torch.ones(2, 64)).sum().backward()
    base = _status("VmRSS")
    model, step = _wrapped(llama_layers(2), way)
    weights = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-5, fused=True)
    ids, times = torch.randint(0, 256, (1, TOKENS)), []
    row: dict[str, Any] = {"weights": weights}
    for at in range(5):
        if at == 2:
            row["peak"] = _status("VmHWM") - base
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        start = time.perf_counter()
        step(input_ids=ids, use_cache=False).last_hidden_state.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return row | {"peak of steps": _status("VmHWM") - base, "step s": statistics.median(times[2:])}


def _apart(function: str, way: str) -> dict[str, Any]:
    program = f"import json; from benchmarks.adapters import {function}; print('ROW', json.dumps({function}({way!r})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    row: dict[str, Any] = json.loads(next(x for x in done.stdout.splitlines() if x.startswith("ROW"))[4:])
    return row


def run() -> list[dict[str, Any]]:
    """One process for each way and measurement. ``loss ratio`` and ``step ratio`` are to adapters over float weights under
    plain Inductor, ``peak ratio`` to all weights trained, each over the whole run and over its steps."""
    return list(_rows())


def _rows() -> Iterator[dict[str, Any]]:
    made = {way: {"way": way} | _apart("learn", way) | _apart("train", way) for way in WAYS}
    whole, floats = made["float, all trained"], made["float"]
    for row in made.values():
        yield row | {"loss ratio": row["loss"] / floats["loss"], "step ratio": row["step s"] / floats["step s"],
                     "peak ratio": row["peak"] / whole["peak"],
                     "ratio of steps": row["peak of steps"] / whole["peak of steps"]}  # fmt: skip
