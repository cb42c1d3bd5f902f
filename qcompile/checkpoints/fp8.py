"""FP8 as fbgemm (a scale per row), DeepSeek's fine-grained layout (one per 128×128) and others (one per tensor) store it.

``weight`` float8 [N, K] and ``weight_scale`` or ``weight_scale_inv``: in spite of that name, weight[n, k] = float8 · scale in
all of them. Scales of activations are set aside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import UnsupportedCheckpointError
from ..formats import Scheme, get
from ..formats.float import E4M3, E5M2
from .files import Stored, TensorFiles
from .repack import Codes, Kind, repack_codes
from .weight import Checkpoint, Weight, by_layer, not_finite, part

BOOKS = {torch.float8_e4m3fn: ("fp8_e4m3", E4M3), torch.float8_e5m2: ("fp8_e5m2", E5M2)}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
BLOCK = 128


def read(files: TensorFiles, settings: Mapping[str, Any]) -> Checkpoint:
    """The weights of an ``fbgemm_fp8`` or ``fp8`` checkpoint. Raises :class:`UnsupportedCheckpointError` for scales of other
    blocks, :class:`CorruptCheckpointError` naming the tensor that does not fit."""
    method = str(settings.get("quant_method"))
    mark = "weight_scale_inv" if method == "fp8" else "weight_scale"

    def layer(name: str, parts: Mapping[str, Stored]) -> Weight:
        return fp8_weight(part(name, parts, "weight"), part(name, parts, mark))

    return by_layer(method, files, (mark,), ("weight",), layer)


def fp8_weight(weight: Stored, scale: Stored) -> Weight:
    """A float8 weight [N, K] with one scale, [N] or [N, 1], or one for each 128×128 (the last ones may cover less)."""
    weight.expect(tuple(BOOKS), None, None)
    n, k = weight.shape
    base, book = BOOKS[weight.dtype]
    blocks = (-(-n // BLOCK), -(-k // BLOCK))
    if scale.shape in ((), (1,), (1, 1)):
        tail, shape = "_tensor", (1, 1)
    elif scale.shape in ((n,), (n, 1)):
        tail, shape = "", (n, 1)
    elif scale.shape == blocks:
        tail, shape = "_b128", blocks
    else:
        raise UnsupportedCheckpointError(f"{scale.name}: {list(scale.shape)} for a {n}×{k} weight; scales per tensor, row and "
                                         f"{BLOCK}×{BLOCK} are read")  # fmt: skip
    scale.expect(FLOATS, *scale.shape)
    spec = get(base + tail)

    def planes() -> list[torch.Tensor]:
        scales = scale.read().to(torch.float32).reshape(shape)
        codes = Codes(Kind.BYTES, weight.read().view(torch.uint8), n, k, 8)
        return repack_codes(spec, codes, {"scale": (scale.name, scales)}, finite=(weight.name, not_finite(book)))

    return Weight((n, k), (weight, scale), planes, Scheme(spec))
