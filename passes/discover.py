"""Finds every site in a graph where a weight is used or attention computed: by operator, not module class."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import nn
from torch.fx import Node

from qcompile.names import module_name
from qcompile.plan import LINEAR, Site

from .attention import read
from .costs import flops, source
from .experts import products
from .roles import Roles, find_roles
from .sites import Attention, Embedding, Graph, Linear, find_attention, projections
from .trace import Inputs, Operand, ancestors, example, op_name, operand, resolve, sizes
from .uses import Use, is_transposed, site_operator, uses_of
from .vocabulary import PRODUCTS, WEIGHT_OPERANDS

Names = Callable[[torch.Tensor], str | None]
Placed = Iterator[tuple[Node, Site]]
"""Sites with the nodes that they stand at."""


def discover(gm: torch.fx.GraphModule, example_inputs: Iterable[object], names: Names) -> list[Site]:
    """Every site of ``gm``, in graph order.

    ``gm`` is Dynamo's graph of torch functions or an exported graph of aten operators; its parameters are
    placeholders (then ``example_inputs`` holds the parameters at their places) or attributes. ``names`` gives
    a parameter's qualified name ("model.layers.0.mlp.up_proj.weight"), or None. Every parameter of two
    dimensions and more is in some site, and what cannot be quantized says why in ``unsupported``. Several
    uses of a weight by one operator of one module (a layer that is called again and again) are one site.
    Neither the graph nor a tensor is kept or changed.
    """
    graph, qualified = _read(gm, example_inputs, names)
    inputs = graph.inputs
    attentions = find_attention(graph)
    roles = find_roles(graph, attentions)
    found: dict[Node, list[Site]] = defaultdict(list)
    for weight, tensor in inputs.parameters.items():
        if tensor.dim() >= 2:
            for node, site in _sites_of(weight, graph, qualified, roles):
                found[node].append(site)
    for node, site in (*_sites_without_weight(graph, attentions), *_attention_sites(graph, attentions)):
        found[node].append(site)
    return [site for node in graph.nodes for site in found[node]]


def _read(gm: torch.fx.GraphModule, example_inputs: Iterable[object], names: Names) -> tuple[Graph, dict[Node, str | None]]:
    inputs = Inputs.of(gm, example_inputs, lambda t: isinstance(t, nn.Parameter) or names(t) is not None)
    qualified = {node: names(t) or _attribute_name(node) for node, t in inputs.parameters.items()}
    return _graph(list(gm.graph.nodes), inputs, qualified), qualified


def attention_of(gm: torch.fx.GraphModule, example_inputs: Iterable[object], names: Names) -> list[tuple[Attention, str]]:
    """Every attention of ``gm`` with the name of its site."""
    graph, _ = _read(gm, example_inputs, names)
    return list(named_attention(graph, find_attention(graph)))


def _graph(nodes: list[Node], inputs: Inputs, qualified: dict[Node, str | None]) -> Graph:
    graph = Graph(nodes, inputs, {}, {}, {})
    for node in nodes:
        name = op_name(node)
        if name in WEIGHT_OPERANDS:
            (x, *x_words), (w, *w_words) = WEIGHT_OPERANDS[name]
            weight = resolve(operand(node, w, *w_words), inputs.parameters)
            graph.operands[node] = weight
            if weight.parameter is not None or name in ("linear", "addmm"):
                module = _module(node, weight.parameter, qualified)
                shape = _shape(name, weight, inputs)
                graph.linears[node] = Linear(operand(node, x, *x_words), shape, weight.parameter, module)
        elif name == "embedding":
            # F.embedding takes (index, table), the aten operator (table, index).
            first, second = operand(node, 0, "input", "weight"), operand(node, 1, "weight", "indices")
            for table, index in ((second, first), (first, second)):
                source = resolve(table, inputs.parameters)
                if source.parameter is not None and source.computed is None and not source.flipped:
                    graph.embeddings[node] = Embedding(source.parameter, index)
                    break
    _add_experts(graph, qualified)
    return graph


def _add_experts(graph: Graph, qualified: dict[Node, str | None]) -> None:
    """Products by experts are linear layers of their matrices."""
    for weight, tensor in graph.inputs.parameters.items():
        for product in products(weight) if tensor.dim() == 3 else ():
            if product.problem is None:
                rows, cols = tensor.shape[1:]
                shape = (cols, rows) if product.transposed else (rows, cols)
                graph.operands[product.node] = Operand(weight, product.transposed, None)
                graph.linears[product.node] = Linear(product.x, shape, weight, _module(product.node, weight, qualified))


def _shape(name: str, weight: Operand, inputs: Inputs) -> tuple[int, int] | None:
    """(N, K) of a linear whose weight is a parameter of two dimensions."""
    if weight.parameter is None or weight.computed is not None:
        return None
    shape = inputs.parameters[weight.parameter].shape
    if len(shape) != 2:
        return None
    return (shape[1], shape[0]) if is_transposed(name, weight) else (shape[0], shape[1])


def _module(node: Node, weight: Node | None, qualified: dict[Node, str | None]) -> str:
    """The module's name: the parameter's without ".weight"; where the weight has several users and the node
    was traced in another module than the parameter is named after (tied weights), that module's."""
    traced = module_name(node)
    parameter = qualified.get(weight) if weight is not None else None
    if weight is None or parameter is None:
        return traced or node.name
    own = parameter.removesuffix(".weight")
    elsewhere = traced and f".{traced}." not in f".{own}."
    return traced if elsewhere and len(weight.users) > 1 else own


def _sites_of(weight: Node, graph: Graph, qualified: dict[Node, str | None], roles: Roles) -> Placed:
    """Sites of one parameter: one for each operator and module that uses it."""
    tensor = graph.inputs.parameters[weight]
    whole = Site(
        name=(qualified[weight] or weight.name).removesuffix(".weight"),
        operator="other",
        node=weight.name,
        weight=weight.name,
        shape=tuple(tensor.shape),
        dtype=tensor.dtype,
        unsupported="nothing in this graph uses the weight",
        parameter=qualified[weight],
    )
    uses = uses_of(weight, graph)
    groups: dict[tuple[str, str], list[Use]] = defaultdict(list)
    for use in uses:
        groups[_module(use.node, weight, qualified), use.operator].append(use)
    if not groups:
        yield weight, whole
    for (name, operator), group in groups.items():
        transposed = group[0].transposed
        yield (
            group[0].node,
            replace(
                whole,
                name=name,
                operator=operator,
                roles=frozenset().union(*(u.roles | roles.get(u.node, set()) for u in group)),
                node=group[0].node.name,
                shape=_as_stored(whole.shape) if transposed else whole.shape,
                transposed=transposed,
                unsupported=_why_not(group, uses),
                flops=sum(_cost(u, weight, graph) for u in group) if operator in LINEAR else 0,
                source=source(group[0].product or group[0].node),
            ),
        )


def _as_stored(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with its last two dimensions, (K, N), in the order of packed weights."""
    return (*shape[:-2], shape[-1], shape[-2])


def _cost(use: Use, weight: Node, graph: Graph) -> int:
    tensor = graph.inputs.parameters[weight]
    if tensor.dim() == 3 and (product := next((p for p in products(weight) if p.node is use.node and not p.problem), None)):
        return product.flops(tensor.shape[1 if product.transposed else 2])
    return flops(use.product or use.node, weight, tensor)


def _why_not(group: list[Use], uses: list[Use]) -> str | None:
    """Why the uses of a ``group``, among all ``uses`` of one weight, cannot have it packed."""
    for use in group:
        if use.problem is not None:
            return use.problem
    for use in uses:
        if use.problem is not None:
            kind = op_name(use.node) or use.node.op
            return f"the weight is also used by {use.node.name} ({kind}): {use.problem}"
    if len({u.transposed for u in uses if u.operator != "embedding"}) > 1:
        return "the weight is used both as it is and transposed"
    return None


def _sites_without_weight(graph: Graph, attentions: list[Attention]) -> Placed:
    """Linears whose weight is no parameter, and products of activations outside written-out attention."""
    inside: set[Node] = set()
    for attention in attentions:
        if not attention.fused:
            ends = {attention.q, attention.k, attention.v}
            inside.update(ancestors([attention.node], ends.__contains__))
    for node in graph.nodes:
        name = op_name(node)
        if node in graph.linears:
            if graph.operands[node].parameter is not None:
                continue
            weight = operand(node, *WEIGHT_OPERANDS[name][1])
            maker = f" ({op_name(weight) or weight.op})" if isinstance(weight, Node) else ""
            reason, cost = f"the weight is {weight}{maker}, not a parameter", _flops(node, weight)
        elif name in PRODUCTS and node not in inside and not _holds_weight(node, graph):
            reason, cost = "both factors are activations", 0
        else:
            continue
        shape, dtype = sizes(example(node))
        module = module_name(node) or node.name
        operator = site_operator(node)
        site = Site(module, operator, node=node.name, shape=shape, dtype=dtype, unsupported=reason)
        yield node, replace(site, flops=cost, source=source(node))


def _flops(node: Node, weight: object) -> int:
    """Of a linear whose weight is computed."""
    tensor = example(weight) if isinstance(weight, Node) else None
    return flops(node, weight, tensor) if isinstance(weight, Node) and isinstance(tensor, torch.Tensor) else 0


def _holds_weight(node: Node, graph: Graph) -> bool:
    return any(resolve(n, graph.inputs.parameters).parameter is not None for n in node.all_input_nodes)


def named_attention(graph: Graph, attentions: list[Attention]) -> Iterator[tuple[Attention, str]]:
    """Every attention with the name of its site: the module that holds the projections of q, k and v."""
    for attention in attentions:
        sources = set().union(*projections(attention, graph, attentions))
        owners = [graph.linears[n].name.split(".")[:-1] for n in sources]
        common = ".".join(os.path.commonprefix(owners)) if owners else ""
        yield attention, common or module_name(attention.node) or attention.node.name


def _attention_sites(graph: Graph, attentions: list[Attention]) -> Placed:
    """One site for each module that attends, named after what holds the projections of q, k and v."""
    named: set[str] = set()
    for attention, name in named_attention(graph, attentions):
        if name not in named:
            shape, dtype = sizes(example(attention.q if isinstance(attention.q, Node) else attention.node))
            call = read(attention)
            reason = call if isinstance(call, str) else None
            site = Site(name, "attention", node=attention.node.name, shape=shape, dtype=dtype, unsupported=reason)
            yield attention.node, replace(site, source=source(attention.node))
        named.add(name)


def _attribute_name(node: Node) -> str | None:
    return str(node.target) if node.op == "get_attr" else None
