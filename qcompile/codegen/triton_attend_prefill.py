"""Attention over fresh queries, keys and values in 8-bit products: launches of what :mod:`.triton_attend_fresh` prints."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from ..errors import KernelBuildError
from ..target import Target
from . import triton_attend_codes as codes
from . import triton_attend_fresh as text
from .kept import kept_source
from .triton_attend_launch import LOG2E, OPERANDS, Mask, power_of_two, target_of
from .triton_attend_tiles import AttendTile, prefill_tile
from .triton_launch import ceil, options
from .triton_load import content_hash, load
from .triton_text import module
from .triton_turn import turning

CHUNK = 512
"""Tokens whose sum one program takes."""

TOKENS = 32
"""Tokens that it takes at a time."""

CODES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


@functools.cache
def triton_prefill(kind: str) -> TritonPrefill:
    """The kernels of ``kind`` "fp8", "int8" or "int8_both". Raises :class:`~qcompile.errors.KernelBuildError` for another."""
    if kind not in codes.KINDS:
        raise KernelBuildError(f"no attention kernel computes in {kind!r}; use 'fp8', 'int8' or 'int8_both'")
    return TritonPrefill(kind)


def source(kind: str) -> str:
    """The text of the kernels of ``kind``, one of :data:`.triton_attend_codes.KINDS`."""
    kernels = [codes.sums(f"sums_{kind}"), codes.sides(kind, f"sides_{kind}"), codes.quantize(kind, f"quantize_{kind}"),
               text.fresh(kind, f"fresh_{kind}")]  # fmt: skip
    tag = content_hash("".join(kernels))[:8]
    parts = [*turning(), codes.in_turns(), text.halves()]
    return module(f"{kind} attention", [*parts, *(k.replace(f"_{kind}(", f"_{kind}_{tag}(", 1) for k in kernels)], False)


class TritonPrefill:
    """Softmax attention in 8-bit products on CUDA, or under Triton's interpreter on the CPU."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def variant(self, target: Target) -> str:
        """The kind that runs on ``target``: the one asked for, or "int8" for "fp8" where matrix units have no e4m3 (sm_80)."""
        return "int8" if self.kind == "fp8" and not target.computes_fp8 else self.kind

    @functools.cached_property
    def sources(self) -> dict[str, str]:
        """The text of the kernels of each variant."""
        return {kind: kept_source("triton prefill", (kind,), functools.partial(source, kind)) for kind in codes.KINDS}

    def module(self, variant: str) -> ModuleType:
        return load(self.sources[variant])

    def kernel(self, variant: str, name: str) -> Any:
        """The jitted function sums, sides, quantize or fresh of ``variant``."""
        loaded = self.module(variant)
        return next(getattr(loaded, n) for n in vars(loaded) if n.startswith(f"{name}_{variant}_"))

    def prefill(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, causal: bool = True,
        scale: float | None = None, softcap: float = 0.0, window: int = 0, start: int = 0, *, tile: AttendTile | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Attention of ``q`` [B, Hq, L, D] over ``k`` [B, H, T, D] and ``v`` [B, H, T, Dv]: ``[B, Hq, L, Dv]`` in ``q``'s dtype.

        Query i stands at ``start`` + i: if ``causal`` it sees tokens up to its position, with ``window`` > 0 those above
        position − window. ``mask``, ``scale``, ``softcap`` as for :meth:`.TritonAttention.attend`. Queries that see nothing
        give zeros. ``tile`` overrides the table's choice.
        """
        target = self._target(q)
        if q.dtype not in OPERANDS:
            raise KernelBuildError(f"no Triton attention kernel for queries of {q.dtype}; use float16, bfloat16 or float32")
        out = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
        if out.numel():
            variant, width = self.variant(target), max(power_of_two(q.shape[3]), power_of_two(v.shape[3]), 32)
            chosen = tile or prefill_tile(q.shape[2], width)
            q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
            with torch.cuda.device_of(q):
                Prefill(self, variant, chosen, q, k, v).run(
                    out, Mask.of(mask, (q.shape[0], q.shape[1], q.shape[2])), causal,
                    q.shape[3] ** -0.5 if scale is None else scale, softcap, window, start)  # fmt: skip
        return out

    def _target(self, x: torch.Tensor) -> Target:
        return target_of(x)


@dataclass(frozen=True)
class Sides:
    """What :func:`.triton_attend_codes.sides` stores of each key-value head."""

    centers: torch.Tensor
    factors: torch.Tensor | None
    means: torch.Tensor | None


@dataclass(frozen=True)
class Scratch:
    """Keys and values as products take them, by key-value head: what :func:`.triton_attend_codes.quantize` stores."""

    k_codes: torch.Tensor
    k_scales: torch.Tensor
    k_shifts: torch.Tensor | None
    v_codes: torch.Tensor | None
    v_scales: torch.Tensor | None


@dataclass(frozen=True)
class Prefill:
    """One call, in ``variant``."""

    kernels: TritonPrefill
    variant: str
    tile: AttendTile
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    def run(
        self, out: torch.Tensor, mask: Mask, causal: bool, scale: float, softcap: float, window: int, start: int
    ) -> None:
        """Writes ``out`` [B, Hq, L, Dv]."""
        q, v, tile = self.q, self.v, self.tile
        heads, tokens = self.k.shape[1:3]
        sides = self._sides(smooth=softcap == 0.0)
        scratch = self._quantized(sides)
        self.kernels.kernel(self.variant, "fresh")[(ceil(q.shape[2], tile.queries), q.shape[0] * q.shape[1])](
            q, scratch.k_codes, scratch.k_scales, scratch.k_shifts, v, scratch.v_codes, scratch.v_scales, sides.factors,
            sides.means, mask.tensor, out, q.shape[2], tokens, self._stored, heads, start, *q.stride()[:3], *v.stride()[:3],
            *mask.strides, mask.tokens, scale / softcap if softcap else scale * LOG2E, softcap * LOG2E, window, D=q.shape[3],
            DV=v.shape[3], BK=self._width(q), BV=self._width(v), W=codes.group_of(self._width(q)), GROUP=q.shape[1] // heads,
            BM=tile.queries, BN=tile.tokens, STAGES=tile.stages, CAUSAL=causal, MASK=mask.kind, CAPPED=softcap > 0,
            WINDOW=window > 0, DOT=self._operand, TERMS=OPERANDS[q.dtype][1], **options(tile),
        )  # fmt: skip

    @property
    def _stored(self) -> int:
        """Tokens of a head in scratch, whole blocks."""
        return ceil(max(self.k.shape[2], 1), self.tile.tokens) * self.tile.tokens

    @property
    def _operand(self) -> Any:
        """The type that channels are turned in, and of P·V, in one term, where that is not in 8 bits."""
        return getattr(self.kernels.module(self.variant).tl, OPERANDS[self.q.dtype][0])

    def _width(self, x: torch.Tensor) -> int:
        return max(power_of_two(x.shape[3]), 32)

    def _sums(self, x: torch.Tensor) -> torch.Tensor:
        """Σx and Σx² over chunks of tokens: ``[B·H, chunks, 2, D]``."""
        batch, heads, tokens, dim = x.shape
        chunks = ceil(max(tokens, 1), CHUNK)
        found = torch.empty(batch * heads, chunks, 2, dim, dtype=torch.float32, device=x.device)
        self.kernels.kernel(self.variant, "sums")[(chunks, batch * heads)](
            x, found, tokens, heads, *x.stride()[:3], chunks, D=dim, BD=self._width(x), BT=TOKENS, STEPS=CHUNK // TOKENS,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        return found

    def _made(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """An empty tensor of ``shape`` for each key-value head."""
        return torch.empty(self.k.shape[0] * self.k.shape[1], *shape, dtype=dtype, device=self.k.device)

    def _sides(self, smooth: bool) -> Sides:
        q, k, v, kind = self.q, self.k, self.v, codes.KINDS[self.variant]
        k_sums = self._sums(k)
        q_sums = self._sums(q) if kind.scores == "int8" else None
        v_sums = self._sums(v) if kind.product else None
        sides = Sides(self._made(self._width(k)), self._made(self._width(k)) if q_sums is not None else None,
                      self._made(self._width(v)) if v_sums is not None else None)  # fmt: skip
        self.kernels.kernel(self.variant, "sides")[(len(k_sums),)](
            k_sums, q_sums, v_sums, sides.centers, sides.factors, sides.means, k.shape[2], q.shape[2], k_sums.shape[1],
            ceil(q.shape[2], CHUNK), D=k.shape[3], DV=v.shape[3], BK=self._width(k), BV=self._width(v),
            GROUP=q.shape[1] // k.shape[1], SMOOTH=smooth, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        return sides

    def _quantized(self, sides: Sides) -> Scratch:
        k, v, made, stored = self.k, self.v, self._made, self._stored
        kind = codes.KINDS[self.variant]
        scratch = Scratch(
            made(stored, self._width(k), dtype=CODES[kind.scores]), made(kind.groups(self._width(k)), stored),
            made(stored, codes.SHIFTS, dtype=torch.bfloat16) if kind.grouped else None,
            made(self._width(v), stored, dtype=CODES[kind.product]) if kind.product else None,
            made(stored // self.tile.tokens) if kind.product else None,
        )  # fmt: skip
        self.kernels.kernel(self.variant, "quantize")[(stored // self.tile.tokens, len(scratch.k_codes))](
            k, v, sides.centers, sides.factors, sides.means, scratch.k_codes, scratch.k_scales, scratch.k_shifts,
            scratch.v_codes, scratch.v_scales, k.shape[2], stored, k.shape[1], *k.stride()[:3], *v.stride()[:3], D=k.shape[3],
            DV=v.shape[3], BK=self._width(k), BV=self._width(v), W=codes.group_of(self._width(k)), BT=self.tile.tokens,
            DOT=self._operand, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
        return scratch
