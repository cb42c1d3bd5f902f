"""(scheme, device) → generated kernels. The only place that knows which code generator serves which device."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

import torch

from .formats import Scheme, scheme_of


class Kernels(Protocol):
    """What a code generator gives for one scheme; planes are in spec order, shapes as in ``formats.layout``."""

    source: str

    def linear(
        self, x: torch.Tensor, planes: Sequence[torch.Tensor], bias: torch.Tensor | None, n: int
    ) -> torch.Tensor:
        """``x [..., K]`` (fp32, fp16, bf16) times the weight's transpose, plus ``bias [N]`` → ``[..., N]`` in x's dtype."""

    def decode(self, planes: Sequence[torch.Tensor], n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
        """The weight ``[N, K]`` in ``dtype``."""


def for_scheme(scheme: Scheme, device_type: str) -> Kernels:
    """The kernels of ``scheme`` for ``"cpu"`` or ``"cuda"``; generated and compiled on first use of this process.

    Raises :class:`~qcompile.errors.KernelBuildError` when the generated code does not compile.
    """
    if device_type == "cuda":
        from .codegen.triton import triton_kernels

        return triton_kernels(scheme)
    from .codegen.cpp import cpu_kernels

    return cpu_kernels(scheme)


@functools.cache
def for_key(key: str, device_type: str) -> Kernels:
    """:func:`for_scheme` for an operator's scheme key."""
    return for_scheme(scheme_of(key), device_type)
