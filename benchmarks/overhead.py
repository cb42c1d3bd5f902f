"""What does a call of a compiled model cost beside arithmetic? 224 layers (32 blocks of 7) too small to take time."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import nn

LAYERS = 224
SIZE = 32
POLICIES = ("int8", "int4_g32", "nf4", "int8_dynamic")
ROUNDS = 201


class Layers(nn.Module):
    """Linear layers in a row, each with its input added."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(SIZE, SIZE, bias=False) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + 0.01 * layer(x)
        return x


def run() -> list[dict[str, Any]]:
    """Microseconds of a call on one thread, medians over interleaved rounds; ``more`` is over float32's in the same round."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64
    models, x = {}, torch.randn(1, SIZE)
    for name in ("float32", *POLICIES):
        torch.manual_seed(0)
        backend, options = ("inductor", None) if name == "float32" else ("qcompile", {"policy": name})
        models[name] = torch.compile(Layers().eval(), backend=backend, options=options, dynamic=False)
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for turn in range(ROUNDS + 3):
            for name, model in models.items():
                start = time.perf_counter()
                model(x)
                if turn >= 3:  # the first compile
                    times[name].append(1e6 * (time.perf_counter() - start))
    torch.set_num_threads(threads)
    more = {name: [b - a for a, b in zip(times["float32"], own, strict=True)] for name, own in times.items()}
    return [{"policy": name, "layers": LAYERS, "us": statistics.median(own), "more": statistics.median(more[name]),
             "low": statistics.quantiles(more[name], n=4)[0], "high": statistics.quantiles(more[name], n=4)[2]}
            for name, own in times.items()]  # fmt: skip
