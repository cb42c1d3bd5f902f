"""Losses without a run for each candidate: the squared error of a weight, weighed by how much the output depends on it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..divergence import Output, output_of
from ..errors import CompareError
from .candidates import Layer
from .sensitivity import KL, Sensitivity

DRAWS = 16
"""Backward passes at least: each gives one draw of every weight's F."""
SEED = 0
"""Of the drawn classes and directions, so that one model and data give one estimate."""


class Curvature:
    """The diagonal F of the second derivative of the loss in each layer's weight, by a backward pass for each item.

    Logits: KL ≈ ½ Σ_i F_i·(w_i − ŵ_i)², F_i = mean over positions of E_{v~p}[(∂ log p(v)/∂w_i)²], the Fisher information, with
    one class v drawn at each position (Martens, 2020, "New insights and perspectives on the natural gradient method"). Other
    outputs: ‖y − y₀‖² ≈ Σ_i F_i·(w_i − ŵ_i)², F_i = E_ε[(∂(ε·y)/∂w_i)²] with one ε of independent normal entries a pass (the
    estimator of Hutchinson, 1990). Both leave out products of errors of two weights, which are small where errors are
    independent. Float32; holds one number for each weight.

    Raises :class:`~qcompile.errors.CompareError` for an output without a gradient.
    """

    def __init__(self, runs: Sensitivity, layers: Sequence[Layer]) -> None:
        self._runs = runs
        names = [layer.parameter for layer in layers]
        weights = {n: runs.reference.get_parameter(n).detach().requires_grad_() for n in names}
        self._sums = {n: torch.zeros_like(w, dtype=torch.float32) for n, w in weights.items()}
        self._scale, draw = 0.0, torch.Generator().manual_seed(SEED)
        pairs = list(zip(runs.data, runs.outputs, strict=True))
        for item, output in pairs * math.ceil(DRAWS / len(pairs)):
            with torch.enable_grad():
                made = output_of(runs.output(weights, item), item)
                target = self._drawn(made, draw)
                if not target.requires_grad:
                    raise CompareError("sensitivity='curvature': the output has no gradient in the weights; use 'measured'")
                found = torch.autograd.grad(target, list(weights.values()), allow_unused=True)
            for name, gradient in zip(names, found, strict=True):
                if gradient is not None:
                    self._sums[name] += gradient.float().square()
            kept = _kept(output)
            self._scale += 2.0 * len(kept) if runs.measure == KL else float(kept.double().square().sum())

    def loss(self, layer: Layer, packed: torch.Tensor) -> float:
        """Of ``layer`` alone as ``packed`` (a :class:`~qcompile.tensor.QuantizedTensor`), in the unit of the runs' measure."""
        original = self._runs.reference.get_parameter(layer.parameter)
        error = original.float() - packed.dequantize().float()
        total = float((self._sums[layer.parameter] * error.square()).sum(dtype=torch.float64))
        return total / self._scale if self._scale else total

    def _drawn(self, output: Output, draw: torch.Generator) -> torch.Tensor:
        """Σ log p(v) over the positions that count, v drawn from p; or ε·y."""
        values = _kept(output).float()
        if self._runs.measure != KL:
            return (values * torch.randn(values.shape, generator=draw).to(values.device)).sum()
        logs = values.log_softmax(-1)
        uniform = torch.rand(len(values), 1, generator=draw).to(values.device)
        below = logs.detach().exp().cumsum(-1) < uniform  # inverse of the distribution function
        drawn = below.sum(-1, keepdim=True).clamp(max=values.shape[-1] - 1)
        return logs.gather(-1, drawn).sum()


def _kept(output: Output) -> torch.Tensor:
    """The positions that count, as a matrix."""
    rows = output.values.reshape(-1, output.values.shape[-1] if output.values.dim() else 1)
    return rows if output.keep is None else rows[output.keep.flatten()]
