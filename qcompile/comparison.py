"""Which layer hurts: the error that each packed weight, and each attention in low precision, adds to a model's output alone, and
what accumulates."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .errors import CompareError
from .formats import Scheme
from .owners import unwrapped
from .passes.switchboard import Switchboard
from .recorder import recorder_of
from .tensor import QuantizedTensor

if TYPE_CHECKING:
    from .suggestion import Suggestion

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call."""

Metric = Callable[[Any, Any], float]
"""(output, the float model's output) → error, 0 for equal ones."""


@dataclass(frozen=True)
class SiteError:
    """One packed weight: parameter ``name``, ``scheme`` (its label), stored bytes; or one attention in low precision: the name of
    its site, without bytes. ``alone``: the error of the output when everything else is float; ``accumulated``: when this one and
    all before it in the order of the plan are packed."""

    name: str
    scheme: str
    nbytes: int
    alone: float
    accumulated: float

    @property
    def layer(self) -> str:
        """The module's name, as a rule of a policy has it."""
        return self.name.removesuffix(".weight")


@dataclass(frozen=True)
class Comparison:
    """Errors of every packed weight and attention in the model's order, the ``total`` error of all of them together, and the
    change of policy that would buy most accuracy per byte (None: nothing adds an error)."""

    errors: tuple[SiteError, ...]
    total: float
    suggestion: Suggestion | None = None

    def ranked(self) -> list[SiteError]:
        """The largest error alone first."""
        return sorted(self.errors, key=lambda e: -e.alone)

    def as_dict(self) -> dict[str, Any]:
        """JSON types: ``{"total", "errors" (ranked), "suggestion"}``."""
        suggestion = self.suggestion and self.suggestion.as_dict()
        return {"total": self.total, "errors": [asdict(e) for e in self.ranked()], "suggestion": suggestion}

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=1)

    def __str__(self) -> str:
        from .report.errors_table import text

        return text(self)


class Runs:
    """A float ``reference`` that runs with some of its weights replaced and some of its attention in low precision, and the
    inputs that it is measured on."""

    def __init__(self, reference: nn.Module, data: Iterable[Any], metric: Metric | None) -> None:
        self.reference, self.data, self.metric = reference, [arguments(item) for item in data], metric
        if not self.data:
            raise CompareError("no data: compare needs at least one input; give a list of tensors, tuples or dicts of arguments")
        self._switchboard = Switchboard(reference)
        self.expected = [self.output({}, item) for item in self.data]

    def error(self, weights: Mapping[str, torch.Tensor], attention: Mapping[str, Scheme] | None = None) -> float:
        """The error of the output with ``weights``, by parameter name, in place of the float ones, and ``attention``, by the name
        of its site, in these schemes: that of the metric, averaged over the data; without a metric √(Σ‖y − y₀‖² / Σ‖y₀‖²)."""
        outputs = (self.output(weights, item, attention) for item in self.data)
        if self.metric is not None:
            return sum(self.metric(y, y0) for y, y0 in zip(outputs, self.expected, strict=True)) / len(self.data)
        squares = [0.0, 0.0]
        for y, y0 in zip(outputs, self.expected, strict=True):
            ours, theirs = main_tensor(y).double(), main_tensor(y0).double()
            squares[0] += float((ours - theirs).square().sum())
            squares[1] += float(theirs.square().sum())
        return math.sqrt(squares[0] / squares[1]) if squares[1] else math.sqrt(squares[0])

    def output(self, weights: Mapping[str, torch.Tensor], item: Arguments, attention: Mapping[str, Scheme] | None = None) -> Any:
        """Of one item of ``data``, with ``weights`` and ``attention`` as in :meth:`error`."""
        if attention:
            return self._switchboard.run(weights, attention, *item)
        return torch.func.functional_call(self.reference, dict(weights), *item)


def compare(
    reference: nn.Module, model: nn.Module, data: Iterable[Any], *, metric: Metric | None = None, suggest: bool = True
) -> Comparison:
    """The error that each packed weight of ``model``, and each attention in low precision, adds alone to the outputs of the float
    ``reference``, and what adds up.

    ``reference`` has the same parameters in float and is not changed; ``model`` was compiled with backend "qcompile" and
    called, or packed by :func:`qcompile.quantize_`. ``data`` is a list of inputs: a tensor, a tuple of arguments or a dict of
    them each. The packed weights run in the float model one at a time, in their own kernels, activations quantized if the
    scheme says so. The error is relative, ‖y − y₀‖ / ‖y₀‖ over the first floating tensor of the output, unless a ``metric``
    (output, float output) → float is given. KV caches in low precision are not compared.

    Costs 2 · (weights + 1) calls of the float model per input, and with ``suggest`` some twenty more.
    Raises :class:`~qcompile.errors.CompareError` when nothing is packed or the two models differ in their parameters.
    """
    inner, base = unwrapped(model), unwrapped(reference)
    with torch.no_grad():
        packed = Packed.of(inner)
        _check(base, packed.weights)
        runs = Runs(base, data, metric)
        errors: list[SiteError] = []
        so_far = Packed({}, {}, ())
        for name in packed.order:
            one = packed.only(name)
            so_far = Packed({**so_far.weights, **one.weights}, {**so_far.attention, **one.attention}, (*so_far.order, name))
            alone = runs.error(one.weights, one.attention)
            accumulated = runs.error(so_far.weights, so_far.attention) if errors else alone
            (scheme,) = (*(w.scheme for w in one.weights.values()), *one.attention.values())
            nbytes = sum(w.packed_nbytes for w in one.weights.values())
            errors.append(SiteError(name, scheme.label, nbytes, alone, accumulated))
        made = Comparison(tuple(errors), errors[-1].accumulated)
        if not suggest or made.total == 0:
            return made
        from .suggestion import suggestion

        return Comparison(made.errors, made.total, suggestion(made, runs, packed, recorder_of(inner).policy))


def arguments(item: Any) -> Arguments:
    """Positional and keyword arguments of one input: a dict's, a tuple's or list's, or the one thing itself."""
    if isinstance(item, Mapping):
        return (), dict(item)
    return (tuple(item), {}) if isinstance(item, (tuple, list)) else ((item,), {})


def main_tensor(output: Any) -> torch.Tensor:
    """The first floating tensor of an output. Raises :class:`CompareError` if there is none."""
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            return leaf
    raise CompareError(f"the model returned {type(output).__name__}, in which no floating tensor was found; give a metric")


@dataclass(frozen=True)
class Packed:
    """What of a model is packed: ``weights`` by parameter name, schemes of ``attention`` by the name of its site, and all of
    these names in the ``order`` of the plan, which is that of the graph."""

    weights: Mapping[str, QuantizedTensor]
    attention: Mapping[str, Scheme]
    order: tuple[str, ...]

    @staticmethod
    def of(model: nn.Module) -> Packed:
        weights = {n: p for n, p in model.named_parameters() if isinstance(p, QuantizedTensor)}
        decisions = [r.decision for r in recorder_of(model).plan]
        attention = {d.site.name: d.scheme for d in decisions if d.site.operator == "attention" and d.scheme is not None}
        if not weights and not attention:
            raise CompareError("no weight of the model is packed; call the compiled model once, or pack it with "
                               "qcompile.quantize_, and compare then")  # fmt: skip
        planned = [d.site.name if d.site.operator == "attention" else d.site.parameter for d in decisions]
        order = dict.fromkeys([n for n in planned if n in weights or n in attention] + list(weights))
        return Packed(weights, attention, tuple(n for n in order if n is not None))

    def only(self, name: str) -> Packed:
        """Of all of it ``name`` alone."""
        weights = {n: w for n, w in self.weights.items() if n == name}
        return Packed(weights, {n: s for n, s in self.attention.items() if n == name}, (name,))


def _check(reference: nn.Module, weights: Mapping[str, QuantizedTensor]) -> None:
    floats = dict(reference.named_parameters())
    for name, weight in weights.items():
        other = floats.get(name)
        if other is None:
            raise CompareError(f"the reference has no parameter {name!r}, which is packed in the model; compare equal models")
        if isinstance(other, QuantizedTensor):
            raise CompareError(f"{name!r} is packed in the reference as well; give it a copy made before the model was compiled")
        if other.shape != weight.shape:
            raise CompareError(f"{name!r} is {list(other.shape)} in the reference and {list(weight.shape)} in the model")
