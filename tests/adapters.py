"""Models with adapters for tests: low-rank updates beside frozen layers (Hu et al., "LoRA", 2021)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qcompile.tensor import QuantizedTensor

RANK = 4


class LoRA(nn.Module):
    """``base(x) + x Aᵀ Bᵀ``, ``base`` frozen; B starts other than zero, so that A has a gradient."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(RANK, base.in_features) / base.in_features**0.5)
        self.b = nn.Parameter(torch.randn(base.out_features, RANK) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


class Block(nn.Module):
    def __init__(self, width: int = 64, inner: int = 160) -> None:
        super().__init__()
        self.up, self.down = LoRA(nn.Linear(width, inner)), LoRA(nn.Linear(inner, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.silu(self.up(x)))


class Adapted(nn.Module):
    """Two blocks and a frozen head; ``saves``: activations are computed again in the backward pass."""

    def __init__(self, saves: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.saves = nn.ModuleList([Block(), Block()]), saves
        self.head = nn.Linear(64, 24, bias=False).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.saves else block(x)
        return self.head(x)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def decoded(model: nn.Module) -> nn.Module:
    """A copy with the floats that packed weights stand for."""
    made = copy.deepcopy(model)
    for module in made.modules():
        for name, p in list(module._parameters.items()):
            if isinstance(p, QuantizedTensor):
                module._parameters[name] = nn.Parameter(p.dequantize().clone(), requires_grad=False)
    return made


def peak_of(function: Callable[[], object]) -> int:
    """The most bytes that tensors made in ``function`` took at a time, counted by PyTorch's CPU allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
