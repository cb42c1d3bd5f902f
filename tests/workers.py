"""What tests run in other processes: importable there by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset


def network(seed: int, width: int = 64) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, 32))


def inputs() -> torch.Tensor:
    return torch.randn(6, 32, generator=torch.Generator().manual_seed(7))


def serve(model: Any, x: torch.Tensor, queue: Any) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        queue.put(model(x).tolist())


class Encoded(Dataset[torch.Tensor]):
    """Samples that a packed model computes in the loader's workers."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 4

    @torch.no_grad()
    def __getitem__(self, at: int) -> torch.Tensor:
        found: torch.Tensor = self.model(inputs()[at])
        return found
