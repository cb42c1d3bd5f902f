"""Which kernel runs for how many rows, in which tiles, on which GPU: data, and the limits it must keep.

Nothing here has been tuned on a device yet. The tables hold what compiles without spills (``tests/test_triton.py`` checks a
format of every kind in turn on sm_80, 89, 90 and 100) and what arithmetic on instruction counts suggests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from ..formats.spec import ROW

V = TypeVar("V")

SHARED_BYTES = {80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 90: 232_448, 94: 65_536, 100: 232_448, 103: 232_448,
                110: 232_448, 120: 101_376, 121: 101_376}  # fmt: skip
"""Shared memory that one block may use, by compute capability (CUDA C++ programming guide, technical specifications); 94 is
AMD's gfx942."""

MULTIPROCESSORS = {80: 108, 86: 84, 87: 16, 89: 128, 90: 132, 100: 148, 103: 160, 110: 20, 120: 170, 121: 48}
"""Multiprocessors of the usual device of a compute capability; only decides how far K is split."""

REGISTERS_PER_BLOCK = 65_536


@dataclass(frozen=True)
class Tile:
    """``kernel`` is gemv, dot, dot8, decode (to a matrix, then the vendor's GEMM) or rows (of an embedding).

    ``tiles`` tiles of 16 weight rows and ``rows`` rows of x per block; ``step`` weights along K per step (gemv, decode);
    ``registers`` a limit per thread for the assembler (0: its own choice).
    """

    kernel: str
    tiles: int
    rows: int
    warps: int
    stages: int
    step: int = 0
    registers: int = 0


DECODE_FROM = {80: 256, 89: 256, 90: 256, 100: 256}
"""Rows from which a weight is decoded once and multiplied by the vendor's GEMM, by compute capability."""

DECODE_FROM_FLOAT32 = 65
"""The same for float32 activations: they go through the fused product as two 16-bit terms, 16 rows at a time."""

GEMV_BITS = {80: 4.0, 89: 4.0, 90: 8.0, 100: 8.0}
"""One row goes to the kernel without a matrix product for formats with at least this many bits of codes a weight.

It takes about 4.5 instructions a weight, the matrix product 2.5 to 3.2. An H200 moves a 4-bit weight in 3.4 instruction
slots (4.3 TB/s, 132 multiprocessors at 1.75 GHz), an A100 in 4.9, and an 8-bit weight in twice that. Tables in float32 take
8 instructions there, so they go through the matrix product; short periods, whose weights reach it through shared memory, do
not."""

ROWS: tuple[tuple[int, Tile], ...] = (
    (16, Tile("", 8, 16, 4, 4)),
    (32, Tile("", 8, 32, 4, 4)),
    (2**31, Tile("", 8, 64, 8, 3)),
)
"""Tiles of the matrix products by the largest number of rows that they serve."""

MANY_ROWS = Tile("", 8, 128, 8, 3)
"""Above 64 rows, where accumulators leave room for it (see :func:`product_tile`): half the decoding for each row."""

FLOAT32_ROWS = Tile("dot", 4, 16, 4, 4)

MOST_ROWS = {16: 16, 32: 32}
"""Rows of a tile whose products are as short as these periods: every product is scaled, so more rows save little, their
accumulators spill, and Triton 3.9 loses such kernels on sm_100 (it compiles them to nothing)."""

REGISTERS = {("dot", 80, 16): 224, ("dot", 80, 32): 255, ("dot", 100, 16): 255,
             ("dot", 100, 32): 255}  # fmt: skip
"""(kernel, compute capability in tens, rows) where ptxas saves registers until it spills, and a limit that stops it."""


def at_arch(table: Mapping[int, V], arch: int) -> V:
    """The entry of the highest compute capability that is not above ``arch`` (of the lowest one, if all are)."""
    return table[max((a for a in table if a <= arch), default=min(table))]


def product_tile(kernel: str, rows: int, arch: int, granule: int) -> Tile:
    """The tile of ``kernel`` dot or dot8. A product that is scaled per granule needs a second set of accumulators."""
    roomy = granule == ROW if kernel == "dot8" or arch != 90 else granule == ROW or granule >= 64
    if rows > 64 and roomy and (kernel == "dot8" or arch >= 90):
        tile = MANY_ROWS
    else:
        tile = next(tile for most, tile in ROWS if min(rows, MOST_ROWS.get(granule, rows)) <= most)
    registers = REGISTERS.get((kernel, arch // 10 * 10, tile.rows), 0)
    return Tile(kernel, tile.tiles, tile.rows, tile.warps, tile.stages, registers=registers)


def smaller(tile: Tile) -> Tile | None:
    """What a product takes after ``tile`` turned out to need more registers than there are: half the rows, down to the 16 of
    a matrix instruction, then half the weights. None when nothing smaller is left."""
    if tile.rows > 16:
        return replace(tile, rows=tile.rows // 2)
    return replace(tile, tiles=tile.tiles // 2) if tile.tiles > tile.warps // 2 else None


def sum_load(arch: int) -> bool:
    """Whether Σ x takes x by a load of its own: where x comes to mma in registers, not to wgmma in shared memory."""
    return arch < 90


def quads(arch: int, triton: tuple[int, int]) -> bool:
    """Whether a thread of the 16-bit operand layout owns four neighbours, not two: mma in Triton before 3.8."""
    return arch < 90 and triton < (3, 8)


def gemv_tile(group: int, granule: int, kp: int) -> Tile:
    """4 rows and 4 groups of weights a thread in each step (1 of the longest groups, or registers run out); short rows take
    shorter steps."""
    warps = 4
    step = 1024 if group == 32 else 32 * warps * group
    while step > max(granule, group * 32) and step >= 2 * kp:
        step //= 2
    return Tile("gemv", 1, 1, warps, 3, step)


def decode_tile() -> Tile:
    return Tile("decode", 1, 0, 4, 1, 512)


def rows_tile() -> Tile:
    """Eight weights a thread."""
    return Tile("rows", 1, 0, 4, 1, 1024)


def splits(arch: int, blocks: int, steps: int, rows: int, bits: float) -> int:
    """Into how many parts K is cut so that the device is full: a power of two, at least 4 steps each.

    The parts cost 8 bytes of float32 traffic for each output, so they stay below a quarter of the weight's bytes.
    """
    wanted = 2 * at_arch(MULTIPROCESSORS, arch)
    count = 1
    while blocks * count * 2 <= wanted and steps >= 8 * count and 8 * rows * 2 * count * 4 <= steps * 16 * bits:
        count *= 2
    return count
