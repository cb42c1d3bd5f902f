"""Tiles of the attention kernels: which blocks of queries and tokens, on which GPU, in how many parts."""

from __future__ import annotations

from dataclasses import dataclass

from . import tiles


@dataclass(frozen=True)
class AttendTile:
    """``queries`` of a block and ``tiles`` of 16 tokens at a time; ``left``: tokens are the rows of the products;
    ``registers`` a limit per thread for the assembler (0: its own choice)."""

    left: bool
    queries: int
    tiles: int
    warps: int
    stages: int
    registers: int = 0

    @property
    def tokens(self) -> int:
        return 16 * self.tiles


MOST_PARTS = 64
"""Parts that the tokens of a sequence are cut into."""

LEAST_BLOCKS = 2
"""Blocks of tokens in a part, so that its output costs less traffic than the tokens it reads."""


WIDE_HEAD = 128
"""Channels above which sums of a block of queries leave registers for less else."""

FEW = 32
"""Queries up to which they are the columns of the products, and a block of tokens is read once for all of them."""


def has_groups(arch: int) -> bool:
    """Whether products are those of warp groups, whose operands lie in shared or tensor memory (sm_90 to sm_110)."""
    return 90 <= arch < 120


def attend_tile(rows: int, width: int, arch: int, wide: bool, even: bool) -> AttendTile:
    """The tile for ``rows`` queries of a key-value head (all that share it) with heads of ``width`` (a power of two).

    ``wide``: float32 queries, in two terms. ``even``: stored heads have that width, so that no load needs a predicate.
    """
    new, big = has_groups(arch), width > WIDE_HEAD
    if rows > FEW and not (big and wide):
        return _many(new, big, wide or not even)
    queries = 16 if rows <= 16 else FEW
    if big:
        return AttendTile(True, queries, 2 if wide else 4, 8, 3 if new and not wide else 2, 255)
    count = 4 if queries == FEW and (wide or arch >= 100) else 8
    return AttendTile(True, queries, count, 8, 3) if new else AttendTile(True, queries, count, 4, 2, 255)


def _many(new: bool, big: bool, tight: bool) -> AttendTile:
    """``tight``: more than the usual has to be kept in registers."""
    if big:
        return AttendTile(False, 64, 2, 8, 1) if new else AttendTile(False, 32, 2, 4, 2, 255)
    if new:
        return AttendTile(False, 128, 4, 8, 2)
    return AttendTile(False, 64 if tight else 128, 2, 8, 2)


def prefill_tile(rows: int, width: int) -> AttendTile:
    """The tile for ``rows`` fresh queries of a head in 8-bit products."""
    if width > WIDE_HEAD:
        return AttendTile(False, 64, 2, 8, 2)
    return AttendTile(False, 128, 4, 8, 2) if rows > 64 else AttendTile(False, 64, 4, 4, 2)


def parts(arch: int, programs: int, blocks: int) -> int:
    """Into how many parts ``blocks`` blocks of tokens are cut so that ``programs`` programs become enough for the device."""
    wanted = 2 * tiles.at_arch(tiles.MULTIPROCESSORS, arch)
    return max(1, min(-(-wanted // programs) if programs < wanted // 2 else 1, blocks // LEAST_BLOCKS, MOST_PARTS))
