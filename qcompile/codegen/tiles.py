"""Which kernel runs for how many rows, in which tiles, on which GPU: data, and the limits it must keep.

Nothing here has been tuned on a device yet: the tables hold what compiles without spills and keeps enough bytes in
flight (see ``tests/test_triton.py``), and the choice between fused product and decode + vendor GEMM is one row each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

V = TypeVar("V")

SHARED_BYTES = {80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448, 110: 232_448,
                120: 101_376, 121: 101_376}  # fmt: skip
"""Shared memory that one block may use, by compute capability (CUDA C++ programming guide, technical specifications)."""

MULTIPROCESSORS = {80: 108, 86: 84, 87: 16, 89: 128, 90: 132, 100: 148, 103: 160, 110: 20, 120: 170, 121: 48}
"""Multiprocessors of the usual device of a compute capability; only decides how far K is split."""

REGISTERS_PER_SM = 65_536
REGISTERS_PER_THREAD = 255


@dataclass(frozen=True)
class Tile:
    """``kernel`` is gemv, dot, dot8 or decode (decode to a matrix, then the vendor's GEMM).

    ``tiles`` tiles of 16 weight rows and ``rows`` rows of x per block; ``step`` weights along K per step (gemv, decode).
    """

    kernel: str
    tiles: int
    rows: int
    warps: int
    stages: int
    step: int = 0

    @property
    def threads(self) -> int:
        return 32 * self.warps


DECODE_FROM = {80: 256, 89: 256, 90: 256, 100: 256}
"""Rows from which a weight is decoded once and multiplied by the vendor's GEMM, by compute capability."""

GEMV_BITS = {80: 4.0, 89: 4.0, 90: 8.0, 100: 8.0}
"""One row goes to the kernel without a matrix product for formats of at least this many bits of codes a weight.

It needs about 4 instructions a weight against 2.5 with a matrix product; an H200 moves a 4-bit weight in 3.4
instruction slots (4.3 TB/s, 132 multiprocessors), an A100 in 4.9.
"""

ROWS = {
    "dot": ((16, Tile("dot", 8, 16, 4, 4)), (32, Tile("dot", 8, 32, 4, 4)), (64, Tile("dot", 8, 64, 8, 4)),
            (2**31, Tile("dot", 8, 128, 8, 3))),
    "dot8": ((16, Tile("dot8", 8, 16, 4, 4)), (32, Tile("dot8", 8, 32, 4, 4)), (64, Tile("dot8", 8, 64, 8, 4)),
             (2**31, Tile("dot8", 8, 128, 8, 3))),
}  # fmt: skip
"""Tiles by the largest number of rows that they serve."""


def at_arch(table: Mapping[int, V], arch: int) -> V:
    """The entry of the highest compute capability that is not above ``arch`` (of the lowest one, if all are)."""
    return table[max((a for a in table if a <= arch), default=min(table))]


def product_tile(kernel: str, rows: int) -> Tile:
    return next(tile for most, tile in ROWS[kernel] if rows <= most)


def sum_load(arch: int) -> bool:
    """Whether Σ x takes x by a load of its own: where x comes to mma in registers, not to wgmma in shared memory."""
    return arch < 90


def quads(arch: int, triton: tuple[int, int]) -> bool:
    """Whether a thread of the 16-bit operand layout owns four neighbours, not two: mma in Triton before 3.8."""
    return arch < 90 and triton < (3, 8)


def gemv_tile(group: int, period: int, kp: int) -> Tile:
    """Four 16-byte words a thread in each step, of one tile of 16 rows; short rows take shorter steps."""
    warps = 4
    step = 32 * warps * group
    while step > max(period, group * 32) and step >= 2 * kp:
        step //= 2
    return Tile("gemv", 1, 1, warps, 3, step)


def decode_tile(group: int, period: int) -> Tile:
    return Tile("decode", 1, 0, 4, 1, max(512, period, 4 * group))


def splits(arch: int, blocks: int, steps: int, rows: int, bits: float) -> int:
    """Into how many parts K is cut so that the device is full: a power of two, at least 4 steps each.

    The parts cost 8 bytes of float32 traffic for each output, so they stay below a quarter of the weight's bytes.
    """
    wanted = 2 * at_arch(MULTIPROCESSORS, arch)
    count = 1
    while blocks * count * 2 <= wanted and steps >= 8 * count and 8 * rows * 2 * count * 4 <= steps * 16 * bits:
        count *= 2
    return count
