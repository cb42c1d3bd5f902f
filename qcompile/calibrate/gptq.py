"""GPTQ: round each weight so that the layer's outputs, not its weights, change least.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023. Columns are
rounded in order; the error of each is made up for in the columns still to come, through the inverse of H = XᵀX.
"""

from __future__ import annotations

import torch

from ..errors import WeightError
from ..formats import ROW, FormatSpec
from ..formats.algebra import affine, gen_table
from ..formats.layout import pack_plane
from ..formats.reference import nearest, nearest_code

DAMPING = 0.01
"""Share of the mean diagonal of H that is added to it (the paper's value)."""

BLOCK = 128
"""Columns worked on before the rest of the matrix is brought up to date."""


def quantize(
    spec: FormatSpec, weight: torch.Tensor, hessian: torch.Tensor, layer: str = "weight"
) -> list[torch.Tensor]:
    """Stored planes, in spec order, of a float ``[N, K]`` weight under ``hessian`` ``[K, K]``, the sum of x xᵀ over inputs.

    Scales and offsets of a group come from the weights as earlier columns' errors have left them. Formats of one code
    plane, one scale and at most one offset (those that round-to-nearest serves). Raises
    :class:`~qcompile.errors.WeightError`, naming ``layer``, when weight or Hessian have NaN or infinite values.
    """
    n, k = weight.shape
    if not (torch.isfinite(weight).all() and torch.isfinite(hessian).all()):
        raise WeightError(f"{layer}: the weight or the inputs seen at calibration have NaN or infinite values")
    cols = spec.padded(n, k)[1]
    work = torch.zeros(n, cols, dtype=torch.float32, device=weight.device)
    work[:, :k] = weight
    upper = _inverse_factor(hessian, cols)
    group = spec.period or cols
    codes = torch.empty(n, cols, dtype=torch.uint8, device=weight.device)
    scales: dict[str, list[torch.Tensor]] = {p.name: [] for p in spec.scales}
    for start in range(0, cols, BLOCK):
        _round_block(spec, work, codes, scales, upper, start, min(start + BLOCK, cols), group, k)
    plane = spec.codes[0]
    entries = {name: torch.cat(parts, 1) for name, parts in scales.items()}
    entries[plane.name] = codes.view(torch.int8) if plane.dtype == "i8" else codes
    return [pack_plane(p, entries[p.name], spec.plane_shape(p, n, k)) for p in spec.planes]


def _inverse_factor(hessian: torch.Tensor, cols: int) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian, padded to ``cols``; inputs never seen get the mean
    diagonal, so that their weights are rounded to nearest."""
    full = torch.zeros(cols, cols, dtype=torch.float64, device=hessian.device)
    full[: len(hessian), : len(hessian)] = hessian
    diagonal = full.diagonal()
    mean = diagonal.mean().clamp_min(1e-12)
    diagonal.add_(DAMPING * mean)
    diagonal[diagonal <= DAMPING * mean] = mean
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(full))
    return torch.linalg.cholesky(inverse, upper=True).to(torch.float32)


def _round_block(
    spec: FormatSpec, work: torch.Tensor, codes: torch.Tensor, scales: dict[str, list[torch.Tensor]],
    upper: torch.Tensor, start: int, stop: int, group: int, k: int,
) -> None:  # fmt: skip
    """Rounds columns ``start`` to ``stop`` and moves their errors into the columns after ``stop``."""
    form, table = affine(spec), gen_table(spec).to(torch.float32).to(work.device)
    errors = torch.empty(len(work), stop - start, dtype=torch.float32, device=work.device)
    scale = offset = torch.zeros(())
    for at in range(start, stop):
        if at % group == 0:
            last = min(at + group, k)
            entries = nearest(spec, work[:, None, at : max(last, at + 1)])
            for plane in spec.scales:
                scales[plane.name].append(entries[plane.name].reshape(len(work), 1))
        scale = scales[str(form.coeff)][-1]
        offset = scales[str(form.offset)][-1] if form.offset != 0 else offset
        column = work[:, at : at + 1]
        code = nearest_code(spec, (column - offset) / scale).view(torch.uint8)
        codes[:, at : at + 1] = code
        rounded = scale * table[code.long()] + offset
        error = (column - rounded) / upper[at, at]
        errors[:, at - start : at - start + 1] = error
        work[:, at + 1 : stop] -= error @ upper[at : at + 1, at + 1 : stop]
    work[:, stop:] -= errors @ upper[start:stop, stop:]


assert ROW == 0
