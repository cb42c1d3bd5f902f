"""Codes out of 32-bit words, and into them."""

from __future__ import annotations

import torch


def unpack_stream(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 ``[rows, words]`` → uint8 codes of ``bits`` (1 … 8) out of a stream of bits, the lowest first: a code may lie across
    words (3 bits: 32 codes in 3 words). What fills up the last ``bits`` bytes of a row is zero."""
    data = words.contiguous().view(torch.uint8)
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        return data if bits == 8 else ((data.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(1)
    eights = _filled(data, bits).unflatten(1, (-1, bits)).to(torch.int64)  # ``bits`` bytes hold eight codes
    wide = (eights << torch.arange(0, 8 * bits, 8)).sum(-1, keepdim=True)
    return ((wide >> torch.arange(0, 8 * bits, bits)) & (2**bits - 1)).to(torch.uint8).flatten(1)


def pack_stream(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of :func:`unpack_stream`; the last word of a row is filled up with zeros."""
    eights = _filled(codes, 8).unflatten(1, (-1, 8)).to(torch.int64)
    wide = (eights << torch.arange(0, 8 * bits, bits)).sum(-1, keepdim=True)
    data = ((wide >> torch.arange(0, 8 * bits, 8)) & 255).to(torch.uint8).flatten(1)
    size = 4 * -(-codes.shape[1] * bits // 32)
    return _filled(data[:, :size], 4).view(torch.int32)


def _filled(data: torch.Tensor, multiple: int) -> torch.Tensor:
    """Columns of zeros added up to a multiple."""
    return torch.nn.functional.pad(data, (0, -data.shape[1] % multiple)).contiguous()


def from_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes of 4 bits ``[rows, K]`` → uint8 ``[rows, K/2]``, the first of each two in the lower half."""
    pair = codes.unflatten(1, (-1, 2))
    return pair[..., 0] | pair[..., 1] << 4
