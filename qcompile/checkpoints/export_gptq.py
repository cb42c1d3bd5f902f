"""A packed layer as GPTQ has it; see :mod:`qcompile.checkpoints.gptq` for the layout."""

from __future__ import annotations

import re
from typing import Any

import torch

from ..errors import UnsupportedCheckpointError
from ..tensor import QuantizedTensor
from .families import integers
from .gptq import BITS
from .weight import rows_of
from .words import pack_stream


def gptq_layer(name: str, weight: QuantizedTensor) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(what the configuration says of a layer, tensors by the end of their names). Zero points are stored as they are, which is
    the second of GPTQ's layouts. Raises :class:`UnsupportedCheckpointError` naming the layer for a format that is not integers
    with whole zero points, scales that float16 does not hold, and sizes that are not whole words."""
    spec, (n, k) = weight.scheme.format, weight.nk
    planes = [p.cpu() for p in weight.planes]
    family = integers(spec)
    if family is None or family.bits not in BITS or weight.transposed:
        raise UnsupportedCheckpointError(f"{name}: GPTQ has nothing equal to {spec.name}; it has 2, 3, 4 or 8 bits with whole "
                                         "zero points or none ('int4_sym_g128', 'int4_zp_g128', 'int8_g128')")  # fmt: skip
    bits, group = family.bits, family.group or k
    groups = -(-k // group)
    if k * bits % 32 or n * bits % 32:
        raise UnsupportedCheckpointError(f"{name}: GPTQ packs {n}×{k} codes of {bits} bits into no whole words")
    entries = rows_of(spec, planes, 0, n)
    scale = entries["scale"][:, :groups].float()
    if not torch.equal(scale.half().float(), scale):
        raise UnsupportedCheckpointError(f"{name}: GPTQ's scales are float16, which does not hold those of {spec.name} (from "
                                         f"{float(scale.min())} to {float(scale.max())}) exactly")  # fmt: skip
    codes, zero = entries[spec.code.name][:, :k], torch.full((n, groups), 2 ** (bits - 1), dtype=torch.uint8)
    if family.zeros:
        zero = entries["zero"][:, :groups]
    if spec.code.dtype == "i8":
        codes = codes.view(torch.uint8) ^ 128
    if int(zero.max()) >= 2**bits:
        raise UnsupportedCheckpointError(f"{name}: a zero point of {int(zero.max())} has no place in {bits} bits")
    group_of = torch.arange(k, dtype=torch.int32) // group
    if family.permuted:
        order = planes[-1].long()
        codes = torch.empty_like(codes).index_copy_(1, order, codes)
        group_of = torch.empty_like(group_of).index_copy_(0, order, group_of)
    tensors = {"qweight": pack_stream(codes, bits).t(), "qzeros": pack_stream(zero.t().contiguous(), bits),
               "scales": scale.half().t(), "g_idx": group_of}  # fmt: skip
    kind = {"bits": bits, "group_size": -1 if groups == 1 else group, "sym": not family.zeros, "desc_act": family.permuted}
    return kind, tensors


def gptq_settings(layers: list[tuple[str, dict[str, Any]]], left: list[str]) -> dict[str, Any]:
    """``quantization_config`` of GPTQ; layers that differ from the first, or are not packed, under GPTQModel's ``dynamic``."""
    if not layers:
        raise UnsupportedCheckpointError("no layer of the model is packed; there is nothing for GPTQ to hold")
    first = layers[0][1]
    dynamic: dict[str, Any] = {f"+:^{re.escape(name)}$": kind for name, kind in layers if kind != first}
    dynamic |= {f"-:^{re.escape(name)}$": {} for name in left if name != "lm_head"}
    made = {"quant_method": "gptq", "checkpoint_format": "gptq_v2", **first, "lm_head": any(n == "lm_head" for n, _ in layers)}
    return made | ({"dynamic": dynamic} if dynamic else {})
