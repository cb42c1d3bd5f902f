"""Factors for the columns of weights, and for the inputs that meet them: AWQ's and SmoothQuant's.

Both store the weight divided by a factor f of each column and multiply the inputs by it: x·wᵀ = (x·f)·(w/f)ᵀ. AWQ (Lin et al.,
"AWQ: Activation-aware Weight Quantization", 2024) makes the columns that meet large inputs larger, so that they are rounded
finer, and those that reach the ends of their group's range smaller: 1/f = mean|x|^α / mean(|w| / range)^β (the paper has
β = 0). SmoothQuant (Xiao et al., 2023) makes inputs and weights equally hard to round: 1/f = max|x|^α / max|w|^(1−α). Which
exponents is a matter of trying: those of the smallest error of the outputs on a sample of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ..formats import Scheme, reference, scaled
from . import gptq
from .clip import clipped
from .layers import Found, Layer, decoded
from .seen import Seen, as_multiplied
from .target import aimed

AWQ_GRID = tuple(i / 10 for i in range(11))
SMOOTH_GRID = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Choice:
    """``factors`` float32 ``[K]`` and the exponents, of inputs and of weights, that gave them."""

    factors: torch.Tensor
    alpha: float
    beta: float

    @property
    def note(self) -> str:
        return f"α = {self.alpha:g}, β = {self.beta:g}"


def awq(layers: Sequence[Layer], seen: Seen) -> list[Found]:
    """Exponents for all layers of one input, aimed at the float model's outputs (:mod:`.target`); then ranges of groups are
    clipped. Where the format's own search for scales makes smaller errors of the outputs (scales that are powers of two do not
    follow ranges closely), it is kept."""
    assert seen.hessian is not None
    layers = aimed(layers, seen)
    choice, found = _awq_choice(layers, seen), []
    for layer in layers:
        scheme = _scaled(layer.scheme)
        matrix, share = clipped(layer, choice.factors, seen.hessian)
        spec = replace(scheme.format, shrinks=())  # ranges are chosen
        planes = reference.quantize(spec, matrix, layer.name, None, choice.factors)
        ranges = Found(scheme, planes, "awq", f"{choice.note}, ranges clipped to {share:.0%}")
        searched = Found(scheme, _rounded(layer, choice.factors, seen), "awq", f"{choice.note}, scales searched for")
        found.append(min(ranges, searched, key=lambda one: one.error(layer, seen.sample)))
    return found


def awq_gptq(layers: Sequence[Layer], seen: Seen) -> list[Found]:
    """AWQ's factors, and GPTQ's rounding of what they leave: H of the scaled inputs is f fᵀ ∘ H."""
    assert seen.hessian is not None
    choice = _awq_choice(layers, seen)
    f = choice.factors
    hessian = seen.hessian.mul_(f).mul_(f[:, None])
    made = gptq.quantize_all([(layer.scheme.format, layer.matrix, layer.name) for layer in layers], hessian, f)
    return [Found(_scaled(layer.scheme), [*planes, f], "awq+gptq", choice.note)
            for layer, (planes, _) in zip(layers, made, strict=True)]  # fmt: skip


def smoothquant(layers: Sequence[Layer], seen: Seen) -> list[Found]:
    """One α for all layers of one input, whose weights' maxima are those over all of them."""
    choice = _best(layers, seen, _smooth_candidates(layers, seen))
    return [Found(_scaled(layer.scheme), _rounded(layer, choice.factors, seen), "smoothquant", choice.note)
            for layer in layers]  # fmt: skip


def why_no_factors(scheme: Scheme) -> str | None:
    return f"{scheme.format.name} has factors already" if scheme.format.scaled else None


def why_no_smoothing(scheme: Scheme) -> str | None:
    if scheme.activations is None:
        return "its inputs stay in floating point, so there is nothing to smooth; use a scheme such as int8_dynamic"
    return why_no_factors(scheme)


def _awq_choice(layers: Sequence[Layer], seen: Seen) -> Choice:
    """The best α, and then the best β with it."""
    x, w = _positive(seen.mean_abs), _positive(torch.stack([_share_of_range(layer) for layer in layers]).mean(0))

    def choice(alpha: float, beta: float) -> Choice:
        return Choice(_centred(w.pow(beta) / x.pow(alpha)), alpha, beta)

    first = _best(layers, seen, (choice(alpha, 0.0) for alpha in AWQ_GRID))
    return _best(layers, seen, (choice(first.alpha, beta) for beta in AWQ_GRID))


def _share_of_range(layer: Layer) -> torch.Tensor:
    """Mean over rows of |w| over the largest of its group: float32 ``[K]``."""
    n, k = layer.matrix.shape
    group = layer.scheme.format.period or k
    size = torch.nn.functional.pad(layer.matrix.abs().to(torch.float32), (0, -k % group)).view(n, -1, group)
    return (size / size.amax(-1, keepdim=True).clamp_min(1e-30)).view(n, -1)[:, :k].mean(0)


def _positive(sizes: torch.Tensor) -> torch.Tensor:
    """``sizes`` with those near zero raised, so that their powers stay in range."""
    return sizes.clamp_min(1e-4 * float(sizes.mean()) + 1e-12)


def _smooth_candidates(layers: Sequence[Layer], seen: Seen) -> Iterator[Choice]:
    x = _positive(seen.largest)
    w = _positive(torch.stack([layer.matrix.abs().amax(0).to(torch.float32) for layer in layers]).amax(0))
    for alpha in SMOOTH_GRID:
        yield Choice(_centred(w.pow(1 - alpha) / x.pow(alpha)), alpha, 1 - alpha)


def _centred(factors: torch.Tensor) -> torch.Tensor:
    """With the middle of the range at 1, so that x·f stays in the range of x's dtype."""
    return factors / (factors.amax() * factors.amin()).sqrt()


def _scaled(scheme: Scheme) -> Scheme:
    return replace(scheme, format=scaled(scheme.format))


def _rounded(layer: Layer, factors: torch.Tensor, seen: Seen) -> list[torch.Tensor]:
    """Planes of the layer under ``factors``, scales weighted by the inputs' mean squares."""
    return reference.quantize(scaled(layer.scheme.format), layer.matrix, layer.name, seen.mean_square, factors)


def _best(layers: Sequence[Layer], seen: Seen, candidates: Iterator[Choice]) -> Choice:
    """The candidate with the least sum of the layers' relative squared errors."""
    wanted = [seen.sample @ layer.matrix.to(torch.float32).t() for layer in layers]

    def error(choice: Choice) -> float:
        total = 0.0
        for layer, y in zip(layers, wanted, strict=True):
            planes = _rounded(layer, choice.factors, seen)
            n, k = layer.matrix.shape
            given = decoded(scaled(layer.scheme.format), planes, n, k, torch.float32)
            x = as_multiplied(seen.sample * choice.factors, layer.scheme.activations)
            total += float((x @ (given / choice.factors).t() - y).square().sum() / y.square().sum().clamp_min(1e-30))
        return total

    return min(candidates, key=error)
