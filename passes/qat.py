"""Quantization-aware training: fake quantization before each use of a trained weight, packed kernels where grad is off."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx import Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from qcompile import qat
from qcompile.errors import PolicyError
from qcompile.formats import register_scheme
from qcompile.owners import Owners
from qcompile.plan import Decision, Record, Site

from .checkpointing import bodies, inline
from .trace import example, op_name, operand
from .vocabulary import MULTI_HEAD, SHAPE_QUERIES, WEIGHT_OPERANDS
from .walk import products

KERNEL = "fake-quantized in training, packed at evaluation"

INSIDE = f"{MULTI_HEAD} multiplies inside, where inputs cannot be fake-quantized; use a policy without activations for it"

TRAINED = (qat.trained_linear, qat.trained_rows)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What stands for a weight: the ``scheme`` key, whether it is stored ``[K, N]``, and the type of its inputs."""

    scheme: str
    transposed: bool
    activations: str | None


class Training:
    """The weights of one graph that are trained under ``options={"qat": True}``; none where that is off."""

    def __init__(self, gm: fx.GraphModule, flat: fx.GraphModule, on: bool) -> None:
        self.gm, self.flat, self.on = gm, flat, on
        self._decisions: dict[str | None, Decision] = {}
        self._inside = {n.name for node in self.flat.graph.nodes if op_name(node) == MULTI_HEAD for n in node.all_input_nodes}

    def real(self, inputs: Sequence[Any], owners: Owners) -> Sequence[Any]:
        """``inputs`` with the parameters that fake tensors among them stand for, as in graphs that ``DDPOptimizer`` has split."""
        fakes = [v for v in inputs if isinstance(v, torch._subclasses.FakeTensor)]
        if not self.on or not fakes:
            return inputs
        converter = fakes[0].fake_mode.fake_tensor_converter.meta_converter
        alive = (slots[0].get() for slots in owners.slots.values())
        known = [p for p in alive if p is not None and p in converter.describer.lookup_tensor]
        stands_for = {id(converter.tensor_memo.get(converter.describer.lookup_tensor[p])): p for p in known if p.requires_grad}
        return [stands_for.get(id(v), v) for v in inputs]

    def takes(self, parameter: torch.Tensor) -> bool:
        """Whether ``parameter`` is trained, and so never packed for good."""
        return self.on and parameter.requires_grad

    def why_not(self, parameter: torch.Tensor) -> str | None:
        """Why a trained weight stays as it is whatever the policy says; None: it need not."""
        if parameter.dim() > 2:
            return "a stack of experts is not fake-quantized; freeze it, and it is packed"
        if not is_traceable_wrapper_subclass(parameter):
            return None
        return f"the weight is a {type(parameter).__name__}; only plain tensors are fake-quantized"

    def decided(self, decision: Decision) -> Record:
        """Takes down what the policy says of a trained weight's site; its record."""
        site = decision.site
        if decision.scheme is not None and decision.scheme.activations and site.weight in self._inside and site.is_linear:
            decision = dataclasses.replace(decision, scheme=None, reason=INSIDE)
        if site.parameter not in self._decisions or site.is_linear:
            self._decisions[site.parameter] = decision
        return Record.of(decision, KERNEL if decision.scheme is not None else None)

    def check_siblings(self, sites: Iterable[Site], renamed: Iterable[Site]) -> None:
        """Layers that run one graph must be trained alike: nothing in their weights tells them apart.

        Raises :class:`~qcompile.errors.PolicyError`.
        """
        for here, there in zip(sites, renamed, strict=True):
            one, other = self._decisions.get(here.parameter), self._decisions.get(there.parameter)
            if one is not None and other is not None and one.scheme != other.scheme:
                said = [d.scheme.label if d.scheme is not None else "float" for d in (one, other)]
                raise PolicyError(f"qat: {here.name!r} is to be {said[0]} and {there.name!r} {said[1]}, but layers that are "
                                  "compiled one by one run one graph. Compile the whole model, or give both one "
                                  "value")  # fmt: skip

    @property
    def weights(self) -> dict[str, Trained]:
        """What stands for each weight of the graph that the policy means, by placeholder."""
        found = ((d.site, d.scheme) for d in self._decisions.values() if d.site.node)
        return {site.weight: Trained(register_scheme(scheme), site.transposed, scheme.activations)
                for site, scheme in found if scheme is not None and site.weight is not None}  # fmt: skip

    def lower(self) -> int:
        """Rewrites the graph; returns for how many weights. Under grad, fake quantization comes before each use; else each
        linear layer and embedding runs on planes packed from the weight as it then is."""
        named = self.weights
        if not named:
            return 0
        qat.watch()
        if not torch.is_grad_enabled():
            inline(self.gm)
        weights = {n: named[n.name] for n in self.gm.graph.find_nodes(op="placeholder") if n.name in named}
        if torch.is_grad_enabled():
            _fake_inputs(self.gm, weights)
        else:
            _run_packed(self.gm, weights)
        for node, trained in weights.items():
            _fake_weight(node, trained)
        self.gm.recompile()
        return len(weights)


def _fake_inputs(gm: fx.GraphModule, weights: Mapping[Node, Trained]) -> None:
    """Fake-quantizes, per token, the inputs of layers whose scheme says so, each input once, also in bodies of checkpoints."""
    made: dict[tuple[Node, str], Node] = {}
    for node, product in products(gm).items():
        trained = weights.get(product.parameter)
        if trained is None or trained.activations is None:
            continue
        if (key := (product.x, trained.activations)) not in made:
            with gm.graph.inserting_before(node):
                made[key] = _placed(gm.graph.call_function(qat.fake_activations, key), node, product.x)
        _set_input(node, made[key])
    for call, body in bodies(gm):
        own = body.graph.find_nodes(op="placeholder")
        _fake_inputs(body, {p: weights[a] for p, a in zip(own, call.args[1:], strict=True) if a in weights})  # type: ignore[index]
        body.recompile()


def _run_packed(gm: fx.GraphModule, weights: Mapping[Node, Trained]) -> None:
    """Linear layers and embeddings over planes of their weights."""
    for node, product in products(gm).items():
        if (trained := weights.get(product.parameter)) is not None:
            _exchange(node, _linear(node, product.parameter, trained))
    for weight, trained in weights.items():
        for node in [u for u in weight.users if op_name(u) == "embedding" and not trained.transposed]:
            with gm.graph.inserting_before(node):
                indices: Any = operand(node, 0, "input")
                _exchange(node, gm.graph.call_function(qat.trained_rows, (weight, indices, trained.scheme)))


def _set_input(node: Node, x: Node) -> None:
    """Has the product ``node`` multiply ``x``; what ``addmm`` adds may be the same node as its input, and stays."""
    (position, *words), _ = WEIGHT_OPERANDS[op_name(node)]
    if position < len(node.args):
        node.update_arg(position, x)
    else:
        node.update_kwarg(next(w for w in words if w in node.kwargs), x)


def _linear(node: Node, weight: Node, trained: Trained) -> Node:
    """The node of a linear layer over packed planes, and the addition of what ``addmm`` adds, where that is no bias."""
    added: Any = operand(node, *{"linear": (2, "bias"), "addmm": (0, "input")}.get(op_name(node), (9, "")))
    tensor = example(added) if isinstance(added, Node) else None
    is_bias = isinstance(tensor, torch.Tensor) and tensor.dim() == 1
    (position, *words), _ = WEIGHT_OPERANDS[op_name(node)]
    x: Any = operand(node, position, *words)
    arguments = (x, weight, added if is_bias else None, trained.scheme, trained.transposed)
    with node.graph.inserting_before(node):
        made = node.graph.call_function(qat.trained_linear, arguments)
        return made if added is None or is_bias else node.graph.call_function(torch.add, (made, added))


def _exchange(node: Node, new: Node) -> None:
    """Puts ``new`` in the place of ``node``, and drops the transposes that only it needed."""
    inputs = node.all_input_nodes
    node.replace_all_uses_with(new)
    _placed(new, node, node)
    node.graph.erase_node(node)
    for each in inputs:
        while not each.users and each.op in ("call_function", "call_method"):
            above = each.all_input_nodes[0]
            each.graph.erase_node(each)
            each = above


def _fake_weight(weight: Node, trained: Trained) -> None:
    """Fake quantization of ``weight``, once, for all nodes that still read it."""
    readers = [u for u in weight.users if op_name(u) not in SHAPE_QUERIES and u.target not in TRAINED]
    if not readers:
        return
    first = next(n for n in weight.graph.nodes if n.op != "placeholder")
    with weight.graph.inserting_before(first):
        both = weight.graph.call_function(qat.fake_weight, (weight, trained.scheme, trained.transposed))
        values = weight.graph.call_function(operator.getitem, (both, 0))
    _placed(both, readers[0], None)
    _placed(values, readers[0], weight)
    for reader in readers:
        reader.replace_input_with(weight, values)


def _placed(new: Node, at: Node, like: Node | None) -> Node:
    """``new`` with the place in the model's code of the node ``at``, and the example value of ``like``."""
    new.meta = {key: value for key, value in at.meta.items() if key != "example_value"}
    if like is not None and "example_value" in like.meta:
        new.meta["example_value"] = like.meta["example_value"]
    return new
