"""Runs one graph node by node and stops at every linear layer whose weight is yet to be packed."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.fx import Interpreter, Node

from qcompile.formats import Scheme

from .trace import op_name, operand, resolve
from .vocabulary import WEIGHT_OPERANDS


@dataclass(frozen=True)
class Weight:
    """A parameter to pack: its qualified ``name``, its ``layer``, for messages, the ``scheme``, whether it is stored
    ``[K, N]``, and its float ``value``."""

    name: str
    layer: str
    scheme: Scheme
    transposed: bool
    value: torch.Tensor

    @property
    def matrix(self) -> torch.Tensor:
        """``[N, K]``"""
        value = self.value.detach()
        return value.t() if self.transposed else value


@dataclass(frozen=True)
class Stop:
    """A walk waits before a linear layer: ``weights`` are to be packed, all of layers that take ``x`` ``[..., K]``."""

    weights: tuple[Weight, ...]
    x: torch.Tensor


@dataclass(frozen=True)
class Product:
    """A linear-like node: the node ``x`` of its inputs, that of its right factor, the placeholder of the parameter which that
    is or is the transpose of, and whether the right factor is ``[N, K]``."""

    x: Node
    right: Node
    parameter: Node
    is_linear: bool


def products(gm: torch.fx.GraphModule) -> dict[Node, Product]:
    """Linear-like nodes by a placeholder as it is, or transposed, in graph order."""
    placeholders = dict.fromkeys(gm.graph.find_nodes(op="placeholder"))
    found = {}
    for node in gm.graph.nodes:
        name = op_name(node)
        if name not in WEIGHT_OPERANDS:
            continue
        (x, *x_words), (w, *w_words) = WEIGHT_OPERANDS[name]
        inputs, right = operand(node, x, *x_words), operand(node, w, *w_words)
        source = resolve(right, placeholders)  # type: ignore[arg-type]  # only its keys are looked at
        if source.parameter is not None and source.computed is None and isinstance(inputs, Node):
            found[node] = Product(inputs, right, source.parameter, name == "linear")  # type: ignore[arg-type]
    return found


class Packer(Protocol):
    """Who packs the weights that walks stop at."""

    def wanted(self, parameter: nn.Parameter) -> Weight | None:
        """What is to be done with a parameter; None: nothing."""

    def is_packed(self, weight: Weight) -> bool: ...

    def decoded(self, weight: Weight) -> torch.Tensor:
        """The ``[N, K]`` weight that a packed one stands for, in the dtype of the float one."""


class Walk(Interpreter):
    """One call of ``gm``, whose ``products`` are given.

    A packed weight takes the place of the float one at every product, so that later layers see the errors of earlier ones, or,
    in a walk ``in_float``, nowhere. Values are let go at their last use.
    """

    def __init__(
        self, gm: torch.fx.GraphModule, products: Mapping[Node, Product], packer: Packer, in_float: bool = False
    ) -> None:
        super().__init__(gm)
        self._products, self._packer, self._in_float = products, packer, in_float

    def stops(self, inputs: Sequence[Any]) -> Generator[Stop, None, Any]:
        """Runs on ``inputs``, which are copied where the graph may overwrite them, and returns the graph's result. The weights of
        each stop must be packed before it goes on."""
        self.args_iter = iter([_own(v) for v in inputs])
        for node in self.graph.nodes:
            if node in self._products:
                yield from self._packs(node)
            self.env[node] = self.run_node(node)
            if node.op == "output":
                return self.env.pop(node)
            for dead in self.user_to_last_uses.get(node, ()):
                del self.env[dead]

    def _packs(self, node: Node) -> Generator[Stop, None, None]:
        """Waits until the weight of ``node`` is packed, and puts it in the place of the float one."""
        product = self._products[node]
        weight = self._weight(product)
        if weight is None:
            return
        while not self._packer.is_packed(weight):
            yield Stop(self._of_one_input(node, product.x), self.env[product.x])
        if self._in_float:
            return
        decoded = self._packer.decoded(weight)
        self.env[product.right] = decoded if product.is_linear else decoded.t()

    def _weight(self, product: Product) -> Weight | None:
        value = self.env.get(product.parameter)
        return self._packer.wanted(value) if isinstance(value, nn.Parameter) else None

    def _of_one_input(self, node: Node, x: Node) -> tuple[Weight, ...]:
        """Weights, not packed yet, of ``node`` and of those after it that take the same ``x``."""
        here = (self._weight(p) for n, p in self._products.items() if p.x is x and not n < node)
        return tuple({w.name: w for w in here if w is not None and not self._packer.is_packed(w)}.values())


def _own(value: Any) -> Any:
    """A graph input that the walk may overwrite: parameters as they are, symbolic numbers as those of this call."""
    if isinstance(value, torch.Tensor):
        return value if isinstance(value, nn.Parameter) else value.clone()
    symbolic = isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))
    return value.node.hint if symbolic else value
