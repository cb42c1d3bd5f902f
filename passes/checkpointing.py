"""Activation checkpoints in a graph: ``torch.utils.checkpoint`` keeps what it recomputes in graphs of their own."""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch import fx
from torch.fx import Node

OPERATOR = "tag_activation_checkpoint"


def bodies(gm: fx.GraphModule) -> Iterator[tuple[Node, fx.GraphModule]]:
    """Every call of a checkpoint with its graph, whose placeholders take the call's arguments after the first."""
    for node in gm.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "__name__", "") == OPERATOR:
            body = getattr(gm, str(node.args[0].target))
            if len(body.graph.find_nodes(op="placeholder")) == len(node.args) - 1:
                yield node, body


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """``gm`` with a graph of its own, whose nodes have the same names."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return fx.GraphModule(gm, graph)


def inline(gm: fx.GraphModule) -> fx.GraphModule:
    """Puts the nodes of checkpoints, and of those inside them, in their places: nothing is recomputed then. Changes ``gm``."""
    for call, body in list(bodies(gm)):
        body = inline(copied(body))
        placeholders = body.graph.find_nodes(op="placeholder")
        values: dict[Node, Node] = dict(zip(placeholders, call.args[1:], strict=True))  # type: ignore[arg-type]
        with gm.graph.inserting_before(call):
            results = gm.graph.graph_copy(body.graph, values)
        if isinstance(results, Node):
            call.replace_all_uses_with(results)
        for user in list(call.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index, arg-type]
            gm.graph.erase_node(user)
        gm.graph.erase_node(call)
    gm.recompile()
    return gm
