"""The change of policy that buys most accuracy per byte."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch

from .comparison import Comparison, Packed, Runs, SiteError
from .formats import Scheme, get
from .policy import Policy
from .presets import FLOATS
from .rules import Rule, scheme_named
from .tensor import QuantizedTensor, quantize

LADDER = ("int4_g32", "int6_g64", "int8", "int8_g32", "float")
"""What a layer that hurts may be stored as instead, by size."""

LAYERS = 4
"""How many of the layers with the largest errors are looked at."""


@dataclass(frozen=True)
class Suggestion:
    """Store ``layer`` as ``value``: its own error falls from ``alone`` to ``alone_then``, the model's from ``total`` to
    ``total_then`` (both measured), for ``extra_bytes``. ``policy`` is the one to compile with next."""

    layer: str
    value: str
    alone: float
    alone_then: float
    total: float
    total_then: float
    extra_bytes: int
    policy: Policy

    def __str__(self) -> str:
        return (f"store {self.layer} as {self.value}: its error {self.alone:.2e} → {self.alone_then:.2e}, the model's "
                f"{self.total:.2e} → {self.total_then:.2e}, {self.extra_bytes:+,} bytes; options={{'policy': "
                f"comparison.suggestion.policy}} has the rule {{{self.layer!r}: {self.value!r}}} first")  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "policy": self.policy.as_dict()}


@dataclass(frozen=True)
class _Choice:
    error: SiteError
    value: str
    weight: torch.Tensor | None
    alone: float
    extra: int

    @property
    def gain(self) -> float:
        """Fall of the squared error, which adds up over layers whose errors are independent, per byte."""
        return (self.error.alone**2 - self.alone**2) / max(1, self.extra)


def suggestion(
    comparison: Comparison, runs: Runs, packed: Packed, policy: Policy | None
) -> Suggestion | None:
    """Of the layers that hurt most the one with the largest fall of squared error per byte in any format of :data:`LADDER`;
    and for it the smallest format that brings its error to a quarter, or to that of the layers in the middle. Attention that
    hurts more than every layer: float, which takes no byte.

    ``policy`` is the one that the model was compiled with; None: rules that repeat what it has.
    """
    weights = packed.weights
    first, *_ = ranked = comparison.ranked()
    if first.name in packed.attention and first.alone > 0:
        return _without(first, comparison, runs, packed, policy)
    middle = statistics.median_low([e.alone for e in comparison.errors])
    hurting = [e for e in ranked if e.name in weights][:LAYERS]
    ladders = [_ladder(e, runs, weights[e.name]) for e in hurting if e.alone > 0]
    if not ladders:
        return None
    ladder = max(ladders, key=lambda choices: max(c.gain for c in choices))
    alone = ladder[0].error.alone
    best = next(c for c in ladder if c.alone <= min(max(alone / 4, middle), alone / 2))
    changed: dict[str, torch.Tensor] = {n: w for n, w in weights.items() if n != best.error.name}
    if best.weight is not None:
        changed[best.error.name] = best.weight
    then = _policy(Rule(best.error.layer, scheme_named(best.value)), packed, policy)
    total = runs.error(changed, packed.attention)
    return Suggestion(best.error.layer, best.value, alone, best.alone, comparison.total, total, best.extra, then)


def _without(error: SiteError, comparison: Comparison, runs: Runs, packed: Packed, policy: Policy | None) -> Suggestion:
    """One attention in float."""
    others = {name: scheme for name, scheme in packed.attention.items() if name != error.name}
    then = _policy(Rule(error.name, None), packed, policy)
    return Suggestion(error.name, "float", error.alone, 0.0, comparison.total, runs.error(packed.weights, others), 0, then)


def _ladder(error: SiteError, runs: Runs, packed: QuantizedTensor) -> list[_Choice]:
    """What the layer may be stored as instead, larger than it is, with the error of each; the last is float, whose is 0."""
    original = runs.reference.get_parameter(error.name)
    choices: list[_Choice] = []
    for value in LADDER:
        if value in FLOATS:
            choices.append(_Choice(error, value, None, 0.0, original.nbytes - packed.packed_nbytes))
            continue
        weight = quantize(original, Scheme(get(value)), transposed=packed.transposed, layer=error.layer)
        if (extra := weight.packed_nbytes - packed.packed_nbytes) > 0:
            choices.append(_Choice(error, value, weight, runs.error({error.name: weight}), extra))
    return choices


def _policy(first: Rule, packed: Packed, policy: Policy | None) -> Policy:
    """``policy`` with a rule before its own; None: with rules that repeat what is packed."""
    if policy is not None:
        return Policy(policy.name, [first, *policy.rules], explicit=policy.explicit)
    repeated = [Rule(name.removesuffix(".weight"), weight.scheme) for name, weight in packed.weights.items()]
    return Policy("rules", [first, *repeated, *(Rule(n, s) for n, s in packed.attention.items())], explicit=False)
