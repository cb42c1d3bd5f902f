"""Finds every site in a graph where a weight is used or attention computed, by operator and never by module class."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.fx import Node

from qcompile.plan import Site

from .roles import Roles, find_roles
from .sites import Attention, Embedding, Graph, Linear, find_attention, projections
from .trace import Inputs, Operand, ancestors, example, folds, op_name, operand, resolve
from .vocabulary import MULTIPLIES, PRODUCTS, SHAPE_QUERIES, WEIGHT_OPERANDS

Names = Callable[[torch.Tensor], str | None]


def discover(gm: torch.fx.GraphModule, example_inputs: Iterable[object], names: Names) -> list[Site]:
    """Every site of ``gm``, in graph order; weights that nothing uses here come last.

    ``gm`` is Dynamo's graph of torch functions or an exported graph of aten operators; its parameters are placeholders
    (then ``example_inputs`` holds the parameters at their places) or attributes. ``names`` gives a parameter's qualified
    name ("model.layers.0.mlp.up_proj.weight"), or None. Every parameter of two dimensions and more is in some site, and
    what cannot be quantized says why in ``unsupported``. Several uses of a weight by one operator of one module (a layer
    that is called again and again) are one site. Neither the graph nor a tensor is kept or changed.
    """
    inputs = Inputs.of(gm, example_inputs, lambda t: isinstance(t, nn.Parameter) or names(t) is not None)
    qualified = {node: names(tensor) or _attribute_name(node) for node, tensor in inputs.parameters.items()}
    scan = _Scan(list(gm.graph.nodes), inputs, qualified)
    scan.find_linears()
    graph = Graph(scan.nodes, inputs, scan.linears, scan.embeddings)
    attentions = find_attention(scan.nodes, scan.linears)
    roles = find_roles(graph, attentions)
    found: dict[Node, list[Site]] = defaultdict(list)
    for weight in scan.weights():
        for node, site in scan.sites_of(weight, roles):
            found[node].append(site)
    for node, site in scan.sites_without_weight(attentions):
        found[node].append(site)
    named: set[str] = set()
    for attention in attentions:
        site = _attention_site(attention, graph, attentions)
        if site.name not in named:
            found[attention.node].append(site)
        named.add(site.name)
    return [site for node in scan.nodes for site in found[node]]


@dataclass(frozen=True)
class _Use:
    """One use of a weight: the consuming ``node``, its site's ``operator``, whether the parameter is ``transposed``
    against [N, K], and the ``problem`` that rules it out."""

    node: Node
    operator: str
    transposed: bool
    problem: str | None


class _Scan:
    """The nodes of one graph, and what was found in them."""

    def __init__(self, nodes: list[Node], inputs: Inputs, qualified: dict[Node, str | None]) -> None:
        self.nodes, self.inputs, self.qualified = nodes, inputs, qualified
        self.linears: dict[Node, Linear] = {}
        self.embeddings: dict[Node, Embedding] = {}
        self.operands: dict[Node, Operand] = {}

    def find_linears(self) -> None:
        """Fills ``linears``, ``embeddings`` and ``operands`` (of linear-like nodes and matmuls of activations alike)."""
        for node in self.nodes:
            name = op_name(node)
            if name in WEIGHT_OPERANDS:
                (x, *x_words), (w, *w_words) = WEIGHT_OPERANDS[name]
                weight = resolve(operand(node, w, *w_words), self.inputs.parameters)
                self.operands[node] = weight
                if weight.parameter is not None or name in ("linear", "addmm"):
                    own = self._name(node, weight.parameter)
                    self.linears[node] = Linear(operand(node, x, *x_words), self._shape(name, weight), weight.parameter, own)
            elif name == "embedding":
                first, second = operand(node, 0, "input", "weight"), operand(node, 1, "weight", "indices")
                for table, index in ((second, first), (first, second)):
                    source = resolve(table, self.inputs.parameters)
                    if source.parameter is not None and source.computed is None and not source.flipped:
                        self.embeddings[node] = Embedding(source.parameter, index)
                        break

    def _shape(self, name: str, weight: Operand) -> tuple[int, int] | None:
        if weight.parameter is None or weight.computed is not None:
            return None
        shape = self.inputs.parameters[weight.parameter].shape
        if len(shape) != 2:
            return None
        return (shape[1], shape[0]) if self._transposed(name, weight) else (shape[0], shape[1])

    @staticmethod
    def _transposed(name: str, weight: Operand) -> bool:
        return weight.flipped != (name != "linear")

    def weights(self) -> list[Node]:
        """Parameters of two dimensions and more, in graph order."""
        return [n for n in self.nodes if n in self.inputs.parameters and self.inputs.parameters[n].dim() >= 2]

    def _name(self, node: Node, weight: Node | None) -> str:
        """The module's name: the parameter's without ".weight"; where the weight has several users and the node was traced
        in another module than the parameter is named after (tied weights), that module's."""
        traced = module_name(node)
        parameter = self.qualified.get(weight) if weight is not None else None
        if weight is None or parameter is None:
            return traced or node.name
        own = parameter.removesuffix(".weight")
        elsewhere = traced and f".{traced}." not in f".{own}."
        return traced if elsewhere and len(weight.users) > 1 else own

    # -- weights ------------------------------------------------------------------------------------------------------

    def sites_of(self, weight: Node, roles: Roles) -> list[tuple[Node, Site]]:
        """Sites of one parameter with the nodes they stand at: one for each operator and module that uses it."""
        uses = self._uses(weight, weight, None)
        tensor = self.inputs.parameters[weight]
        bad = next((u for u in uses if u.problem is not None), None)
        groups: dict[tuple[str, str, bool], list[_Use]] = defaultdict(list)
        for use in uses:
            groups[self._name(use.node, weight), use.operator, use.transposed].append(use)
        if not uses:
            own = (self.qualified[weight] or weight.name).removesuffix(".weight")
            return [(weight, Site(own, "other", frozenset(), weight.name, weight.name, tuple(tensor.shape), tensor.dtype,
                                  False, "nothing in this graph uses the weight", self.qualified[weight]))]  # fmt: skip
        found = []
        for (name, operator, transposed), group in groups.items():
            shape = tuple(tensor.shape)
            problem = next((u.problem for u in group if u.problem), None)
            if problem is None and bad is not None:
                problem = f"the weight is also used by {bad.node.name} ({op_name(bad.node) or bad.node.op}): {bad.problem}"
            found.append((group[0].node, Site(
                name, operator, frozenset().union(*(roles.get(u.node, set()) for u in group)), group[0].node.name,
                weight.name, shape[::-1] if transposed and len(shape) == 2 else shape, tensor.dtype, transposed, problem,
                self.qualified[weight])))  # fmt: skip
        return self._distinct(found)

    @staticmethod
    def _distinct(found: list[tuple[Node, Site]]) -> list[tuple[Node, Site]]:
        """A weight used both as [N, K] and as [K, N] by one module can be packed for neither."""
        if len({site.transposed for _, site in found if site.is_linear}) < 2:
            return found
        reason = "the weight is used both as it is and transposed"
        return [(n, replace(s, unsupported=s.unsupported or reason) if s.is_linear else s) for n, s in found]

    def _uses(self, value: Node, weight: Node, computed: Node | None) -> list[_Use]:
        """Uses of ``weight`` that go through ``value`` (itself, its transpose, or what ``computed`` makes of it)."""
        uses: list[_Use] = []
        for user in value.users:
            name = op_name(user)
            if name in SHAPE_QUERIES:
                continue
            if folds(user) is not None and len(user.all_input_nodes) == 1 and user.users:
                uses += self._uses(user, weight, computed)
            else:
                uses.append(self._use(user, value, weight))
        return uses

    def _use(self, node: Node, value: Node, weight: Node) -> _Use:
        name, dims = op_name(node), self.inputs.parameters[weight].dim()
        if node in self.embeddings and self.embeddings[node].table is weight:
            renormalized = operand(node, 1, "weight") is value and operand(node, 3, "max_norm") is not None
            return _Use(node, "embedding", False, "max_norm rewrites the table at every call" if renormalized else None)
        source = self.operands.get(node)
        right = operand(node, *WEIGHT_OPERANDS[name][1]) if name in WEIGHT_OPERANDS else None
        if source is not None and source.parameter is weight and right is value:
            transposed = self._transposed(name, source)
            return _Use(node, _site_operator(node), transposed, self._linear_problem(node, name, value, dims))
        return self._unsupported(node, name, weight)

    def _unsupported(self, node: Node, name: str, weight: Node) -> _Use:
        """The use by an operator that takes no packed weight, with the operator of the linear it is for, if any."""
        if name in WEIGHT_OPERANDS:
            return _Use(node, "matmul", False, f"{name} ({node.name}) has the weight elsewhere than as its right factor")
        for linear, source in self.operands.items():
            if source.parameter is weight and node in set(ancestors([source.computed], lambda n: n is weight)):
                reason = f"{linear.name} multiplies by {source.computed} ({name} of the weight), not by the weight"
                return _Use(node, _site_operator(linear), False, reason)
        if node.op == "output":
            return _Use(node, "other", False, "the weight is an output of the graph")
        reason = f"{name or node.op} ({node.name}) takes no packed weight"
        multiplies = name in MULTIPLIES or "grouped_mm" in name
        return _Use(node, "matmul" if multiplies else "other", False, reason)

    @staticmethod
    def _linear_problem(node: Node, name: str, value: Node, dims: int) -> str | None:
        if dims != 2:
            return f"the weight has {dims} dimensions; a linear layer's has 2"
        if list(node.args).count(value) > 1:
            return f"{name} multiplies the weight by itself"
        scales = [operand(node, i, w) for i, w in ((3, "beta"), (4, "alpha"))] if name == "addmm" else []
        if any(s not in (None, 1) for s in scales):
            return f"addmm with beta={scales[0]}, alpha={scales[1]}; only 1 and 1 are a linear layer"
        return None

    # -- the rest -----------------------------------------------------------------------------------------------------

    def sites_without_weight(self, attentions: list[Attention]) -> list[tuple[Node, Site]]:
        """Linears whose weight is no parameter, and products of activations outside written-out attention."""
        inside: set[Node] = set()
        for attention in attentions:
            if not attention.fused:
                stop = {attention.q, attention.k, attention.v}
                inside |= set(ancestors([attention.node], lambda n, stop=stop: n in stop))  # type: ignore[misc]
        found = []
        for node in self.nodes:
            name, source = op_name(node), self.operands.get(node)
            if source is not None and source.parameter is not None:
                continue
            if node in self.linears:
                weight = operand(node, *WEIGHT_OPERANDS[name][1])
                maker = f"{weight.name} ({op_name(weight) or weight.op})" if isinstance(weight, Node) else repr(weight)
                reason = f"the weight is {maker}, not a parameter"
            elif name in PRODUCTS and node not in inside and not self._holds_weight(node):
                reason = "both factors are activations"
            else:
                continue
            value = example(node)
            dtype = value.dtype if isinstance(value, torch.Tensor) else torch.float32
            found.append((node, Site(module_name(node) or node.name, _site_operator(node), frozenset(), node.name, None,
                                     sizes(value), dtype, False, reason)))  # fmt: skip
        return found

    def _holds_weight(self, node: Node) -> bool:
        return any(resolve(n, self.inputs.parameters).parameter is not None for n in node.all_input_nodes)


def _site_operator(node: Node) -> str:
    name = op_name(node)
    return name if name in ("linear", "addmm") else "matmul"


def _attention_site(attention: Attention, graph: Graph, attentions: list[Attention]) -> Site:
    """Named by the module that holds the projections of q, k and v, or else by the node's trace."""
    sources = set().union(*projections(attention, graph, attentions))
    owners = [graph.linears[n].name.split(".")[:-1] for n in sources]
    common = os.path.commonprefix(owners) if owners else []
    name = ".".join(common) or module_name(attention.node) or attention.node.name
    value = example(attention.q) if isinstance(attention.q, Node) else example(attention.node)
    dtype = value.dtype if isinstance(value, torch.Tensor) else torch.float32
    return Site(name, "attention", frozenset(), attention.node.name, None, sizes(value), dtype)


def sizes(value: object) -> tuple[int, ...]:
    """A tensor's shape with −1 for dynamic dimensions; empty for anything else."""
    return tuple(d if isinstance(d, int) else -1 for d in value.shape) if isinstance(value, torch.Tensor) else ()


def module_name(node: Node) -> str:
    """Qualified name of the innermost module that the node was traced in, relative to the traced frame's root; empty
    when the trace tells none. Dynamo spells it ``L['self'].model.layers[0]…``, export ``model.layers.0…``."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    path = re.sub(r"^[LG]\['[^']*'\]\.?", "", path)
    path = re.sub(r"\.slice\([^)]*\)", "", path)
    path = re.sub(r"\._modules\['([^']*)'\]|\[['\"]?([^\]'\"]*)['\"]?\]", lambda m: "." + (m[1] or m[2]), path)
    return path.strip(".")


def _attribute_name(node: Node) -> str | None:
    return str(node.target) if node.op == "get_attr" else None
