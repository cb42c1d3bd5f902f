"""Reading torch-IR and aten graphs alike: what a node computes, where operands come from, walks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from .vocabulary import SHAPE_QUERIES, SLICES

_ALIASES = {
    "truediv": "div",
    "true_divide": "div",
    "multiply": "mul",
    "iadd": "add",
    "imul": "mul",
    "isub": "sub",
    "itruediv": "div",
    "imatmul": "matmul",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "_softmax": "softmax",
    "_safe_softmax": "softmax",
    "_unsafe_view": "view",
    "numpy_T": "T",
    "prim from_local": "from_local",  # DTensors' methods, as PyTorch 2.11 traces them
    "prim_redistribute": "redistribute",
    "prim_to_local": "to_local",
}


def op_name(node: Node) -> str:
    """The operator's plain name, the same for a function, a method, a Python operator, an aten overload and
    in place: ``torch.matmul``, ``x.matmul``, ``x @ y``, ``aten.matmul.default`` are all ``"matmul"``; ``x.T``
    is ``"T"``.

    The empty string for nodes that compute nothing (placeholders, attributes, output).
    """
    if node.op not in ("call_function", "call_method"):
        return ""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return _plain(target._schema.name)
    name = target if isinstance(target, str) else getattr(target, "__name__", "") or str(target)
    if name == "getattr" and len(node.args) > 1:
        return str(node.args[1])
    return _plain(name)


@functools.lru_cache(maxsize=4096)
def _plain(name: str) -> str:
    """An operator's name without its namespace, and without what marks it as Python's own or as in place."""
    name = name.split("::")[-1]
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
    if name.endswith("_"):
        name = name.rstrip("_")
    return _ALIASES.get(name, name)


def writes_in_place(node: Node) -> bool:
    """Whether the node overwrites its first operand (``copy_``, ``index_copy_``, ``x[i] = y``)."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name == "setitem" or (name.endswith("_") and not name.startswith("_"))


def operand(node: Node, position: int, *keywords: str) -> object:
    """The argument at ``position``, or under one of its ``keywords``; None when it is absent."""
    if position < len(node.args):
        return node.args[position]
    return next((node.kwargs[k] for k in keywords if k in node.kwargs), None)


def example(node: Node) -> object:
    """The (fake) value that Dynamo or export recorded for the node; None when there is none."""
    return node.meta.get("example_value", node.meta.get("val"))


def is_size(node: Node) -> bool:
    """Whether the node is a tensor's size or arithmetic of sizes: a way along it carries no values."""
    value = example(node)
    if isinstance(value, torch.Tensor):
        return False
    scalar = isinstance(value, (int, float, torch.Size, torch.SymInt, torch.SymFloat, torch.SymBool))
    return scalar or op_name(node) in SHAPE_QUERIES


def data_inputs(node: Node) -> list[Node]:
    """The nodes whose values the node takes; sizes left out."""
    return [n for n in node.all_input_nodes if not is_size(n)]


def sizes(value: object) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape, with −1 for dynamic dimensions, and dtype of an example; of no tensor: empty and float32."""
    if not isinstance(value, torch.Tensor):
        return (), torch.float32
    return tuple(d if isinstance(d, int) else -1 for d in value.shape), value.dtype


@dataclass(frozen=True)
class Inputs:
    """What the graph's leaves hold: ``parameters`` by node (of any rank), and other tensors by node."""

    parameters: dict[Node, torch.Tensor]
    activations: dict[Node, torch.Tensor]

    @staticmethod
    def of(
        gm: torch.fx.GraphModule,
        example_inputs: Iterable[object],
        is_parameter: Callable[[torch.Tensor], bool],
    ) -> Inputs:
        """Placeholders take their tensors from ``example_inputs`` in order; attributes from ``gm`` itself."""
        parameters: dict[Node, torch.Tensor] = {}
        activations: dict[Node, torch.Tensor] = {}
        values = iter(example_inputs)
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                value = next(values, example(node))
            elif node.op == "get_attr":
                value = _attribute(gm, str(node.target))
            else:
                continue
            if isinstance(value, torch.Tensor):
                kept = parameters if is_parameter(value) else activations
                kept[node] = value
        return Inputs(parameters, activations)


def _attribute(root: object, path: str) -> object:
    for part in path.split("."):
        root = getattr(root, part)
    return root


@dataclass(frozen=True)
class Operand:
    """Where a weight operand comes from: the ``parameter`` node (None: an activation), ``flipped`` when it is
    the parameter's transpose, and ``computed`` by the node that makes it more than that (a cast, a slice,
    arithmetic)."""

    parameter: Node | None
    flipped: bool
    computed: Node | None


def resolve(value: object, parameters: dict[Node, torch.Tensor]) -> Operand:
    """Follows a weight operand back to its parameter, folding transposes and ``detach``."""
    flipped, computed = False, None
    node = value
    while isinstance(node, Node):
        if node in parameters:
            return Operand(node, flipped, computed)
        turn = folds(node)
        if turn is None and computed is None:
            computed = node
        flipped ^= bool(turn)
        sources = node.all_input_nodes
        if not sources or (turn is None and len(sources) > 1):
            break
        node = sources[0]
    return Operand(None, flipped, computed)


def folds(node: Node) -> bool | None:
    """True for a transpose of both dimensions of a matrix, False for ``detach`` and for a DTensor's own part, None for other
    operators."""
    name = op_name(node)
    if name in ("t", "T", "mT"):
        return True
    if name in ("detach", "to_local"):
        return False
    if name == "transpose":
        dims = {operand(node, 1, "dim0", "axis0"), operand(node, 2, "dim1", "axis1")}
        return True if dims in ({0, 1}, {-1, -2}, {0, -1}, {-2, 1}) else None
    if name == "permute":
        order = node.args[1:] if len(node.args) > 2 else operand(node, 1, "dims")
        return True if order in ([1, 0], (1, 0), (-1, 0), (1, -2), (-1, -2)) else None
    return None


def ancestors(starts: Iterable[object], stop: Callable[[Node], bool]) -> Iterator[Node]:
    """Nodes that the ``starts`` are computed from, themselves included; nodes that ``stop`` holds for are
    yielded but not entered. A buffer (made or given without inputs) is entered through what is copied into
    it, as caches are."""
    seen: set[tuple[Node, Node | None]] = set()
    yielded: set[Node] = set()
    queue: list[tuple[Node, Node | None]] = [(n, None) for n in starts if isinstance(n, Node)]
    while queue:
        node, reader = queue.pop()
        inputs = data_inputs(node)
        key = (node, None if inputs else reader)
        if key in seen:
            continue
        seen.add(key)
        if node not in yielded:
            yield node
        yielded.add(node)
        if not stop(node):
            queue += [(n, node) for n in _sources(node, inputs, reader)]


def _sources(node: Node, inputs: list[Node], reader: Node | None) -> list[Node]:
    if not inputs:
        return _copied_into(node, reader)
    root = node
    while op_name(root) in SLICES and (taken := data_inputs(root)):
        root = taken[0]
    if root is not node and not data_inputs(root) and (copied := _copied_into(node, None)):
        return copied
    return inputs


def _copied_into(buffer: Node, reader: Node | None) -> list[Node]:
    """Tensors copied into ``buffer`` or a slice of it, other items than ``reader`` takes left out."""
    found: list[Node] = []
    views = [buffer]
    for view in views:
        for user in view.users:
            if user.all_input_nodes[0] is not view or (view is buffer and _other_item(user, reader)):
                continue
            if writes_in_place(user):
                found += data_inputs(user)[1:]
            elif op_name(user) in SLICES:
                views.append(user)
    return found


def _other_item(view: Node, reader: Node | None) -> bool:
    """Whether both take one item of a stacked buffer, by constant indices that differ."""
    if reader is None or op_name(view) != "getitem" or op_name(reader) != "getitem":
        return False
    a, b = view.args[1], reader.args[1]
    return isinstance(a, int) and isinstance(b, int) and a != b


def descendants(start: Node, stop: Callable[[Node], bool]) -> Iterator[Node]:
    """Nodes with values from ``start``, without it; those that ``stop`` holds for are not entered."""
    seen: set[Node] = set()
    queue = list(start.users)
    while queue:
        node = queue.pop()
        if node in seen or is_size(node):
            continue
        seen.add(node)
        yield node
        if not stop(node):
            queue += list(node.users)
