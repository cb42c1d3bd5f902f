"""``F.multi_head_attention_forward``, which ``nn.MultiheadAttention`` calls, over packed projections.

PyTorch's own cannot be called with packed weights: it multiplies where no subclass is asked. Its arithmetic is that of
*Attention Is All You Need*: softmax(q kᵀ / √d + mask) v for every head, between linear layers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .errors import UnsupportedOnTensorError
from .tensor import QuantizedTensor

Tensor = torch.Tensor


def multi_head(
    query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check: int, num_heads: int, in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None, bias_k: Tensor | None, bias_v: Tensor | None, add_zero_attn: bool, dropout_p: float,
    out_proj_weight: Tensor, out_proj_bias: Tensor | None, training: bool = True, key_padding_mask: Tensor | None = None,
    need_weights: bool = True, attn_mask: Tensor | None = None, use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None, k_proj_weight: Tensor | None = None, v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None, static_v: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Arguments, shapes and results are those of :func:`torch.nn.functional.multi_head_attention_forward`: query
    ``[L, N, E]``, key and value ``[S, N, E]``, or all without N.

    Raises :class:`~qcompile.errors.UnsupportedOnTensorError` for rows that are added to keys and values (``bias_k``,
    ``add_zero_attn``, ``static_k``).
    """
    if add_zero_attn or any(t is not None for t in (bias_k, bias_v, static_k, static_v)):
        raise UnsupportedOnTensorError("multi_head_attention_forward adds rows to keys and values, which packed projections do "
                                       "not support; leave this layer in float by a policy rule")  # fmt: skip
    single = query.dim() == 2
    separate = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else None
    projected = _projected((query, key, value), in_proj_weight, separate, in_proj_bias)
    q, k, v = (_split(t.unsqueeze(1) if single else t, num_heads) for t in projected)
    causal = is_causal and key_padding_mask is None and not need_weights
    mask = None if causal else _mask(attn_mask, key_padding_mask, q, num_heads)
    dropout = dropout_p if training else 0.0
    weights = None
    if need_weights:
        scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
        weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
        heads = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        heads = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
    out = F.linear(heads.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    if single:
        return out.squeeze(1), weights if weights is None else weights.squeeze(0)
    return out, weights


def _projected(
    inputs: tuple[Tensor, Tensor, Tensor], weight: Tensor | None, separate: tuple[Tensor | None, ...] | None, bias: Tensor | None
) -> tuple[Tensor, ...]:
    biases = (None, None, None) if bias is None else bias.chunk(3)
    if separate is not None:
        return tuple(F.linear(x, w, b) for x, w, b in zip(inputs, separate, biases, strict=True))  # type: ignore[arg-type]
    assert weight is not None
    if inputs[0] is inputs[1] is inputs[2]:
        return F.linear(inputs[0], weight, bias).chunk(3, -1)
    floats = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
    return tuple(F.linear(x, w, b) for x, w, b in zip(inputs, floats.chunk(3), biases, strict=True))


def _split(x: Tensor, heads: int) -> Tensor:
    """``[L, N, E]`` → ``[N, heads, L, E / heads]``."""
    return x.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)


def _mask(attention: Tensor | None, padding: Tensor | None, q: Tensor, heads: int) -> Tensor | None:
    """What is added to scores ``[N, heads, L, S]``: of a mask ``[L, S]`` or ``[N · heads, L, S]`` and of one of padding
    ``[N, S]``; a bool mask is True where nothing is seen."""
    parts = []
    if attention is not None:
        added = _added(attention, q)
        parts.append(added.unflatten(0, (-1, heads)) if added.dim() == 3 else added)
    if padding is not None:
        parts.append(_added(padding if padding.dim() == 2 else padding.unsqueeze(0), q)[:, None, None])
    return sum(parts[1:], parts[0]) if parts else None


def _added(mask: Tensor, q: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(q.dtype)
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))
