"""Weights of 4-bit floats (e2m1), two in a byte, with a scale for each 16 (NVFP4) or 32 (MXFP4) of a row."""

from __future__ import annotations

import torch

from ..errors import CorruptCheckpointError
from ..formats import Scheme, get
from ..formats.float import E4M3, E8M0
from .files import Stored
from .repack import Codes, Kind, repack_codes
from .weight import Weight, finite, valid_codes


def nvfp4_weight(packed: Stored, scale: Stored, top: Stored, inverse: bool) -> Weight:
    """weight = e2m1 · scale · top, or with ``inverse`` e2m1 · scale / top: uint8 ``packed`` [N, K/2], e4m3 ``scale`` [N, K/16],
    one float32 ``top``."""
    n, half = packed.expect(torch.uint8, None, None).shape
    if half % 8:
        raise CorruptCheckpointError(f"{packed.name}: {2 * half} inputs are not whole groups of 16")
    scale.expect((torch.float8_e4m3fn, torch.uint8), n, half // 8)
    top.expect(torch.float32, *(() if top.shape == () else (1,)))
    spec = get("nvfp4")

    def planes() -> list[torch.Tensor]:
        factor = finite(top.name, top.read()).reshape(1, 1)
        if inverse:
            factor = finite(top.name, 1 / factor)
        scales = valid_codes(scale.name, scale.read().view(torch.uint8), E4M3)
        codes = Codes(Kind.STREAM, packed.read(), n, 2 * half, 4)
        return repack_codes(spec, codes, {"top": (top.name, factor), "s": (scale.name, scales)})

    return Weight((n, 2 * half), (packed, scale, top), planes, Scheme(spec))


def mxfp4_weight(packed: Stored, scale: Stored) -> Weight:
    """weight = e2m1 · 2^(scale − 127): uint8 ``packed`` [N, K/2], uint8 or e8m0 ``scale`` [N, K/32]."""
    n, half = packed.expect(torch.uint8, None, None).shape
    if half % 16:
        raise CorruptCheckpointError(f"{packed.name}: {2 * half} inputs are not whole groups of 32")
    scale.expect((torch.uint8, torch.float8_e8m0fnu), n, half // 16)
    spec = get("mxfp4")

    def planes() -> list[torch.Tensor]:
        scales = valid_codes(scale.name, scale.read().view(torch.uint8), E8M0)
        return repack_codes(spec, Codes(Kind.STREAM, packed.read(), n, 2 * half, 4), {"s": (scale.name, scales)})

    return Weight((n, 2 * half), (packed, scale), planes, Scheme(spec))
