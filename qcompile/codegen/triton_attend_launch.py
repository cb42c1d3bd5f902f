"""Launches of the attention kernels over packed keys and values: grids, parts of the tokens, masks, operand types."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..errors import KernelBuildError
from ..formats.spec import TILE_N
from ..formats.turning import turned_together
from ..target import Target, of
from . import tiles
from .triton_attend_tiles import AttendTile, attend_tile, parts
from .triton_launch import ceil, options
from .triton_load import interpreting, triton_version

if TYPE_CHECKING:
    from .triton_attention import TritonAttention

Planes = Sequence[torch.Tensor]
LOG2E = math.log2(math.e)

OPERANDS = {torch.float16: ("float16", 1), torch.bfloat16: ("bfloat16", 1), torch.float32: ("bfloat16", 2)}
"""The type, and how many terms of it, that products take for numbers of a dtype: exactly, but for float32, to 2^-17."""


def target_of(x: torch.Tensor) -> Target:
    """Where kernels for ``x`` run. Raises :class:`~qcompile.errors.KernelBuildError` for a tensor on the CPU, unless Triton
    interprets kernels there."""
    if x.is_cuda:
        return of(x.device)
    if interpreting():
        return Target("cuda", "90")
    raise KernelBuildError(f"Triton kernels run on CUDA tensors, found one on {x.device}; move it, or use the CPU kernels")


def room_of(planes: Planes, table: torch.Tensor | None) -> int:
    """Tokens that the planes, or the pages of a table's row, hold of a sequence."""
    return TILE_N * int(planes[0].shape[2]) * (table.shape[1] if table is not None else 1)


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class Mask:
    """A mask as a kernel takes it: ``kind`` 0 none, 1 boolean, 2 additive; strides of its four dimensions, 0 where it is
    broadcast; how many tokens it covers."""

    tensor: torch.Tensor | None
    kind: int
    strides: tuple[int, int, int, int]
    tokens: int

    @staticmethod
    def of(mask: torch.Tensor | None, shape: tuple[int, int, int]) -> Mask:
        """Of a mask that can be broadcast to ``[*shape, T]``, T the tokens it covers (beyond them nothing is seen)."""
        if mask is None:
            return Mask(None, 0, (0, 0, 0, 0), 2**31 - 1)
        if mask.dim() > 4 or (mask.dtype != torch.bool and not mask.is_floating_point()):
            raise KernelBuildError(f"an attention mask is bool or float with at most 4 dimensions, found {mask.dtype} "
                                   f"{list(mask.shape)}; convert it, or add dimensions of 1")  # fmt: skip
        full = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape)) if mask.dim() < 4 else mask
        if any(have not in (1, want) for have, want in zip(full.shape, shape, strict=False)):
            raise KernelBuildError(f"a mask of {list(mask.shape)} does not fit queries of {list(shape)} [batch, heads, length]; "
                                   "its dimensions must be equal or 1")  # fmt: skip
        b, h, r, t = (0 if size == 1 else stride for size, stride in zip(full.shape, full.stride(), strict=True))
        return Mask(full.view(torch.uint8) if mask.dtype == torch.bool else full, 1 if mask.dtype == torch.bool else 2,
                    (b, h, r, t), full.shape[3])  # fmt: skip


@dataclass(frozen=True)
class Attend:
    """One call of ``attend`` on compute capability ``arch``."""

    kernels: TritonAttention
    q: torch.Tensor
    key_planes: Planes
    value_planes: Planes
    start: torch.Tensor
    table: torch.Tensor | None
    causal: bool
    softcap: float
    window: int
    arch: int
    center: torch.Tensor | None = None

    def run(self, out: torch.Tensor, tokens: int, mask: Mask, scale: float, tile: AttendTile | None) -> None:
        """Writes ``out`` [B, Hq, L, Dv]."""
        batch, query_heads, length, _ = self.q.shape
        heads = self.key_planes[0].shape[1]
        rows = length * (query_heads // heads)
        stored = self._stored(out.shape[3])
        width, even = power_of_two(max(stored)), all(power_of_two(w) == w for w in stored)
        chosen = tile or attend_tile(rows, width, self.arch, self.q.dtype == torch.float32, even)
        grid = batch * heads, ceil(rows, chosen.queries)
        seen = min(tokens, mask.tokens, self.window + length + chosen.tokens if self.window else tokens)
        count = parts(self.arch, grid[0] * grid[1], ceil(seen, chosen.tokens))
        target, stats = out, None
        if count > 1:
            target = torch.empty(*out.shape[:3], count, out.shape[3], dtype=torch.float32, device=out.device)
            stats = torch.empty(*out.shape[:3], count, 2, dtype=torch.float32, device=out.device)
        self._launch(chosen, (count, *grid), target, stats, mask, scale)
        turn = turned_together(self.kernels.formats[1], out.shape[3])
        if stats is not None:
            self.kernels.kernel("merge")[(batch * query_heads * length,)](
                target, stats, out, count, DV=out.shape[3], BV=power_of_two(out.shape[3]), BP=power_of_two(count), TURN=turn,
                num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
        else:
            self.kernels.turned(out, turn, out)

    def _stored(self, dim: int) -> tuple[int, int]:
        """Stored channels of keys and values."""
        keys, values = self.kernels.formats
        return keys.padded(TILE_N, self.q.shape[3])[1], values.padded(TILE_N, dim)[1]

    def _launch(
        self, tile: AttendTile, grid: tuple[int, int, int], out: torch.Tensor, stats: torch.Tensor | None, mask: Mask,
        scale: float,
    ) -> None:  # fmt: skip
        q, kernels, (kp, vp) = self.q, self.kernels, self._stored(out.shape[-1])
        dot, terms = kernels.exact(q.dtype)
        heads, page_tiles = self.key_planes[0].shape[1:3]
        kernels.kernel("few" if tile.left else "many")[grid](
            q, *self.key_planes, *self.value_planes, self.start, self.table, mask.tensor, self.center, out, stats, q.shape[2],
            heads, *q.stride()[:3], *mask.strides, mask.tokens, self.table.stride(0) if self.table is not None else 0, page_tiles,
            room_of(self.key_planes, self.table),
            scale / self.softcap if self.softcap else scale * LOG2E, self.softcap * LOG2E, self.window, grid[0],
            D=q.shape[3], DV=out.shape[-1], KP=kp, VP=vp, GROUP=q.shape[1] // heads, BT=tile.tiles, BM=tile.queries,
            BK=power_of_two(kp), BV=power_of_two(vp), PAIR=4 if tiles.quads(self.arch, triton_version()) else 2,
            STAGES=tile.stages, PAGED=self.table is not None, CAUSAL=self.causal, MASK=mask.kind, CAPPED=self.softcap > 0,
            CENTERED=self.center is not None, WINDOW=self.window > 0, PARTIAL=stats is not None, DOT=dot,
            TERMS=terms, **options(tile),
        )  # fmt: skip
