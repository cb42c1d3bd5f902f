"""How a graph uses a stack of matrices ``[E, N, K]`` or ``[E, K, N]``: as a layer's experts, or in a way that rules it out.

Experts are multiplied by in groups of rows (``grouped_mm``), all at once (``bmm``, ``matmul``), some of them chosen by
numbers (``bmm`` over ``w[ids]``), or one by one (``linear(x, w[i])``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from qcompile.einsum import terms

from .costs import hint
from .trace import example, folds, op_name, operand
from .vocabulary import GROUPED, SHAPE_QUERIES, WEIGHT_OPERANDS

ALL, CHOSEN, ONE = "experts", "chosen experts", "expert"
"""What stands at a node: the stack, some of its matrices, or one."""


@dataclass(frozen=True)
class Product:
    """``node`` multiplies ``x`` by experts of a stack that is stored [E, K, N] if ``transposed``; or uses them otherwise, for
    which ``problem`` says why no packed ones can be."""

    node: Node
    x: object = None
    transposed: bool = False
    problem: str | None = None

    def flops(self, k: int) -> int:
        """Of all rows of the result, each a product by N×K."""
        result = example(self.node)
        if not isinstance(result, torch.Tensor):
            return 0
        numbers = 1
        for size in result.shape:
            numbers *= hint(size)
        return 2 * numbers * k


def products(stack: Node) -> list[Product]:
    """Every use of the parameter ``stack`` of three dimensions; none if no use multiplies by it as by experts."""
    found = list(_uses(stack, ALL, flipped=False))
    return found if any(p.problem is None for p in found) else []


def _uses(value: Node, what: str, flipped: bool) -> Iterator[Product]:
    """Of ``value``, which is ``what`` of the stack, its matrices turned if ``flipped``."""
    for user in value.users:
        if op_name(user) in SHAPE_QUERIES:
            continue
        if (turned := _turns(user, what)) is not None:
            yield from _uses(user, what, flipped ^ turned)
        elif (chosen := _chooses(user, value, what)) is not None:
            yield from _uses(user, chosen, flipped)
        elif op_name(user) == "unbind" and what == ALL and operand(user, 1, "dim") in (None, 0):
            for each in user.users:
                yield from _uses(each, ONE, flipped)
        else:
            yield _product(user, value, what, flipped)


def _turns(node: Node, what: str) -> bool | None:
    """True for a transpose of every matrix, False for ``detach``, None for other operators."""
    name = op_name(node)
    if what == ONE or name in ("detach", "mT"):
        return folds(node)
    if name == "transpose":
        dims = {_positive(operand(node, 1, "dim0", "axis0")), _positive(operand(node, 2, "dim1", "axis1"))}
        return True if dims == {1, 2} else None
    if name == "permute":
        order = node.args[1:] if len(node.args) > 2 else operand(node, 1, "dims")
        return True if isinstance(order, (list, tuple)) and [_positive(d) for d in order] == [0, 2, 1] else None
    return None


def _positive(dim: object) -> object:
    return dim % 3 if isinstance(dim, int) else dim


def _chooses(node: Node, value: Node, what: str) -> str | None:
    """What ``node`` takes from the stack ``value`` by a number, by a tensor of numbers or by a slice; None: nothing such."""
    name = op_name(node)
    if what != ALL or operand(node, 0, "input", "self") is not value:
        return None
    if name == "getitem":
        at: object = node.args[1]
    elif name in ("select", "index_select") and operand(node, 1, "dim") == 0:
        at = operand(node, 2, "index")
    elif name == "index":
        indices = operand(node, 1, "indices")
        at = indices[0] if isinstance(indices, (list, tuple)) and len(indices) == 1 else None
    else:
        return None
    if isinstance(at, slice):
        return ALL if at.step in (None, 1) else None
    given = example(at) if isinstance(at, Node) else at
    if isinstance(given, (int, torch.SymInt)) and not isinstance(given, bool):
        return ONE
    if isinstance(given, torch.Tensor) and given.dtype in (torch.int32, torch.int64) and given.dim() < 2:
        return CHOSEN if given.dim() else ONE
    return None


def _product(node: Node, value: Node, what: str, flipped: bool) -> Product:
    """The use of ``value`` by ``node``, in which nothing is chosen or turned any more."""
    name = op_name(node)
    if what == ONE and name in ("linear", "mm", "matmul"):
        (at, *words), (w, *w_words) = WEIGHT_OPERANDS[name]
        if operand(node, w, *w_words) is value and operand(node, at, *words) is not value:
            return Product(node, operand(node, at, *words), flipped != (name != "linear"))
    if what == ALL and name in GROUPED and operand(node, 1, "mat2", "mat_b", "weight") is value:
        rows = operand(node, 0, "input", "mat_a")
        if operand(node, 3, "bias") is None and _rank(rows) == 2:
            return Product(node, rows, not flipped)
    if what in (ALL, CHOSEN) and name in ("bmm", "matmul"):
        left, right = operand(node, 0, "input"), operand(node, 1, "mat2", "other")
        x = left if right is value else right
        if x is not value and (_meets(x, value) if name == "matmul" else _rank(x) == 3):
            return Product(node, x, flipped != (right is value))
    if what in (ALL, CHOSEN) and name == "einsum":
        given = operand(node, 1, "operands")
        factors = list(given) if isinstance(given, (list, tuple)) else list(node.args[1:])
        found = terms(node.args[0], factors.index(value)) if len(factors) == 2 and factors.count(value) == 1 else None
        if found is not None:
            return Product(node, factors[1 - factors.index(value)], flipped == found.turned)
    return Product(node, problem=f"{name or node.op} ({node.name}) takes no packed {what}")


def _meets(x: object, value: Node) -> bool:
    """Whether ``x`` is one matrix for all that ``value`` holds, or one for each."""
    given, held = (example(n) if isinstance(n, Node) else None for n in (x, value))
    if not (isinstance(given, torch.Tensor) and isinstance(held, torch.Tensor) and given.dim() == 3):
        return _rank(x) == 2
    count, others = given.shape[0], held.shape[0]
    if isinstance(count, int) and isinstance(others, int):
        return count in (1, others)
    return isinstance(count, torch.SymInt) and isinstance(others, torch.SymInt) and count.node.expr == others.node.expr


def _rank(value: object) -> int:
    tensor = example(value) if isinstance(value, Node) else None
    return tensor.dim() if isinstance(tensor, torch.Tensor) else 0
