"""Packs the weights that walks stop at, those of one input together, each group once on a machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qcompile.errors import FingerprintError
from qcompile.formats import Scheme, scheme_of
from qcompile.packing import Packed, known, packed
from qcompile.rounding.layers import Found, Layer, decoded
from qcompile.rounding.methods import Method, to_nearest
from qcompile.rounding.seen import Seen, drift
from qcompile.store import code_version, the_store

from . import heap
from .fingerprint import fingerprint
from .walk import Stop, Weight

ROUNDED = "rounded.json"

Inputs = Sequence[tuple[int, torch.Tensor]]
"""Numbers of samples, and what a layer is given."""

InFloat = Mapping[int, torch.Tensor]
"""By number, what the layer is given in the float model, where that came by it."""


@dataclass(frozen=True)
class Outcome:
    """A packed ``weight``: its ``scheme``, the ``method`` and a ``note`` (the reason, of one rounded to nearest), and the
    relative errors of the layer's outputs by rounding to ``nearest`` and as it is packed (``error``)."""

    weight: Weight
    scheme: Scheme
    packed: Packed
    method: str
    note: str
    nearest: float
    error: float


@dataclass
class Session:
    """A :class:`~.walk.Packer`: ``outcomes`` by parameter name, in the order in which they were packed.

    ``keep`` asks the store first: what names a group there is a chain over all graphs entered and groups packed before,
    so that a run that was killed goes on where it was. ``done(names)`` hears of every group.
    """

    method: Method
    keep: bool = True
    done: Callable[[Sequence[str]], object] = lambda names: None
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    weights: dict[int, Weight] = field(default_factory=dict)

    def __post_init__(self) -> None:
        versions = [code_version("qcompile.passes", "qcompile.rounding", "qcompile.formats"), torch.__version__]
        self._chain: str | None = _digest([self.method.name, *versions]) if self.keep else None
        self._digests: dict[int, list[Any]] = {}
        self._latest: dict[str, torch.Tensor] = {}

    def want(self, weight: Weight) -> None:
        self.weights.setdefault(id(weight.value), weight)

    def wanted(self, parameter: nn.Parameter) -> Weight | None:
        return self.weights.get(id(parameter))

    def is_packed(self, weight: Weight) -> bool:
        return weight.name in self.outcomes

    def decoded(self, weight: Weight) -> torch.Tensor:
        if weight.name not in self._latest:
            made, (n, k) = self.outcomes[weight.name], weight.matrix.shape
            self._latest[weight.name] = decoded(made.scheme.format, made.packed.planes, n, k, weight.value.dtype)
        return self._latest[weight.name]

    def enter(self, gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> None:
        """A graph is about to run: what it computes and on what becomes part of the names of all that is packed after."""
        if self._chain is not None:
            try:
                self._chain = _digest([self._chain, fingerprint(gm, inputs, self._digests)])
            except FingerprintError:
                self._chain = None

    def serve(self, weights: Sequence[Weight], stops: Sequence[tuple[int, Stop]], in_float: InFloat) -> None:
        """Packs ``weights`` for the inputs at the ``stops`` of the samples with these numbers; ``in_float``: what they are in
        the float model, where it ran as well."""
        self._latest.clear()
        for outcome in self._outcomes(weights, [(number, stop.x) for number, stop in stops], in_float):
            self.outcomes[outcome.weight.name] = outcome
        if self._chain is not None:
            self._chain = _digest([self._chain, *(w.name + w.scheme.key for w in weights)])
        self.done([w.name for w in weights])

    def _outcomes(self, weights: Sequence[Weight], inputs: Inputs, in_float: InFloat) -> list[Outcome]:
        if self._chain is None:
            return self._packed(weights, self._made(weights, inputs, in_float), None)
        parts = {"chain": self._chain, "formats": {w.name: w.scheme.key for w in weights}}
        with the_store().making("calibration", parts) as slot:
            if slot.found is not None and (kept := self._kept(slot.found, weights, parts)) is not None:
                return kept
            made = self._packed(weights, self._made(weights, inputs, in_float), parts)
            slot.put(lambda folder: (folder / ROUNDED).write_text(json.dumps([_as_dict(o) for o in made])))
            return made

    def _made(self, weights: Sequence[Weight], inputs: Inputs, in_float: InFloat) -> list[tuple[Found, float, float]]:
        """What the method finds, with the errors of rounding to nearest and of it; a format that it does not serve is rounded to
        nearest."""
        reasons = [self.method.why_not(w.scheme) for w in weights]
        served = [i for i, reason in enumerate(reasons) if reason is None]
        layers = [Layer(w.layer, w.scheme, w.matrix) for w in weights]
        heap.trim()  # every lane's thread has a heap, with what its way here let go of
        seen = Seen.of(inputs, weights[0].layer, self.method.with_hessian and bool(served))
        found, near = dict[int, Found](), []
        for at, (layer, reason) in enumerate(zip(layers, reasons, strict=True)):
            found[at] = to_nearest(layer, reason or "")
            near.append(found[at].error(layer, seen.sample))
            if reason is None:
                del found[at]  # only its error was asked for
        heap.trim()
        if in_float and served:
            seen = replace(seen, drift=drift(inputs, in_float, weights[0].layer))
        if served:
            found |= zip(served, self.method.pack([layers[at] for at in served], seen), strict=True)
        return [(found[at], near[at], near[at] if at not in served else found[at].error(layer, seen.sample))
                for at, layer in enumerate(layers)]  # fmt: skip

    def _packed(self, weights: Sequence[Weight], made: Sequence[tuple[Found, float, float]], parts: Any) -> list[Outcome]:
        """The planes as the store has them: mapped from their files, which takes no memory until they are read."""
        outcomes = []
        for w, (found, near, error) in zip(weights, made, strict=True):
            spec, rounding = found.scheme.format, None if parts is None else [self.method.name, w.name, parts]
            kept = packed(w.value, spec, transposed=w.transposed, layer=w.layer, rounding=rounding, planes=found.planes)
            if rounding is not None:
                kept = known(w.value, spec, transposed=w.transposed, rounding=rounding, mapped=True) or kept
            outcomes.append(Outcome(w, found.scheme, kept, found.method, found.note, near, error))
        return outcomes

    def _kept(self, folder: Path, weights: Sequence[Weight], parts: Any) -> list[Outcome] | None:
        """What an earlier run packed, if the store still has all of it."""
        found = []
        for w, entry in zip(weights, json.loads((folder / ROUNDED).read_text()), strict=True):
            scheme, rounding = scheme_of(entry["scheme"]), [self.method.name, w.name, parts]
            kept = known(w.value, scheme.format, transposed=w.transposed, rounding=rounding, mapped=True)
            if kept is None:
                return None
            found.append(Outcome(w, scheme, kept, entry["method"], entry["note"], entry["nearest"], entry["error"]))
        return found


def _as_dict(outcome: Outcome) -> dict[str, Any]:
    return {"scheme": outcome.scheme.key, "method": outcome.method, "note": outcome.note, "nearest": outcome.nearest,
            "error": outcome.error}  # fmt: skip


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()
