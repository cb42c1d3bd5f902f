"""What a linear layer is for, told by the graph: which linears feed attention, follow it, or make up an MLP.

The roles are :data:`qcompile.plan.ROLES`. A fused layer (qkv, gate and up) has several.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch.fx import Node

from qcompile.plan import ROLES

from .sites import Attention, Graph, barrier, projections
from .trace import Inputs, ancestors, data_inputs, descendants, is_size, op_name, writes_in_place
from .vocabulary import ACTIVATIONS, CHOICES, COUNTED, ELEMENTWISE, LOSSES, MADE, WEIGHT_OPERANDS

Q, K, V, O, GATE, UP, DOWN, EMBED, HEAD, ROUTER = ROLES  # noqa: E741 — the field's letters

USUAL_NAMES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys("q_proj query q_lin to_q wq q_b_proj".split(), (Q,)),
    **dict.fromkeys("k_proj key k_lin to_k wk".split(), (K,)),
    **dict.fromkeys("v_proj value v_lin to_v wv".split(), (V,)),
    **dict.fromkeys("qkv qkv_proj c_attn query_key_value Wqkv to_qkv".split(), (Q, K, V)),
    **dict.fromkeys("o_proj out_proj out_lin".split(), (O,)),
    "gate_proj": (GATE,),
    "up_proj": (UP,),
    "gate_up_proj": (GATE, UP),
    **dict.fromkeys("fc1 c_fc dense_h_to_4h".split(), (GATE, UP)),
    **dict.fromkeys("down_proj fc2 dense_4h_to_h".split(), (DOWN,)),
    **dict.fromkeys("lm_head embed_out output_projection".split(), (HEAD,)),
}
"""Last components of module names that tell a role where a graph break hides the other end of an edge."""


Roles = dict[Node, set[str]]


def find_roles(graph: Graph, attentions: list[Attention]) -> Roles:
    """Roles of every linear and embedding node; nodes without one are absent or have the empty set."""
    roles: Roles = defaultdict(set)
    _attention(graph, attentions, roles)
    _embed_tokens(graph, roles)
    _lm_head(graph, roles)
    _router(graph, attentions, roles)
    _mlp(graph, roles)
    _by_name(graph, attentions, roles)
    return roles


def _attention(graph: Graph, attentions: list[Attention], roles: Roles) -> None:
    """The linears that q, k and v come from; the first linear after attention, before any residual sum."""
    stop = barrier(graph, attentions)
    for attention in attentions:
        for role, sources in zip((Q, K, V), projections(attention, graph, attentions), strict=True):
            for node in sources:
                if O not in roles[node]:  # attention without own projections reaches an earlier layer's
                    roles[node].add(role)
        for node in descendants(attention.node, lambda n: stop(n) or _adds_tensors(n, graph.inputs)):
            if node in graph.linears:
                roles[node].add(O)


def _adds_tensors(node: Node, inputs: Inputs) -> bool:
    """Whether the node adds two activations, as a residual connection does."""
    return op_name(node) == "add" and sum(n not in inputs.parameters for n in data_inputs(node)) > 1


def _embed_tokens(graph: Graph, roles: Roles) -> None:
    """Tables indexed by an integer input of the graph. Where several such embeddings are added up (positions
    or token types given as inputs), only those with the most rows are of tokens."""
    tokens = [n for n, e in graph.embeddings.items() if _indexed_by_input(e.index, graph.inputs)]

    def keeps(node: Node) -> bool:
        return op_name(node) not in ELEMENTWISE

    sums = {n: {d for d in descendants(n, keeps) if op_name(d) == "add"} for n in tokens}
    rows = {n: graph.inputs.parameters[graph.embeddings[n].table].shape[0] for n in tokens}
    for node in tokens:
        rivals = [rows[other] for other in tokens if sums[node] & sums[other]]
        if rows[node] >= max(rivals, default=0):
            roles[node].add(EMBED)


def _indexed_by_input(index: object, inputs: Inputs) -> bool:
    """Whether an index comes from an integer graph input, and not from counting (``arange``, ``cumsum``)."""
    given = False
    for node in ancestors([index], lambda n: False):
        if op_name(node) in COUNTED:
            return False
        tensor = inputs.activations.get(node)
        integer = tensor is not None and not tensor.is_floating_point() and tensor.dtype != torch.bool
        given = given or (integer and node.op == "placeholder" and "_buffers_" not in str(node.target))
    return given


def _lm_head(graph: Graph, roles: Roles) -> None:
    """A linear over the table of an embedding of tokens; or one with as many rows as that table whose result
    reaches the graph's output or a loss through operators of one tensor (slices, casts, scaling,
    soft-capping), so that no residual connection lies between."""
    tables = {e.table for n, e in graph.embeddings.items() if EMBED in roles[n]}
    rows = {graph.inputs.parameters[table].shape[0] for table in tables}
    for node, linear in graph.linears.items():
        tied = linear.weight in tables
        wide = linear.shape is not None and linear.shape[0] in rows and not roles[node]
        if tied or (wide and _ends_graph(node, graph.inputs)):
            roles[node].add(HEAD)


def _router(graph: Graph, attentions: list[Attention], roles: Roles) -> None:
    """A linear with fewer results than inputs, of which the largest are chosen, and the choice is used in the graph: what decides
    which experts a token is given to."""
    if not any(op_name(n) in CHOICES for n in graph.nodes):
        return
    stop = barrier(graph, attentions)
    for node, linear in graph.linears.items():
        if roles[node] or linear.shape is None or linear.shape[0] > linear.shape[1]:
            continue
        chosen = (n for n in descendants(node, lambda n: stop(n) and op_name(n) != "softmax") if op_name(n) in CHOICES)
        if any(user.op != "output" for n in chosen for user in descendants(n, lambda _: False)):
            roles[node].add(ROUTER)


def _ends_graph(node: Node, inputs: Inputs) -> bool:
    """Whether the value reaches the output, a loss or a choice of token through operators of one tensor."""

    def several(user: Node) -> bool:
        return sum(n not in inputs.parameters for n in data_inputs(user)) > 1

    users = descendants(node, lambda n: n.op == "output" or several(n) or op_name(n) in WEIGHT_OPERANDS)
    return any(user.op == "output" or op_name(user) in LOSSES for user in users)


@dataclass(frozen=True)
class Region:
    """Linears that an elementwise value is made of alone: ``all`` of them, those behind an activation
    function (``bent``), and whether a nonlinearity or a product of different linears is in it."""

    all: frozenset[Node] = frozenset()
    bent: frozenset[Node] = frozenset()
    nonlinear: bool = False


def _regions(graph: Graph) -> dict[Node, Region | None]:
    """For every node the linears it is an elementwise function of; None where anything else enters, as it
    does in a residual stream (embeddings, attention, convolution, the graph's inputs)."""
    regions: dict[Node, Region | None] = {}
    for node in graph.nodes:
        if node in graph.linears:
            regions[node] = Region(frozenset([node]))
        elif node in graph.inputs.parameters or op_name(node) in MADE or is_size(node):
            regions[node] = Region()
        elif node.op in ("placeholder", "get_attr"):
            tensor = graph.inputs.activations.get(node)
            scalar = tensor is None or (tensor.is_floating_point() and tensor.dim() <= 1)
            regions[node] = Region() if scalar else None
        else:
            regions[node] = _combined(node, [regions[n] for n in data_inputs(node)])
    return regions


def _combined(node: Node, parts: list[Region | None]) -> Region | None:
    name = op_name(node)
    known = [p for p in parts if p is not None]
    if len(known) < len(parts) or name not in ELEMENTWISE | ACTIVATIONS:
        return None
    everything = frozenset().union(*(p.all for p in known))
    if name in ACTIVATIONS:
        return Region(everything, everything, nonlinear=bool(everything))
    bent = frozenset().union(*(p.bent for p in known))
    product = name == "mul" and len({p.all for p in known if p.all}) > 1
    return Region(everything, bent, nonlinear=product or any(p.nonlinear for p in known))


def _mlp(graph: Graph, roles: Roles) -> None:
    """``down(act(gate(x)) * up(x))`` and ``down(act(up(x)))``: a linear whose input is an elementwise,
    nonlinear function of linears outside attention alone. It must give the width that its gate takes, or feed
    something in the graph, so that a classifier behind a pooler is no MLP."""
    regions = _regions(graph)
    for node, linear in graph.linears.items():
        region = regions.get(linear.input) if isinstance(linear.input, Node) else None
        if roles[node] or region is None or not region.nonlinear:
            continue
        if any(roles[n] - {GATE, UP} for n in region.all):
            continue
        shapes = [graph.linears[n].shape for n in region.all]
        widths = {shape[1] for shape in shapes if shape is not None}
        if linear.shape is not None and linear.shape[0] not in widths and _ends_graph(node, graph.inputs):
            continue
        roles[node].add(DOWN)
        gates = region.bent or region.all
        ups = region.all - gates or gates
        for role, sources in ((GATE, gates), (UP, ups)):
            for source in sources:
                roles[source].add(role)


def _by_name(graph: Graph, attentions: list[Attention], roles: Roles) -> None:
    """The usual names, for linears that the graph tells nothing of and whose other end lies beyond the graph:
    projections whose result leaves it (also into a cache); output projections whose input enters it."""
    stop = barrier(graph, attentions)
    for node, linear in graph.linears.items():
        usual = USUAL_NAMES.get(linear.name.rpartition(".")[2], ())
        if roles[node] or not usual:
            continue
        if usual in ((O,), (DOWN,)):
            beyond = _enters_graph(linear.input, graph)
        elif usual == (HEAD,):
            beyond = _ends_graph(node, graph.inputs)
        else:
            beyond = any(n.op == "output" or writes_in_place(n) for n in descendants(node, stop))
        if beyond:
            roles[node].update(usual)


def _enters_graph(value: object, graph: Graph) -> bool:
    """Whether the value is an input of the graph, seen through operators of one activation."""
    while isinstance(value, Node) and value not in graph.linears:
        if value in graph.inputs.activations:
            return value.op == "placeholder"
        sources = [n for n in data_inputs(value) if n not in graph.inputs.parameters]
        if len(sources) != 1:
            return False
        value = sources[0]
    return False
