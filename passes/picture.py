"""Makes plain data of a traced graph, with the sites that its nodes belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from qcompile.names import module_name
from qcompile.plan import Site
from qcompile.report.graph import Picture, Step

from .costs import hint, source
from .trace import example, op_name
from .vocabulary import WEIGHT_OPERANDS

Names = Callable[[torch.Tensor], str | None]


def picture(gm: fx.GraphModule, sites: Iterable[Site], values: Mapping[str, Any], names: Names) -> Picture:
    """``gm`` without its parameters and numbers, which become fields of the nodes that take them; it has no name yet.
    ``values`` are the graph's inputs by placeholder."""
    sites = list(sites)
    at = {site.node: site.key for site in sites}
    weights = {site.weight: site.key for site in sites if site.weight is not None}
    parameters: dict[fx.Node, str] = {}
    steps: list[Step] = []
    for node in gm.graph.nodes:
        value = values.get(node.name)
        owned = names(value) if isinstance(value, torch.Tensor) else None
        if owned is not None or node.op == "get_attr":
            parameters[node] = owned or str(node.target)
        elif node.op != "output" and not isinstance(value, (int, float, torch.SymInt)):
            steps.append(_step(node, parameters, at, weights))
    return Picture("", tuple(steps))


def _step(
    node: fx.Node, parameters: Mapping[fx.Node, str], at: Mapping[str, tuple[str, str]], weights: Mapping[str, tuple[str, str]]
) -> Step:
    taken = [n for n in node.all_input_nodes if n in parameters]
    site = at.get(node.name)
    if site is None and op_name(node) in WEIGHT_OPERANDS:  # a layer that is called again is one site
        site = next((weights[n.name] for n in taken if n.name in weights), None)
    value = example(node)
    tensor = value if isinstance(value, torch.Tensor) else None
    return Step(
        name=node.name,
        operator=op_name(node) or "input",
        module=module_name(node),
        source=source(node),
        shape=tuple(map(hint, tensor.shape)) if tensor is not None else (),
        dtype=str(tensor.dtype).removeprefix("torch.") if tensor is not None else "",
        inputs=tuple(n.name for n in node.all_input_nodes if n not in parameters),
        parameters=tuple(parameters[n] for n in taken),
        site=site,
    )
