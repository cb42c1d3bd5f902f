"""Facts about the device that a kernel is generated for. Frozen; asked for lazily."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Target:
    """``kind`` is ``"cpu"`` or ``"cuda"``; ``arch`` is the CPU's instruction set or the compute capability (90 for sm_90)."""

    kind: str
    arch: str

    @property
    def computes_fp8(self) -> bool:
        """Whether matrix units multiply e4m3 natively (sm_89 and later; no CPU in our range does)."""
        return self.kind == "cuda" and int(self.arch) >= 89


@functools.cache
def of(device: torch.device) -> Target:
    """The target of a torch device. Raises ``ValueError`` for a device that no kernel is generated for."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return Target("cuda", str(10 * major + minor))
    if device.type in ("cpu", "meta"):
        return Target("cpu", torch.backends.cpu.get_cpu_capability())
    raise ValueError(f"no kernels are generated for device {device}; use a CPU or a CUDA device")
