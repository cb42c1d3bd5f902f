"""Where two configurations part: the first node of a model's graphs whose values differ."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from .api import quantize_
from .errors import CompareError
from .names import module_name
from .options import Options
from .owners import unwrapped
from .passes.costs import source
from .passes.pipeline import Compilation
from .passes.trace import op_name
from .tracing import call_through

Key = tuple[int, str]
"""Number of the graph in the order of execution, and name of the node."""


@dataclass(frozen=True)
class Divergence:
    """The first ``node`` (of ``graph``, counted from 0) whose ``error`` is above the tolerance: its operator, the ``layer``
    that it was traced in, ``source`` as "file:line", the shape of its value, and how many nodes before it ``agreed``.

    ``error`` is ‖a − b‖ / ‖a‖ for floating values, the part of the entries that differ for others.
    """

    graph: int
    node: str
    operator: str
    layer: str
    source: str
    shape: tuple[int, ...]
    error: float
    agreed: int

    def __str__(self) -> str:
        where = f" in {self.layer}" if self.layer else ""
        line = f"\n  {self.source}" if self.source else ""
        return (f"{self.operator} ({self.node}){where} is the first of graph {self.graph} to differ: {self.error:.2e} of "
                f"{list(self.shape)}, after {self.agreed} nodes that agree{line}")  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def bisect(
    model: nn.Module, *args: Any, a: Any = "float", b: Any = None, tolerance: float = 0.0, **kwargs: Any
) -> Divergence | None:
    """The first node at which ``model(*args, **kwargs)`` under policy ``a`` and under policy ``b`` differ by more than
    ``tolerance``; None if none does.

    Policies are as ``options["policy"]`` takes them. Copies of the float ``model`` are packed and their graphs run node by
    node, in eager kernels; all values of ``a`` are kept meanwhile. A node that a policy exchanged (attention in low precision)
    is not compared itself, but what it gives is. Raises :class:`~qcompile.errors.CompareError` when the two runs do not
    have the same graphs.
    """
    kept: dict[Key, Any] = {}
    for key, node, value in _values(model, a, args, kwargs):
        kept[key] = (op_name(node), value)
    agreed = 0
    for key, node, value in _values(model, b, args, kwargs):
        if key not in kept:
            continue
        name, expected = kept[key]
        if name != op_name(node):
            raise CompareError(f"node {key[1]} of graph {key[0]} is {name} under policy {a!r} and {op_name(node)} under {b!r}")
        error = difference(expected, value)
        if error > tolerance:
            shape = next((tuple(t.shape) for t in _tensors(value)), ())
            return Divergence(key[0], key[1], op_name(node), module_name(node), source(node), shape, error, agreed)
        agreed += 1
    if not agreed:
        raise CompareError("no node computes in both configurations; does the model run anything that Dynamo traces?")
    return None


def difference(a: Any, b: Any) -> float:
    """‖a − b‖ / ‖a‖ over the floating tensors of two values of one structure, or the part of other entries that differ if that
    is more; infinite where structures or shapes differ, or one is not finite where the other is."""
    ours, theirs = _tensors(a), _tensors(b)
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        return float("inf")
    worst = 0.0
    for x, y in zip(ours, theirs, strict=True):
        if torch.equal(x, y) or not x.numel():
            continue
        if not x.is_floating_point():
            worst = max(worst, float((x != y).double().mean()))
            continue
        x, y = x.double(), y.double()
        both = torch.isfinite(x) & torch.isfinite(y)
        if not torch.equal(both, torch.isfinite(x) | torch.isfinite(y)):
            return float("inf")
        x, y = x[both], y[both]
        worst = max(worst, float((x - y).norm() / x.norm().clamp_min(1e-300)))
    return worst


def _tensors(value: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


def _values(
    model: nn.Module, policy: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> Iterator[tuple[Key, Node, Any]]:
    """What every computing node gives in one call under ``policy``, in order of execution; values are copies."""
    subject = copy.deepcopy(unwrapped(model))
    options = Options.parse({"policy": policy}, None)
    quantize_(subject, *args, policy=policy, **kwargs)
    found: list[tuple[Key, Node, Any]] = []
    ran = iter(range(1 << 30))

    def look(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        Compilation(gm, example_inputs, options).lower_attention()

        def run(*inputs: Any) -> Any:
            return _Recording(gm, next(ran), found).run(*inputs)

        return run

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        call_through(subject, look, args, kwargs)
    return iter(found)


class _Recording(Interpreter):
    def __init__(self, gm: torch.fx.GraphModule, number: int, found: list[tuple[Key, Node, Any]]) -> None:
        super().__init__(gm)
        self._number, self._found = number, found

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.op in ("call_function", "call_method", "call_module"):
            kept = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), value)
            self._found.append(((self._number, n.name), n, kept))
        return value
