"""(scheme, device) → generated kernels. The only place that knows which code generator serves which device."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from .errors import LayoutError
from .formats import FormatSpec, Scheme, reference, scheme_of
from .formats.moments import Native, use


class Kernels(Protocol):
    """What a code generator gives for one scheme; planes are in spec order, shapes as in ``formats.layout``."""

    reorders: bool
    """Whether ``linear`` takes the order of the weight's columns as a plane after the others."""

    @property
    def source(self) -> str:
        """The generated text."""

    def linear(
        self, x: torch.Tensor, planes: Sequence[torch.Tensor], bias: torch.Tensor | None, n: int
    ) -> torch.Tensor:
        """``x [..., K]`` (fp32, fp16, bf16) times the weight's transpose, plus ``bias [N]`` → ``[..., N]`` in x's dtype."""

    def rows(
        self, planes: Sequence[torch.Tensor], indices: torch.Tensor, n: int, k: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Rows ``indices`` (integers 0 … N − 1, any shape) of the ``[N, K]`` weight: ``[*indices.shape, K]`` in ``dtype``."""

    def decode(self, planes: Sequence[torch.Tensor], n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
        """The weight ``[N, K]`` in ``dtype``."""

    def grouped(
        self, x: torch.Tensor, planes: Sequence[torch.Tensor], groups: torch.Tensor, ends: bool, experts: int, n: int
    ) -> torch.Tensor:
        """``x [T, K]``, each row times the transpose of its expert's matrix in a stack of ``experts`` → ``[T, N]``; ``groups``:
        the expert of each row ``[T]``, or with ``ends`` one past the last row of each expert ``[experts]``."""


def for_scheme(scheme: Scheme, device_type: str) -> Kernels:
    """The kernels of ``scheme`` for ``"cpu"`` or ``"cuda"``; generated and compiled on first use of this process.

    Raises :class:`~qcompile.errors.KernelBuildError` when the generated code does not compile.
    """
    if scheme.format.columns:
        return Prepared(for_scheme(replace(scheme, format=scheme.format.plain), device_type), scheme.format)
    if device_type == "cuda":
        from .codegen.triton import triton_kernels

        return triton_kernels(scheme)
    from .codegen.cpp import cpu_kernels

    return cpu_kernels(scheme)


def source_of(scheme: Scheme, device_type: str) -> str:
    """The text that is generated for ``scheme`` on ``"cpu"`` or ``"cuda"``; nothing is compiled for a CPU."""
    if scheme.format.columns:
        return source_of(replace(scheme, format=scheme.format.plain), device_type)
    if device_type == "cuda":
        return for_scheme(scheme, device_type).source
    from .codegen.cpp import source

    return source(scheme)


def machine_code_of(scheme: Scheme, device_type: str) -> dict[str, str]:
    """Assembly (PTX) of the kernels of ``scheme`` that this process has compiled for GPUs, by name and specialization."""
    if device_type != "cuda":
        return {}
    from .codegen.triton import triton_kernels

    return triton_kernels(replace(scheme, format=scheme.format.plain)).machine_code()


class AttentionKernels(Protocol):
    """What a code generator gives for keys and values of two formats; planes as in :mod:`qcompile.kv_cache`."""

    def write(
        self, key_planes: Sequence[torch.Tensor], value_planes: Sequence[torch.Tensor], k: torch.Tensor, v: torch.Tensor,
        start: torch.Tensor, table: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Quantizes ``k [B, H, L, D]`` and ``v [B, H, L, Dv]`` into the planes as tokens ``start[b]`` … of sequence b, channels
        turned as :func:`~qcompile.formats.turning.turned_together` says."""

    def attend(
        self, q: torch.Tensor, key_planes: Sequence[torch.Tensor], value_planes: Sequence[torch.Tensor], start: torch.Tensor,
        tokens: int, value_dim: int, mask: torch.Tensor | None = None, table: torch.Tensor | None = None, causal: bool = True,
        scale: float | None = None, softcap: float = 0.0, window: int = 0, center: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """``q [B, Hq, L, D]`` over what the planes hold, keys plus ``center [B, H, 1, D]`` → ``[B, Hq, L, Dv]`` in q's dtype."""

    def sdpa(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float,
        softcap: float,
    ) -> torch.Tensor:  # fmt: skip
        """``scaled_dot_product_attention`` of ``q [B, Hq, L, D]``, ``k [B, H, T, D]``, ``v [B, H, T, Dv]`` → ``[B, Hq, L, Dv]``;
        ``causal``: query i sees the first i + 1 tokens."""


@functools.cache
def attention_for(keys: str, values: str, device_type: str) -> AttentionKernels:
    """The kernels for scheme keys of keys and values on ``"cpu"`` or ``"cuda"``, generated and compiled on first use.

    Raises :class:`~qcompile.errors.FormatError` for formats that a cache cannot be written in.
    """
    if device_type == "cuda":
        from .codegen.triton_attention import triton_attention

        return triton_attention(scheme_of(keys), scheme_of(values))
    from .codegen.cpp_attention import cpu_attention

    return cpu_attention(scheme_of(keys), scheme_of(values))


@dataclass(frozen=True)
class Prepared:
    """Kernels of a ``spec`` that stores the weight's columns in another order or over factors: those of its plain format,
    and what the last planes say is done to x before the product, and to decoded rows."""

    inner: Kernels
    spec: FormatSpec
    reorders = False

    @property
    def source(self) -> str:
        return self.inner.source

    def linear(
        self, x: torch.Tensor, planes: Sequence[torch.Tensor], bias: torch.Tensor | None, n: int
    ) -> torch.Tensor:
        itself = self.inner.reorders
        taken = planes[: len(self.spec.parts) + (self.spec.permuted and itself)]
        return self.inner.linear(reference.prepared(self.spec, x, planes, reorder=not itself), taken, bias, n)

    def rows(
        self, planes: Sequence[torch.Tensor], indices: torch.Tensor, n: int, k: int, dtype: torch.dtype
    ) -> torch.Tensor:
        stored = self.inner.rows(self._parts(planes), indices, n, k, self._exact(dtype))
        return reference.in_place(self.spec, stored, planes).to(dtype)

    def decode(self, planes: Sequence[torch.Tensor], n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
        return reference.in_place(self.spec, self.inner.decode(self._parts(planes), n, k, self._exact(dtype)), planes).to(dtype)

    def grouped(
        self, x: torch.Tensor, planes: Sequence[torch.Tensor], groups: torch.Tensor, ends: bool, experts: int, n: int
    ) -> torch.Tensor:
        raise LayoutError(f"{reference.why_no_stack(self.spec)}; choose {self.spec.plain.name}")

    def _exact(self, dtype: torch.dtype) -> torch.dtype:
        """What is multiplied by factors is rounded after that, once."""
        return torch.float32 if self.spec.scaled else dtype

    def _parts(self, planes: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return planes[: len(self.spec.parts)]


def _native() -> Native:
    from .codegen import cpp_moments

    return cpp_moments


use(_native)


@functools.cache
def for_key(key: str, device_type: str) -> Kernels:
    """:func:`for_scheme` for an operator's scheme key."""
    begun = _begun.get((key, device_type))
    try:
        return for_scheme(scheme_of(key), device_type) if begun is None else begun.result()
    except Exception:  # another call may find what was missing
        _begun.pop((key, device_type), None)
        raise


@functools.cache
def prepare(device_type: str) -> None:
    """Finds out, beside what this thread does next, what kernels of every scheme depend on: of which version the compiler is."""
    if device_type == "cpu":
        from .codegen import cpp_build, cpp_call

        for flags in (cpp_build.FLAGS + cpp_build.ISA_FLAGS["native"], cpp_call.flags()):
            threading.Thread(target=cpp_build.ready, args=(flags,), daemon=True).start()


_begun: dict[tuple[str, str], Future[Kernels]] = {}


def begin(keys: Iterable[str], device_type: str) -> None:
    """Generates and compiles, beside what this thread does next, what :func:`for_key` will be asked for; it waits for that."""
    for key in keys:
        if (key, device_type) not in _begun:
            done: Future[Kernels] = Future()
            _begun[key, device_type] = done
            threading.Thread(target=_finish, args=(done, key, device_type), daemon=True).start()


def _finish(done: Future[Kernels], key: str, device_type: str) -> None:
    try:
        done.set_result(for_scheme(scheme_of(key), device_type))
    except BaseException as error:  # it is the one who asks for the kernels that must see it
        done.set_exception(error)
