"""The weight that gives, on the inputs that a packed model has, what the float model's layer gives on its own.

Layers packed before leave an error in the input: x where the float model has x'. A layer may answer the part of it that is linear
in x ("asymmetric" reconstruction: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020; Li et al.,
"GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", 2025). The weight v that minimizes
Σ ‖x vᵀ − x' wᵀ‖² and ``DAMPING`` · Σ_k H_kk ‖v_k − w_k‖² over columns k is w + w D (H + ``DAMPING`` diag H)⁻¹, H = Σ x xᵀ,
D = Σ (x' − x)ᵀ x of rows x. It does not depend on the scale of a column, and rounding is what it was, of another weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..errors import WeightError
from .layers import Layer
from .seen import Seen

DAMPING = 0.3
"""Share of H's diagonal. It keeps a weight near its own where inputs say little: with 65 thousand tokens a tenth is a little
better, with three thousand clearly worse."""


def aimed(layers: Sequence[Layer], seen: Seen) -> list[Layer]:
    """``layers`` of one input with float32 matrices ``[N, K]`` that answer ``seen.drift``; as they are without one. Raises
    :class:`~qcompile.errors.WeightError`, naming a layer, when H, damped, has no Cholesky factor."""
    if seen.drift is None:
        return list(layers)
    assert seen.hessian is not None
    damped = seen.hessian.clone()
    diagonal = damped.diagonal()
    diagonal.mul_(1 + DAMPING).clamp_min_(1e-6 * float(diagonal.mean()) + 1e-12)  # inputs that were always 0
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise WeightError(f"{layers[0].name}: H = XᵀX has no Cholesky factor with {DAMPING:g} of its diagonal added, so it is no "
                          "sum of squares; give the layer other samples, or method='imatrix'")  # fmt: skip
    turn = torch.cholesky_solve(seen.drift.t(), factor).t()
    return [replace(layer, matrix=torch.addmm(wide, wide, turn))
            for layer in layers for wide in (layer.matrix.to(torch.float32),)]  # fmt: skip
