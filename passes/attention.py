"""Reads attention off a graph, fused or written out, and exchanges it for the operator that keeps keys and values packed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from qcompile import ops
from qcompile.formats import Scheme, register_scheme

from .sites import Attention
from .trace import data_inputs, example, op_name, operand

CASTS = frozenset("to float half bfloat16 type _to_copy contiguous clone".split())
VIEWS = frozenset("view reshape _unsafe_view contiguous clone".split())


@dataclass(frozen=True)
class Call:
    """softmax(mask(cap(scale · q kᵀ))) v for 4-D q, k, v; ``inverted``: the bool mask is True where nothing is seen."""

    q: Node
    k: Node
    v: Node
    mask: Node | None = None
    inverted: bool = False
    flipped: bool = False
    causal: bool = False
    scale: float | None = None
    softcap: float = 0.0


class Unread(Exception):
    """Attention that is not what :class:`Call` says; the message is the reason."""


def read(attention: Attention) -> Call | str:
    """What ``attention`` computes, or why it is left alone."""
    try:
        call = _fused(attention.node) if attention.fused else _written_out(attention)
        return _checked(call)
    except Unread as reason:
        return str(reason)


def _fused(node: Node) -> Call:
    if op_name(node) != "scaled_dot_product_attention":
        raise Unread(f"{op_name(node)} has no kernel; scaled_dot_product_attention and products around a softmax have one")
    q, k, v = (_node(operand(node, i, word)) for i, word in enumerate(("query", "key", "value")))
    mask, dropout, causal = operand(node, 3, "attn_mask"), operand(node, 4, "dropout_p"), operand(node, 5, "is_causal")
    if dropout not in (None, 0, 0.0):
        raise Unread(f"it drops attention weights (dropout_p={dropout})")
    if not isinstance(causal, (bool, type(None))):
        raise Unread("is_causal is no constant")
    return Call(q, k, v, mask if isinstance(mask, Node) else None, causal=bool(causal), scale=_number(operand(node, 6, "scale")))


def _written_out(attention: Attention) -> Call:
    """Walks from the product with v up to the softmax, and from there to the product of q and k."""
    left = operand(attention.node, 0, "input")
    if op_name(attention.node) != "matmul" or left is attention.v:
        raise Unread(f"{op_name(attention.node)} ({attention.node.name}) is no matmul of weights and values")
    node = _node(left)
    while op_name(node) != "softmax":
        if op_name(node) == "dropout" and operand(node, 1, "p") not in (0, 0.0) and operand(node, 2, "training") is not False:
            raise Unread("it drops attention weights")
        if op_name(node) not in CASTS | {"dropout"}:
            raise Unread(f"{op_name(node)} ({node.name}) changes the weights after the softmax")
        node = data_inputs(node)[0]
    if operand(node, 1, "dim") not in (-1, 3):
        raise Unread("the softmax is not over the last dimension")
    return _scores(_node(operand(node, 0, "input")), Call(_node(attention.q), _node(attention.k), _node(attention.v)))


def _scores(node: Node, call: Call) -> Call:
    """``call`` with what happens to the product of q and k before the softmax, read backwards."""
    factor, outer = 1.0, None
    while op_name(node) != "matmul":
        name = op_name(node)
        sources = data_inputs(node)
        if node.kwargs.keys() & {"alpha", "rounding_mode"}:
            raise Unread(f"{name} ({node.name}) has {' and '.join(sorted(node.kwargs))}")
        number = _factor(node)
        if number is not None:
            factor *= number
        elif name == "tanh" and outer is None:
            outer, factor = factor, 1.0
        elif name == "add" and len(sources) == 2 and call.mask is None and factor == 1.0 and outer is None:
            node, mask = sources if _holds_product(sources[0]) else sources[::-1]
            call = replace(call, mask=mask)
            continue
        elif name in ("masked_fill", "where") and call.mask is None and factor == 1.0 and outer is None:
            node, call = _filled(node, name, call)
            continue
        elif name not in CASTS:
            raise Unread(f"{name} ({node.name}) between scores and softmax is neither scale, cap nor mask")
        node = sources[0]
    if outer is not None:
        if outer <= 0:
            raise Unread(f"scores are capped by {outer}")
        factor *= outer  # cap · tanh(inner · q kᵀ) = cap · tanh(scale · q kᵀ / cap)
    return replace(call, scale=factor, softcap=outer or 0.0, flipped=True)


def _filled(node: Node, name: str, call: Call) -> tuple[Node, Call]:
    scores, mask, value = ((0, 1, 2) if name == "masked_fill" else (1, 0, 2))
    filler = _number(operand(node, value, "value", "other"))
    if filler is None or filler > -1e4:
        raise Unread(f"{name} ({node.name}) fills in something else than a large negative number")
    seen = _node(operand(node, mask, "mask", "condition"))
    return _node(operand(node, scores, "input")), replace(call, mask=seen, inverted=name == "masked_fill")


def _holds_product(node: Node) -> bool:
    while op_name(node) != "matmul":
        sources = data_inputs(node)
        if len(sources) != 1:
            return False
        node = sources[0]
    return True


def _factor(node: Node) -> float | None:
    """The number that the node multiplies its one tensor by."""
    if op_name(node) not in ("mul", "div") or len(data_inputs(node)) != 1:
        return None
    first, second = operand(node, 0, "input"), operand(node, 1, "other")
    number = _number(second if isinstance(first, Node) else first)
    if number is None or (op_name(node) == "div" and not isinstance(first, Node)):
        return None
    return 1.0 / number if op_name(node) == "div" else number


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _node(value: object) -> Node:
    if not isinstance(value, Node):
        raise Unread(f"an operand is {value!r}, no tensor of the graph")
    return value


def _checked(call: Call) -> Call:
    """``call`` with repeated heads of keys and values seen through. Raises :class:`Unread` for shapes without a kernel."""
    for tensor in (example(n) for n in (call.q, call.k, call.v)):
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 4:
            raise Unread("queries, keys and values are not [batch, heads, length, size]")
        if tensor.dtype not in ops.FLOAT_DTYPES:
            raise Unread(f"its tensors are {tensor.dtype}, not float32, float16 or bfloat16")
    if call.mask is not None:
        mask = example(call.mask)
        if not isinstance(mask, torch.Tensor) or mask.dim() > 4 or mask.dtype not in (torch.bool, *ops.FLOAT_DTYPES):
            raise Unread(f"the mask is {mask if not isinstance(mask, torch.Tensor) else mask.dtype}, neither bool nor float")
        if call.inverted and mask.dtype != torch.bool:
            raise Unread("masked_fill takes a mask that is not bool")
        if mask.dim() == 0 or (mask.shape[-1] == 1 and _shape(call.v)[2] != 1):
            raise Unread(f"the mask {list(mask.shape)} is one for all tokens")
    if _shape(call.q)[0] != _shape(call.k)[0] or _shape(call.k)[:2] != _shape(call.v)[:2]:
        raise Unread("queries, keys and values differ in their batch, or keys and values in their heads")
    if call.flipped:
        return call
    return replace(call, k=_unrepeated(call.k), v=_unrepeated(call.v))


def _unrepeated(node: Node) -> Node:
    """Keys or values ``[B, H, T, D]`` that ``node`` repeats for groups of queries (``expand`` of a new dimension 2, reshaped)."""
    reshaped = node
    while op_name(reshaped) in ("contiguous", "clone"):
        reshaped = data_inputs(reshaped)[0]
    if op_name(reshaped) not in VIEWS or len(sources := data_inputs(reshaped)) != 1 or op_name(sources[0]) != "expand":
        return node
    wide, inserted = _shape(sources[0]), data_inputs(sources[0])[0]
    while op_name(inserted) in ("getitem", "unsqueeze", "slice") and len(data_inputs(inserted)) == 1:
        source = data_inputs(inserted)[0]
        if len(_shape(source)) == 4 and len(narrow := _shape(inserted)) == 5:
            return source if len(wide) == 5 and narrow[2] == 1 and _shape(source)[1] == wide[1] else node
        inserted = source
    return node


def _shape(node: Node) -> tuple[int, ...]:
    value = example(node)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def rewrite(attentions: Iterable[tuple[Attention, str]], schemes: Mapping[str, Scheme]) -> int:
    """Exchanges every attention whose site (named beside it) has a scheme for ``qcompile::sdpa``; returns how many."""
    count = 0
    for attention, name in attentions:
        call = read(attention)
        if name not in schemes or isinstance(call, str):
            continue
        node, key = attention.node, register_scheme(schemes[name])
        with node.graph.inserting_before(node):
            mask, k = call.mask, call.k
            if call.inverted:
                mask = node.graph.call_method("logical_not", (mask,))
            if call.flipped:
                k = node.graph.call_method("transpose", (k, -1, -2))
            scale = call.scale if call.scale is not None else _shape(call.q)[-1] ** -0.5
            new = node.graph.call_function(ops.sdpa, (call.q, k, call.v, mask, call.causal, scale, call.softcap, key, key))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        node.graph.erase_node(node)
        count += 1
    return count
