"""Which layer hurts: the error that each packed weight adds to a model's output alone, and what accumulates."""

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
from .owners import unwrapped
from .recorder import recorder_of
from .tensor import QuantizedTensor

if TYPE_CHECKING:
    from .suggestion import Suggestion

Metric = Callable[[Any, Any], float]
"""(output, the float model's output) → error, 0 for equal ones."""


@dataclass(frozen=True)
class SiteError:
    """One packed weight: parameter ``name``, ``scheme`` (its label), stored bytes; ``alone``: the error of the output when
    everything else is float; ``accumulated``: when this weight and all before it in the order of the plan are packed."""

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
    """Errors of every packed weight in the model's order, the ``total`` error of all of them together, and the change of
    policy that would buy most accuracy per byte (None: no weight adds an error)."""

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
    """A float ``reference`` that runs with some of its weights replaced, and the inputs that it is measured on."""

    def __init__(self, reference: nn.Module, data: Iterable[Any], metric: Metric | None) -> None:
        self.reference, self.data, self.metric = reference, [arguments(item) for item in data], metric
        if not self.data:
            raise CompareError("no data: compare needs at least one input; give a list of tensors, tuples or dicts of arguments")
        self.expected = [self._call({}, item) for item in self.data]

    def error(self, weights: Mapping[str, torch.Tensor]) -> float:
        """The error of the output with ``weights``, by parameter name, in place of the float ones: that of the metric,
        averaged over the data; without a metric √(Σ‖y − y₀‖² / Σ‖y₀‖²)."""
        outputs = (self._call(weights, item) for item in self.data)
        if self.metric is not None:
            return sum(self.metric(y, y0) for y, y0 in zip(outputs, self.expected, strict=True)) / len(self.data)
        squares = [0.0, 0.0]
        for y, y0 in zip(outputs, self.expected, strict=True):
            ours, theirs = main_tensor(y).double(), main_tensor(y0).double()
            squares[0] += float((ours - theirs).square().sum())
            squares[1] += float(theirs.square().sum())
        return math.sqrt(squares[0] / squares[1]) if squares[1] else math.sqrt(squares[0])

    def _call(self, weights: Mapping[str, torch.Tensor], item: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        return torch.func.functional_call(self.reference, dict(weights), *item)


def compare(
    reference: nn.Module, model: nn.Module, data: Iterable[Any], *, metric: Metric | None = None, suggest: bool = True
) -> Comparison:
    """The error that each packed weight of ``model`` adds alone to the outputs of the float ``reference``, and what adds up.

    ``reference`` has the same parameters in float and is not changed; ``model`` was compiled with backend "qcompile" and
    called, or packed by :func:`qcompile.quantize_`. ``data`` is a list of inputs: a tensor, a tuple of arguments or a dict of
    them each. The packed weights run in the float model one at a time, in their own kernels, activations quantized if the
    scheme says so. The error is relative, ‖y − y₀‖ / ‖y₀‖ over the first floating tensor of the output, unless a ``metric``
    (output, float output) → float is given. Attention and KV caches in low precision are not compared.

    Costs 2 · (weights + 1) calls of the float model per input, and with ``suggest`` some twenty more.
    Raises :class:`~qcompile.errors.CompareError` when no weight is packed or the two models differ in their parameters.
    """
    inner, base = unwrapped(model), unwrapped(reference)
    with torch.no_grad():
        weights = packed_weights(inner)
        _check(base, weights)
        runs = Runs(base, data, metric)
        errors, so_far = [], {}
        for name, weight in weights.items():
            so_far[name] = weight
            alone = runs.error({name: weight})
            accumulated = alone if len(so_far) == 1 else runs.error(so_far)
            errors.append(SiteError(name, weight.scheme.label, weight.packed_nbytes, alone, accumulated))
        made = Comparison(tuple(errors), errors[-1].accumulated)
        if not suggest or made.total == 0:
            return made
        from .suggestion import suggestion

        return Comparison(made.errors, made.total, suggestion(made, runs, weights, recorder_of(inner).policy))


def arguments(item: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
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


def packed_weights(model: nn.Module) -> dict[str, QuantizedTensor]:
    """Packed parameters by name, each once, in the order of the plan, which is that of the graph."""
    found = {n: p for n, p in model.named_parameters() if isinstance(p, QuantizedTensor)}
    if not found:
        raise CompareError("no weight of the model is packed; call the compiled model once, or pack it with qcompile.quantize_, "
                           "and compare then")  # fmt: skip
    planned = [site.parameter for site in recorder_of(model).sites() if site.parameter in found]
    return {name: found[name] for name in dict.fromkeys([*planned, *found]) if name is not None}


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
