"""What quantization costs a whole model: perplexity, divergence of its predictions, and the noise of each weight."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .comparison import Arguments, arguments
from .divergence import Output, Sums, check_evaluates, check_finite, output_of, sums
from .errors import CompareError
from .owners import Owners, unwrapped
from .recorder import recorder_of
from .tensor import QuantizedTensor

IGNORED = -100
"""A label that does not count, as in :func:`torch.nn.functional.cross_entropy`."""

CAUSAL = 1e-3
"""Largest relative change of earlier logits by a later token that still counts as none."""


@dataclass(frozen=True)
class SiteNoise:
    """One packed weight: its ``layer``, its scheme's label, stored bytes, and 10·log₁₀(‖w‖² / ‖w − ŵ‖²) in dB (None: unknown)."""

    layer: str
    scheme: str
    nbytes: int
    sqnr: float | None


@dataclass(frozen=True)
class Evaluation:
    """A quantized model beside its float reference, over the same data.

    ``perplexity``, ``reference_perplexity``: exp of the mean −log p(next token) in nats; None for a model that does not predict
    tokens, and ``no_perplexity`` says why. ``divergence``: mean KL(reference‖quantized) in nats a position, and ``agreement``:
    the part of positions with the same likeliest class; None where the output is no logits. ``relative_error``: ‖y − y₀‖ / ‖y₀‖
    of the output. ``positions`` that the means are over, ``tokens`` that were predicted. ``nbytes``, ``reference_nbytes``: of all
    parameters (0: the quantized model is no module). ``sites``: every packed weight.
    """

    perplexity: float | None
    reference_perplexity: float | None
    no_perplexity: str | None
    divergence: float | None
    agreement: float | None
    relative_error: float
    positions: int
    tokens: int
    nbytes: int
    reference_nbytes: int
    sites: tuple[SiteNoise, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON types; an exact weight has the ``sqnr`` ``"inf"``."""
        sites = [vars(s) | {"sqnr": "inf" if s.sqnr == math.inf else s.sqnr} for s in self.sites]
        return {**vars(self), "sites": sites}

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=1)

    def __str__(self) -> str:
        from .report.evaluation_table import text

        return text(self)


def evaluate(reference: nn.Module, quantized: Callable[..., Any], data: Iterable[Any]) -> Evaluation:
    """Runs both models on ``data`` and says what quantization costs, position by position.

    ``reference`` is the float model; ``quantized`` has the same inputs and outputs, packed or compiled by any backend. ``data``:
    inputs as for :func:`qcompile.compare`, one item at a time, so it may be a generator. Of a dict, ``labels`` (int64
    ``[B, T]``, −100: does not count) are what perplexity is measured against, and are not passed on; without them ``input_ids``,
    or the first integer tensor of the logits' shape, are. Positions with ``attention_mask`` 0 do not count.

    With p₀, p the two models' distributions over the vocabulary after each position t, N positions, and M that have a next token:
    divergence = (1/N) Σ_t Σ_v p₀(v)·log(p₀(v)/p(v)); agreement = (1/N)·#{t : argmax p = argmax p₀};
    perplexity = exp(−(1/M) Σ_t log p(x_{t+1})); relative error = √(Σ‖y − y₀‖² / Σ‖y₀‖²). All in float64. Whether a model
    predicts tokens is tried: changing a token must not change the logits before it.

    Raises :class:`~qcompile.errors.CompareError` for no data, outputs of different shapes, values that are not finite, and
    models in training mode whose outputs are random.
    """
    inner = unwrapped(quantized) if isinstance(quantized, nn.Module) else None
    check_evaluates(base := unwrapped(reference), "the reference")
    if inner is not None:
        check_evaluates(inner, "the quantized model")
    total, text, reason = Sums(), _Text(), None
    with torch.no_grad():
        for i, item in enumerate(data):
            (args, kwargs), labels = _split(item)
            expected = output_of(reference(*args, **kwargs), (args, kwargs))
            check_finite(expected.values, f"the reference, item {i}")
            if i == 0:
                reason = why_no_perplexity(reference, expected, (args, kwargs))
            ours = output_of(quantized(*args, **kwargs), (args, kwargs))
            total += sums(ours.values, expected, f"the quantized model, item {i}")
            if reason is None:
                text.add(expected, ours.values, labels)
        if not total.positions:
            raise CompareError("no data: evaluate needs at least one input with a position that is not masked; give a list of "
                               "tensors, tuples or dicts of arguments")  # fmt: skip
        if reason is None and not text.tokens:
            reason = "no item has a token after another"
        known = text.tokens and reason is None
        return Evaluation(
            math.exp(text.ours / text.tokens) if known else None,
            math.exp(text.theirs / text.tokens) if known else None,
            reason,
            total.divergence / total.positions if expected.classes else None,
            total.agreements / total.positions if expected.classes else None,
            math.sqrt(total.relative_square),
            total.positions, text.tokens, parameter_bytes(inner), parameter_bytes(base), noise(base, inner),
        )  # fmt: skip


class _Text:
    """Σ −log p(next token) of both models, and how many tokens were predicted."""

    def __init__(self) -> None:
        self.ours, self.theirs, self.tokens = 0.0, 0.0, 0

    def add(self, expected: Output, ours: torch.Tensor, labels: torch.Tensor | None) -> None:
        assert expected.ids is not None
        if labels is not None and labels.shape != expected.ids.shape:
            raise CompareError(f"labels of shape {list(labels.shape)}, tokens of shape {list(expected.ids.shape)}; one for each")
        wanted = (expected.ids if labels is None else labels)[..., 1:].long()
        counts = wanted != IGNORED
        if expected.keep is not None:
            counts = counts & expected.keep[..., 1:] & expected.keep[..., :-1]
        targets = wanted[counts]
        self.tokens += len(targets)
        self.ours += _surprise(ours[..., :-1, :][counts], targets)
        self.theirs += _surprise(expected.values[..., :-1, :][counts], targets)


def _surprise(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Σ −log p(target) in nats; logits ``[M, V]``."""
    pairs = zip(logits.split(1024), targets.split(1024), strict=True)
    return sum(float(nn.functional.cross_entropy(y.double(), t, reduction="sum")) for y, t in pairs)


def why_no_perplexity(model: Callable[..., Any], output: Output, item: Arguments) -> str | None:
    """None if ``output`` are logits of the token after each position, by trying: another token at the end of the first row's text
    must leave the logits before it as they are."""
    if not output.classes or output.ids is None:
        return "the output is no logits of a token at each position"
    ids = output.ids
    row = (0,) * (ids.dim() - 1)
    kept = torch.arange(ids.shape[-1]) if output.keep is None else output.keep[row].nonzero().flatten().cpu()
    if len(kept) < 2:
        return None
    last = int(kept[-1])
    changed = ids.clone()
    changed[(*row, last)] = (changed[(*row, last)] + 1) % output.values.shape[-1]
    args, kwargs = item
    swap = {id(ids): changed}
    args, kwargs = tuple(swap.get(id(a), a) for a in args), {k: swap.get(id(v), v) for k, v in kwargs.items()}
    before = output.values[row][kept[:-1]]
    after = output_of(model(*args, **kwargs), (args, kwargs)).values[row][kept[:-1]]
    if float((after - before).norm()) <= CAUSAL * float(before.norm()):
        return None
    return "the model does not predict the next token: logits depend on later ones"


def parameter_bytes(model: nn.Module | None) -> int:
    """Bytes of all parameters, shared ones once, packed ones as stored; 0 without a module."""
    values = model.parameters() if model is not None else ()
    return sum(p.packed_nbytes if isinstance(p, QuantizedTensor) else p.nbytes for p in values)


def noise(reference: nn.Module, model: nn.Module | None) -> tuple[SiteNoise, ...]:
    """The packed weights of ``model``: SQNR as recorded when they were packed, else to the reference's weight of that name."""
    if model is None:
        return ()
    records = recorder_of(Owners().path(model)[0]).plan
    recorded = {r.decision.site.parameter: r.sqnr for r in records if r.sqnr is not None}
    floats = dict(reference.named_parameters())
    found = []
    for name, weight in model.named_parameters():
        if isinstance(weight, QuantizedTensor):
            known = recorded.get(name)
            ratio = known if known is not None else _ratio(weight, floats.get(name))
            found.append(SiteNoise(name.removesuffix(".weight"), weight.scheme.label, weight.packed_nbytes, ratio))
    return tuple(found)


def _ratio(weight: QuantizedTensor, original: torch.Tensor | None) -> float | None:
    """SQNR in dB; None without a float weight of the same shape."""
    if original is None or isinstance(original, QuantizedTensor) or original.shape != weight.shape:
        return None
    signal = original.double().square().sum()
    left = (original.double() - weight.dequantize().to(original.device).double()).square().sum()
    return math.inf if float(left) == 0 else 10 * math.log10(max(float(signal / left), 1e-300))


def _split(item: Any) -> tuple[Arguments, torch.Tensor | None]:
    """Arguments of the models, and the labels that were among them."""
    labels = item.get("labels") if isinstance(item, Mapping) else None
    args, kwargs = arguments(item)
    kwargs.pop("labels", None)
    return (args, kwargs), labels
