"""AWQ's "gemm" layout (AutoAWQ, transformers): codes of 4 bits packed along N, eight of them interleaved in each word.

``qweight`` int32 [K, N/8], ``qzeros`` int32 [G, N/8] (of 8 everywhere where ``zero_point`` is off), ``scales`` [G, N]; nibble i
of word j belongs to output 8·j + (0, 2, 4, 6, 1, 3, 5, 7)[i], and
weight[n, k] = scales[g, n] · (code[k, n] − zero[g, n]), g = k // group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import CorruptCheckpointError, UnsupportedCheckpointError
from ..formats import FormatSpec, Scheme, get
from ..formats.integer import zero_point
from .files import Stored, TensorFiles
from .gptq import SCALE_DTYPES
from .repack import Codes, Kind, repack_codes, unpack
from .weight import Checkpoint, Weight, by_layer, part

NIBBLE_OF = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which nibble of a word holds each of its eight outputs."""


def read(files: TensorFiles, settings: Mapping[str, Any]) -> Checkpoint:
    """The weights of an AWQ checkpoint. Raises :class:`UnsupportedCheckpointError` for its other layouts, and
    :class:`CorruptCheckpointError` naming the tensor that does not fit."""
    version = str(settings.get("version", "gemm")).lower()
    bits = settings.get("bits", settings.get("w_bit"))
    group = settings.get("group_size", settings.get("q_group_size", 128))
    if version != "gemm" or bits != 4 or type(group) is not int:
        raise UnsupportedCheckpointError(f"AWQ with version={version!r}, bits={bits!r}, group_size={group!r} is not read; "
                                         "version 'gemm' with 4 bits is")  # fmt: skip

    def layer(name: str, parts: Mapping[str, Stored]) -> Weight:
        return _layer(name, parts, group)

    return by_layer("awq", files, ("qweight",), ("qzeros", "scales"), layer)


def _layer(name: str, parts: Mapping[str, Stored], group: int) -> Weight:
    qweight = part(name, parts, "qweight").expect(torch.int32, None, None)
    k, n = qweight.shape[0], 8 * qweight.shape[1]
    group = k if group < 1 else group
    groups = -(-k // group) if group else 0
    qzeros = part(name, parts, "qzeros").expect(torch.int32, groups, n // 8)
    scales = part(name, parts, "scales").expect(tuple(SCALE_DTYPES), groups, n)
    if group < 2 or k % group:
        raise CorruptCheckpointError(f"{qweight.name}: {k} inputs are not whole groups of {group}")
    spec = get(zero_point(4, group, scale=SCALE_DTYPES[scales.dtype]).name)
    return Weight((n, k), (qweight, qzeros, scales), lambda: _planes(spec, qweight, qzeros, scales), Scheme(spec))


def _planes(spec: FormatSpec, qweight: Stored, qzeros: Stored, scales: Stored) -> list[torch.Tensor]:
    words = qweight.read()
    codes = Codes(Kind.OUTPUTS, words, 8 * words.shape[1], len(words), 4)
    zeros = outputs(qzeros.read())
    return repack_codes(spec, codes, {"scale": (scales.name, scales.read().t()), "zero": (qzeros.name, zeros.t())})


def outputs(words: torch.Tensor) -> torch.Tensor:
    """int32 ``[rows, N/8]`` → uint8 codes ``[rows, N]`` in the order of outputs."""
    rows, count = words.shape
    codes = unpack(Codes(Kind.STREAM, words, rows, 8 * count, 4)).view(rows, count, 8)
    return codes[..., list(NIBBLE_OF)].flatten(1)
