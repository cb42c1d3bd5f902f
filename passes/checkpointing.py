"""Activation checkpoints in a graph: ``torch.utils.checkpoint`` keeps what it recomputes in graphs of their own."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


def bodies(gm: GraphModule) -> Iterator[tuple[Node, GraphModule]]:
    """Every call of a checkpoint with its graph, whose placeholders take the call's arguments after the first."""
    for node in gm.graph.nodes:
        if node.target is CHECKPOINT:
            body = getattr(gm, str(node.args[0].target))
            if len(body.graph.find_nodes(op="placeholder")) == len(node.args) - 1:
                yield node, body


def inlined(gm: GraphModule) -> GraphModule:
    """``gm`` with the nodes of each checkpoint in place of it; ``gm`` itself if it has none. Placeholders keep their names.

    A checkpoint whose graph holds tensors of its own stays closed.
    """
    if not any(_body(gm, node) for node in gm.graph.nodes):
        return gm
    graph = Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return inline(GraphModule(gm, graph))


def inline(gm: GraphModule) -> GraphModule:
    """Puts the nodes of checkpoints in place of them in ``gm`` itself, which it returns: nothing is recomputed then."""
    for call in list(gm.graph.nodes):
        if (body := _body(gm, call)) is None:
            continue
        inputs: dict[Node, Node] = dict(zip(body.graph.find_nodes(op="placeholder"), call.args[1:], strict=True))
        with gm.graph.inserting_before(call):
            results: Any = gm.graph.graph_copy(body.graph, inputs)
        if isinstance(results, Node):
            call.replace_all_uses_with(results)
        for user in list(call.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(results[user.args[1]])
            gm.graph.erase_node(user)
        gm.graph.erase_node(call)
    gm.recompile()
    return gm


def _body(gm: GraphModule, node: Node) -> GraphModule | None:
    """The graph of a checkpoint, those in it inlined; None for other nodes and for closed ones."""
    if node.target is not CHECKPOINT or not all(isinstance(a, Node) for a in node.args):
        return None
    first: Any = node.args[0]
    body = inlined(getattr(gm, first.target))
    closed = any(n.op == "get_attr" for n in body.graph.nodes if n.users)
    return None if closed else body
