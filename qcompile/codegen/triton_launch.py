"""Launches of the kernels of one scheme: grids, the split along K, workspaces, activation quantization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..formats.spec import TILE_N
from . import tiles
from .triton_act import blocks
from .triton_load import triton_version

if TYPE_CHECKING:
    from .triton import TritonKernels, Variant
    from .triton_attend_tiles import AttendTile

REDUCE_BLOCK = 1024
QUANTIZE_BLOCK = 2048


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def decode_weight(kernels: TritonKernels, planes: Sequence[torch.Tensor], out: torch.Tensor, tile: tiles.Tile) -> None:
    """Fills ``out[N, K]`` with the weight of ``planes``."""
    n, k = out.shape
    kp, count = kernels.scheme.format.padded(n, k)[1], ceil(n, TILE_N)
    kernels.kernel("decode")[(ceil(count, tile.tiles), ceil(kp, tile.step))](
        *planes, out, n, k, kp, count, BT=tile.tiles, BK=tile.step, EVEN=kp % tile.step == 0,
        DEC=kernels.type(kernels.printer.wide), **options(tile),
    )  # fmt: skip


def gather_rows(
    kernels: TritonKernels, planes: Sequence[torch.Tensor], indices: torch.Tensor, out: torch.Tensor, n: int
) -> None:
    """Fills ``out[i]`` ``[count, K]`` with row ``indices[i]`` of the N×K weight of ``planes``."""
    count, k = out.shape
    kp, tile = kernels.scheme.format.padded(n, k)[1], tiles.rows_tile()
    kernels.kernel("rows")[(count, ceil(k, tile.step))](
        indices, *planes, out, k, kp, BK=tile.step, EVEN=kp % tile.step == 0, DEC=kernels.type(kernels.printer.wide),
        **options(tile),
    )  # fmt: skip


def options(tile: tiles.Tile | AttendTile) -> dict[str, Any]:
    """Compiler options. Fused multiply-adds are asked for by name: Triton's default changes in 3.10."""
    chosen: dict[str, Any] = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    return {**chosen, "maxnreg": tile.registers} if tile.registers else chosen


@dataclass(frozen=True)
class Call:
    """One call of ``linear`` with an N×K weight, K stored as ``kp``, on compute capability ``arch``."""

    kernels: TritonKernels
    variant: Variant
    arch: int
    n: int
    k: int
    kp: int

    @property
    def tile_count(self) -> int:
        return ceil(self.n, TILE_N)

    def linear(self, x: torch.Tensor, planes: Sequence[torch.Tensor], bias: torch.Tensor | None, out: torch.Tensor) -> int:
        """Writes ``out[M, N]`` for ``x[M, K]`` whose rows are contiguous. Returns how many registers of the matrix product
        were spilled to memory."""
        tile = self.variant.tile
        if tile.kernel == "decode":
            if self.kernels.scheme.activations is not None:
                x = self._rounded(x)
            weight = torch.empty(self.n, self.k, dtype=x.dtype, device=x.device)
            decode_weight(self.kernels, planes, weight, tile)
            torch.matmul(x, weight.t(), out=out)
            if bias is not None:
                out += bias
        elif tile.kernel == "gemv":
            for row in range(x.shape[0]):
                self._gemv(x[row], planes, bias, out[row])
        else:
            return self._product(x, planes, bias, out)
        return 0

    def _split(self, blocks: int, steps: int, rows: int) -> tuple[int, int]:
        """(parts along K, steps of each part)."""
        bits = self.kernels.scheme.format.code.bits
        parts = tiles.splits(self.arch, blocks, steps, rows, bits)
        each = ceil(steps, parts)
        return ceil(steps, each), each

    def _gemv(self, x: torch.Tensor, planes: Sequence[torch.Tensor], bias: torch.Tensor | None, out: torch.Tensor) -> None:
        tile = self.variant.tile
        grid = ceil(self.tile_count, tile.tiles)
        parts, each = self._split(grid, ceil(self.k, tile.step), 1)
        target = out if parts == 1 else torch.empty(parts, self.n, dtype=torch.float32, device=out.device)
        self.kernels.kernel("gemv")[(grid, parts)](
            x, *planes, bias, target, self.n, self.k, self.kp, self.tile_count, each, BT=tile.tiles, BK=tile.step,
            STAGES=tile.stages, EVEN=self.k % tile.step == 0, PARTIAL=parts > 1, HAS_BIAS=bias is not None,
            DEC=self.kernels.type(self.variant.decoded), **options(tile),
        )  # fmt: skip
        if parts > 1:
            self._reduce(target, bias, out)

    def _product(self, x: torch.Tensor, planes: Sequence[torch.Tensor], bias: torch.Tensor | None, out: torch.Tensor) -> int:
        tile, (count, size) = self.variant.tile, blocks(self.kernels.printer)
        scale = sums = None
        width = self.k
        if self.kernels.scheme.activations is not None:
            x, scale, sums = self._quantize(x)
            width = self.kp
        rows = x.shape[0]
        grid = ceil(rows, tile.rows), ceil(self.tile_count, tile.tiles)
        parts, each = self._split(grid[0] * grid[1], ceil(width, count * size), rows)
        target = out if parts == 1 else torch.empty(parts, *out.shape, dtype=torch.float32, device=out.device)
        compiled = self.kernels.kernel(tile.kernel)[(*grid, parts)](
            x, scale, sums, *planes, bias, target, rows, self.n, width, self.kp, x.stride(0), self.tile_count, each,
            BT=tile.tiles, BM=tile.rows, STAGES=tile.stages, EVEN=width % (count * size) == 0, PARTIAL=parts > 1,
            HAS_BIAS=bias is not None, HAS_SCALE=scale is not None, DEC=self.kernels.type(self.variant.decoded),
            DOT=self.kernels.type(self.variant.operand), PARTS=self.variant.terms,
            SUM_LOAD=tiles.sum_load(self.arch), QUADS=tiles.quads(self.arch, triton_version()),
            **options(tile),
        )  # fmt: skip
        if parts > 1:
            self._reduce(target, bias, out)
        return getattr(compiled, "n_spills", 0)  # the interpreter compiles nothing

    def _reduce(self, parts: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        self.kernels.kernel("reduce")[(ceil(out.numel(), REDUCE_BLOCK),)](
            parts, bias, out, self.n, out.numel(), parts.shape[0], BLOCK=REDUCE_BLOCK, HAS_BIAS=bias is not None,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip

    def _quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes ``[M, kp]`` (zero beyond K), scales ``[M]`` and sums of codes per product ``[M, products]``."""
        dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[self.kernels.scheme.activations or ""]
        if self.variant.tile.kernel != "dot8":
            dtype = getattr(torch, self.variant.decoded)
        rows, printer = x.shape[0], self.kernels.printer
        codes = torch.empty(rows, self.kp, dtype=dtype, device=x.device)
        scale = torch.empty(rows, dtype=torch.float32, device=x.device)
        products = self.kp // blocks(printer)[1] if printer.granule else 1
        sums = torch.empty(rows, products, dtype=torch.float32, device=x.device)
        self.kernels.kernel("quantize")[(rows,)](
            x, codes, scale, sums, self.k, self.kp, x.stride(0), BLOCK=QUANTIZE_BLOCK, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
        return codes, scale, sums

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` as its quantized form stands for it, in its own dtype: codes times scales, rounded once more."""
        codes, scale, _ = self._quantize(x)
        return (codes[:, : self.k].float() * scale[:, None]).to(x.dtype)
