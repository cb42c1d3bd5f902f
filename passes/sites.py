"""Nodes that discovery works with, and attention among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch.fx import Node

from .trace import Inputs, Operand, ancestors, descendants, op_name, operand
from .vocabulary import ACTIVATIONS, ELEMENTWISE, MASKS, PRODUCTS


@dataclass(frozen=True)
class Linear:
    """A linear-like node: its ``input`` operand, its ``shape`` (N, K) if known, its ``weight`` parameter's
    node, its module ``name``."""

    input: object
    shape: tuple[int, int] | None
    weight: Node | None
    name: str


@dataclass(frozen=True)
class Embedding:
    """An embedding node: the ``table`` parameter's node and the ``index`` operand."""

    table: Node
    index: object


@dataclass(frozen=True)
class Attention:
    """``node`` gives the attended values of operands ``q``, ``k``, ``v``; ``fused``: it is one operator."""

    node: Node
    q: object
    k: object
    v: object
    fused: bool


@dataclass(frozen=True)
class Graph:
    """What role finding looks at: nodes in order, leaves, linears and embeddings by node."""

    nodes: list[Node]
    inputs: Inputs
    linears: dict[Node, Linear]
    embeddings: dict[Node, Embedding]
    operands: dict[Node, Operand]
    """Weight operands of every matrix product, of activations too."""
    projected: dict[Node, tuple[set[Node], set[Node], set[Node]]] = field(default_factory=dict)
    """What :func:`projections` found, by attention's node."""


def find_attention(graph: Graph) -> list[Attention]:
    """Attention operators, and products around a softmax, ``softmax(q kᵀ …) v``, in graph order."""
    found: list[Attention] = []
    for node in graph.nodes:
        name = op_name(node)
        if "scaled_dot_product" in name or name == "flex_attention":
            q, k, v = (operand(node, i, w) for i, w in enumerate(("query", "key", "value")))
            found.append(Attention(node, q, k, v, fused=True))
        elif name == "multi_head_attention_forward":
            found.append(Attention(node, None, None, None, fused=True))
        elif name == "softmax":
            found += _written_out(node, graph)
    order = {node: i for i, node in enumerate(graph.nodes)}
    return sorted(found, key=lambda a: order[a.node])


def _written_out(softmax: Node, graph: Graph) -> list[Attention]:
    """The attention around ``softmax``: one product of activations before it, one after it, and elementwise
    operators between."""

    def is_product(node: Node) -> bool:
        return op_name(node) in PRODUCTS and node not in graph.linears

    def leaves(node: Node) -> bool:
        return node is not softmax and op_name(node) not in ELEMENTWISE | ACTIVATIONS | MASKS

    scores = [n for n in ancestors([softmax], leaves) if is_product(n)]
    values = [n for n in descendants(softmax, leaves) if is_product(n)]
    if len(scores) != 1 or len(values) != 1:
        return []
    q, k = _factors(scores[0])
    left, right = _factors(values[0])
    attended = right if softmax in set(ancestors([left], leaves)) else left
    return [Attention(values[0], q, k, attended, fused=False)]


def _factors(product: Node) -> tuple[object, object]:
    first, second = PRODUCTS[op_name(product)]
    factors = operand(product, first)
    if isinstance(factors, (list, tuple)):  # einsum takes its operands one by one or as a list
        return factors[0], factors[-1]
    right = operand(product, second, "other", "mat2", "batch2")
    return operand(product, first, "input", "batch1"), right


def barrier(graph: Graph, attentions: list[Attention]) -> Callable[[Node], bool]:
    """Nodes at which a way between a projection and its attention ends."""
    attended = {a.node for a in attentions}

    def stop(node: Node) -> bool:
        name = op_name(node)
        return (
            node in graph.linears
            or node in attended
            or node in graph.embeddings
            or node in graph.inputs.parameters
            or name in PRODUCTS
            or name == "softmax"
            or name.startswith("conv")
        )

    return stop


def projections(
    attention: Attention, graph: Graph, attentions: list[Attention]
) -> tuple[set[Node], set[Node], set[Node]]:
    """The linears that q, k and v come from, seen through views, rotary embeddings, norms, cache writes."""
    if (known := graph.projected.get(attention.node)) is not None:
        return known
    stop = barrier(graph, attentions)
    q, k, v = (
        {n for n in ancestors([start], stop) if n in graph.linears} for start in (attention.q, attention.k, attention.v)
    )
    graph.projected[attention.node] = q, k, v
    return q, k, v
