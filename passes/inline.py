"""What checkpoints hold, put where they stand: for reading a graph, not for running it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
"""Activation checkpointing, as Dynamo writes it: of a graph of its own, its inputs and settings."""


def inlined(gm: GraphModule) -> GraphModule:
    """``gm`` with the nodes of each checkpoint in place of it; ``gm`` itself if it has none. Placeholders keep their names.

    A checkpoint whose graph holds tensors of its own stays closed.
    """
    if not any(_body(gm, node) for node in gm.graph.nodes):
        return gm
    graph = Graph()
    made: dict[Node, Any] = {}
    for node in gm.graph.nodes:
        body = _body(gm, node)
        if body is not None:
            inputs = dict(zip(body.graph.find_nodes(op="placeholder"), map(made.__getitem__, node.args[1:]), strict=True))
            made[node] = graph.graph_copy(body.graph, inputs)
        elif node.target is operator.getitem and isinstance(made.get(node.args[0]), (tuple, list)):
            made[node] = made[node.args[0]][node.args[1]]
        else:
            made[node] = graph.node_copy(node, made.__getitem__)
    return GraphModule(gm, graph)


def _body(gm: GraphModule, node: Node) -> GraphModule | None:
    """The graph of a checkpoint, those in it inlined; None for other nodes and for closed ones."""
    if node.target is not CHECKPOINT or not all(isinstance(a, Node) for a in node.args):
        return None
    first: Any = node.args[0]
    body = inlined(getattr(gm, first.target))
    closed = any(n.op == "get_attr" for n in body.graph.nodes if n.users)
    return None if closed else body
