"""GPTQ's layout (AutoGPTQ, GPTQModel, transformers): codes packed along K, zero points along N, activation order.

``qweight`` int32 [K·bits/32, N] holds the codes of a column as a stream of bits, ``qzeros`` int32 [G, N·bits/32] the zero
points of a group, ``scales`` [G, N], ``g_idx`` int32 [K] the group of each column of the weight; weight[n, k] =
scales[g, n] · (code[k, n] − zero[g, n]), g = g_idx[k]. In the first layout (``checkpoint_format`` "gptq") zero points are
stored less one, in the second ("gptq_v2") as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import CorruptCheckpointError, UnsupportedCheckpointError
from ..formats import Scheme, get
from ..formats.integer import zero_point
from .files import Stored, TensorFiles
from .repack import Codes, Kind, repack_codes, unpack
from .weight import Checkpoint, Weight, by_layer, part

BITS = (2, 3, 4, 8)
SCALE_DTYPES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}
LAYOUTS = {"gptq": 1, "gptq_v2": 0}
"""``checkpoint_format`` → what is to be added to stored zero points."""


def read(files: TensorFiles, settings: Mapping[str, Any]) -> Checkpoint:
    """The weights of a GPTQ checkpoint. Raises :class:`UnsupportedCheckpointError` for other layouts of the same tool, and
    :class:`CorruptCheckpointError` naming the tensor that does not fit."""
    layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    bits, group = settings.get("bits"), settings.get("group_size", -1)
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise UnsupportedCheckpointError(f"checkpoint_format {layout!r} of GPTQ is not read, only {', '.join(LAYOUTS)}; save it "
                                         "again with one of them")  # fmt: skip
    if type(bits) is not int or bits not in BITS or type(group) is not int:
        raise UnsupportedCheckpointError(f"GPTQ with bits={bits!r} and group_size={group!r} is not read; 2, 3, 4 or 8 bits are")
    fixed = not settings.get("dynamic")

    def layer(name: str, parts: Mapping[str, Stored]) -> Weight:
        return _layer(name, parts, (bits, group) if fixed else None, bits, LAYOUTS[layout])

    return by_layer("gptq", files, ("qweight",), ("qzeros", "scales", "g_idx"), layer)


def _layer(name: str, parts: Mapping[str, Stored], said: tuple[int, int] | None, bits: int, plus: int) -> Weight:
    """One layer; ``said``: the (bits, group) that all layers have, None where the settings differ between layers."""
    qweight = part(name, parts, "qweight").expect(torch.int32, None, None)
    order = parts.get("g_idx")
    if order is not None:
        k = order.expect(torch.int32, None).shape[0]
        bits = 32 * qweight.shape[0] // max(k, 1)
    else:
        k = 32 * qweight.shape[0] // bits
    n = qweight.shape[1]
    scales = part(name, parts, "scales").expect(tuple(SCALE_DTYPES), None, n)
    groups = scales.shape[0]
    group = said[1] if said is not None else -1
    group = -(-k // max(groups, 1)) if group < 1 else group
    fits = bits in BITS and k * bits % 32 == 0 and n * bits % 32 == 0 and group > 1 and -(-k // group) == groups > 0
    if not fits or (said is not None and bits != said[0]):
        raise CorruptCheckpointError(f"{qweight.name}: {list(qweight.shape)} with {groups} groups for {k} inputs is no weight of "
                                     f"{bits} bits in groups of {group}")  # fmt: skip
    qweight.expect(torch.int32, k * bits // 32, n)
    qzeros = part(name, parts, "qzeros").expect(torch.int32, groups, n * bits // 32)
    columns = columns_of(order, k, group)
    wide = bool(plus) and _all_ones(qzeros, bits, n)
    spec = get(zero_point(bits, group, columns is not None, SCALE_DTYPES[scales.dtype], wide).name)
    sources = (qweight, qzeros, scales, *((order,) if order is not None else ()))

    def planes() -> list[torch.Tensor]:
        codes = Codes(Kind.COLUMNS, qweight.read(), n, k, bits, order=columns)
        zeros = _zeros(qzeros, bits, n, plus)
        return repack_codes(spec, codes, {"scale": (scales.name, scales.read().t()), "zero": (qzeros.name, zeros.t())})

    return Weight((n, k), sources, planes, Scheme(spec))


def columns_of(order: Stored | None, k: int, group: int) -> torch.Tensor | None:
    """int32 [K]: which column of the weight each stored one is; None where groups follow each other. Columns of a group keep
    the order they had."""
    if order is None:
        return None
    groups = order.read().clone()
    order.release()
    count = -(-k // group)
    in_order = torch.arange(k, dtype=torch.int32) // group
    if torch.equal(groups, in_order):
        return None
    if k and not 0 <= int(groups.min()) <= int(groups.max()) < count:
        raise CorruptCheckpointError(f"{order.name}: groups from {int(groups.min())} to {int(groups.max())}, there are {count}")
    columns = torch.argsort(groups, stable=True).to(torch.int32)
    if not torch.equal(groups[columns.long()], in_order):
        raise CorruptCheckpointError(f"{order.name}: groups of unequal size; expected {group} columns in each")
    return columns


def _all_ones(qzeros: Stored, bits: int, n: int) -> bool:
    """Whether a stored zero point is 2^bits − 1, told from whole words where they hold whole codes."""
    words = qzeros.read()
    if 32 % bits:
        found = unpack(Codes(Kind.STREAM, words, len(words), n, bits)) == 2**bits - 1
    else:
        together = words.clone()
        for shift in range(1, bits):
            together &= words >> shift
        lowest = sum(1 << at for at in range(0, 32, bits))
        found = (together & (lowest - 2**32 if lowest >= 2**31 else lowest)) != 0
    qzeros.release()
    return bool(found.any())


def _zeros(qzeros: Stored, bits: int, n: int, plus: int) -> torch.Tensor:
    """uint8 [G, N]. A stored pattern of all ones plus one is 2^bits."""
    words = qzeros.read()
    zeros = unpack(Codes(Kind.STREAM, words, len(words), n, bits))
    if plus and bits == 8 and bool((zeros == 255).any()):
        raise UnsupportedCheckpointError(f"{qzeros.name}: zero points of 256 in 8 bits are not read; save it as gptq_v2")
    return zeros.add_(plus)
