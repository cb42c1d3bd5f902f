"""How a graph uses one weight: as a linear layer's, as an embedding's, or in a way that rules it out."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from .experts import products
from .sites import Graph
from .trace import Operand, ancestors, folds, op_name, operand
from .vocabulary import MULTI_HEAD, MULTI_HEAD_WEIGHTS, MULTIPLIES, SHAPE_QUERIES, WEIGHT_OPERANDS

ADDED_ROWS = ((7, "bias_k"), (8, "bias_v"), (9, "add_zero_attn"), (21, "static_k"), (22, "static_v"))
"""Arguments of attention with its projections inside that packed projections do not support."""


@dataclass(frozen=True)
class Use:
    """One use of a weight: the consuming ``node``, its site's ``operator``, whether the parameter is
    ``transposed`` against [N, K], the ``problem`` that rules it out, the ``product`` that a node which only changes the
    weight serves, and the ``roles`` that the operator itself tells."""

    node: Node
    operator: str
    transposed: bool = False
    problem: str | None = None
    product: Node | None = None
    roles: frozenset[str] = frozenset()


def uses_of(weight: Node, graph: Graph, value: Node | None = None) -> list[Use]:
    """Uses of the parameter ``weight``, transposes folded; of those through ``value``, if it is given."""
    if graph.inputs.parameters[weight].dim() == 3 and (found := products(weight)):
        return [Use(p.node, "matmul", p.transposed, p.problem) for p in found]
    value = value or weight
    uses: list[Use] = []
    for user in value.users:
        if op_name(user) in SHAPE_QUERIES:
            continue
        if folds(user) is not None and len(user.all_input_nodes) == 1 and user.users:
            uses += uses_of(weight, graph, user)
        else:
            uses.append(_use(user, value, weight, graph))
    return uses


def is_transposed(name: str, weight: Operand) -> bool:
    """Whether the parameter is stored [K, N]: ``linear`` takes [N, K], the matrix products take [K, N]."""
    return weight.flipped != (name != "linear")


def site_operator(node: Node) -> str:
    """The operator that a linear-like node's site has."""
    name = op_name(node)
    return name if name in ("linear", "addmm") else "matmul"


def _use(node: Node, value: Node, weight: Node, graph: Graph) -> Use:
    name, source = op_name(node), graph.operands.get(node)
    if node in graph.embeddings and graph.embeddings[node].table is weight:
        renormalized = operand(node, 1, "weight") is value and operand(node, 3, "max_norm") is not None
        problem = "max_norm rewrites the table at every call" if renormalized else None
        return Use(node, "embedding", problem=problem)
    right = operand(node, *WEIGHT_OPERANDS[name][1]) if name in WEIGHT_OPERANDS else None
    if source is not None and source.parameter is weight and right is value:
        problem = _problem(node, value, graph.inputs.parameters[weight].dim())
        return Use(node, site_operator(node), is_transposed(name, source), problem)
    if name == MULTI_HEAD and (taken := [(w, r) for w, r in MULTI_HEAD_WEIGHTS.items() if operand(node, *w) is value]):
        return _multi_head(node, *taken[0])
    return _other_use(node, name, weight, graph)


def _multi_head(node: Node, weight: tuple[int, str], roles: tuple[str, ...]) -> Use:
    """The use as one of the projections inside attention. Queries, keys and values of one input are one product by the whole
    weight; of several inputs, products by slices of it."""
    inputs = {operand(node, i, word) for i, word in enumerate(("query", "key", "value"))}
    problem = None
    if weight[1] == "in_proj_weight" and len(inputs) > 1:
        problem = f"{MULTI_HEAD} ({node.name}) multiplies different inputs by slices of the weight"
    elif any(operand(node, *argument) not in (None, False) for argument in ADDED_ROWS):
        problem = f"{MULTI_HEAD} ({node.name}) adds rows to keys and values"
    return Use(node, "linear", problem=problem, roles=frozenset(roles))


def _problem(node: Node, value: Node, dims: int) -> str | None:
    """Why a product by a weight is no linear layer, if it is not."""
    name = op_name(node)
    if dims != 2:
        return f"the weight has {dims} dimensions; a linear layer's has 2"
    if list(node.args).count(value) > 1:
        return f"{name} multiplies the weight by itself"
    scales = [operand(node, i, word) for i, word in ((3, "beta"), (4, "alpha"))] if name == "addmm" else []
    if any(s not in (None, 1) for s in scales):
        return f"addmm with beta={scales[0]}, alpha={scales[1]}; only 1 and 1 are a linear layer"
    return None


def _other_use(node: Node, name: str, weight: Node, graph: Graph) -> Use:
    """The use by an operator that takes no packed weight; its operator is that of the linear it serves."""
    if name in WEIGHT_OPERANDS:
        reason = f"{name} ({node.name}) has the weight elsewhere than as its right factor"
        return Use(node, "matmul", problem=reason)
    for linear, source in graph.operands.items():
        if source.parameter is weight and node in set(ancestors([source.computed], lambda n: n is weight)):
            reason = f"{linear.name} multiplies by {source.computed} ({name} of the weight), not by the weight"
            return Use(node, site_operator(linear), problem=reason, product=linear)
    if node.op == "output":
        return Use(node, "other", problem="the weight is an output of the graph")
    operator = "matmul" if name in MULTIPLIES else "other"
    return Use(node, operator, problem=f"{name or node.op} ({node.name}) takes no packed weight")
