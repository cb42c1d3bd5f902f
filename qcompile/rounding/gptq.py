"""GPTQ: round each weight so that the layer's outputs, not its weights, change least.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023. Columns are
rounded one after another; the error of each is made up for in the columns still to come, through the inverse of H = XᵀX.
Columns go by falling diagonal of H: where inputs are largest, rounding comes first and most columns are left to answer it.
Scales are chosen before, so that this order may cross groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..errors import FormatError, WeightError
from ..formats import ALL, FormatSpec, affine, reference
from ..formats.algebra import levels_of
from ..formats.codes import gen_values, nearest_code
from ..formats.layout import pack_plane
from ..formats.search import fit
from ..formats.storage import Entries
from .cholesky import inverse_factor_

DAMPING = 0.01
"""Share of the mean diagonal of H that is added to it (the paper's value) …"""

STRONGEST = 10.0
"""… ten times as much where H has no Cholesky factor with it, up to this."""

BLOCK = 128
"""Columns worked on before the rest of the matrix is brought up to date."""

SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Shares of a group's range that are tried for its scale."""

CHUNK_ELEMENTS = 1 << 25
"""Weights worked on at a time: 128 MiB in float32, of which three copies are alive."""


def why_not(spec: FormatSpec) -> str | None:
    """Why GPTQ cannot serve a format; None if it can. It serves all whose scales can be searched for, but for one with a
    quantizer of its own, whose scales are not known to be good for other codes than its own."""
    if spec.quantizer is not None:
        return f"format {spec.name} has its own quantizer"
    form = affine(spec)
    try:
        levels_of(spec, form.coeff), levels_of(spec, form.offset)
    except FormatError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class Curvature:
    """What the inputs of a layer say about its weights: made once, used for every weight that takes these inputs.

    ``order`` int64 ``[cols]``: columns in the order of rounding. ``upper`` float32 ``[cols, cols]``: upper Cholesky factor
    of the inverse of the damped H in that order. ``importance`` float32 ``[cols]``: the damped diagonal of H. ``damping``:
    the share of the mean diagonal that it took.
    """

    order: torch.Tensor
    upper: torch.Tensor
    importance: torch.Tensor
    damping: float = DAMPING

    @staticmethod
    def of(hessian: torch.Tensor, cols: int, layer: str = "weight", overwrite: bool = False) -> Curvature:
        """From H float32 ``[K, K]``, the sum of x xᵀ over inputs, padded to ``cols`` columns.

        Inputs that were always zero get the mean diagonal, so that their weights are rounded to nearest. ``overwrite``: H is
        not needed again, so the factor takes its memory (where ``cols`` is K), and 12·K² bytes are alive at most; else 16·K².
        Raises :class:`~qcompile.errors.WeightError` when H has NaN or infinite values, or no Cholesky factor under any damping.
        """
        if not all(bool(torch.isfinite(rows).all()) for rows in hessian.split(BLOCK)):
            raise WeightError(f"{layer}: the inputs seen at calibration have NaN or infinite values; call the compiled model "
                              "first with finite inputs, or compile with rounding='nearest'")  # fmt: skip
        own, damping = hessian if overwrite else hessian.clone(), DAMPING
        while damping <= STRONGEST:
            if (made := _damped(own, cols, damping)) is not None:
                return made
            damping *= 10
        raise WeightError(f"{layer}: H = XᵀX has no Cholesky factor even with {STRONGEST:g} times its mean diagonal added, so it "
                          "is no sum of squares; give it other samples, method='imatrix' or rounding='nearest'")  # fmt: skip


def _damped(hessian: torch.Tensor, cols: int, damping: float) -> Curvature | None:
    """That of H + ``damping`` · its mean diagonal; None where it has no Cholesky factor. Works in float64, on one matrix beside
    H, whose memory the factor takes in the end if it has its size."""
    k = len(hessian)
    diagonal = F.pad(hessian.diagonal().to(torch.float64), (0, cols - k))
    mean = diagonal[:k].mean().clamp_min(1e-12)
    diagonal = torch.where(diagonal <= 0, mean, diagonal + damping * mean)
    importance = diagonal.to(torch.float32)
    importance[k:] = 0.0
    order = importance.argsort(descending=True, stable=True)  # padding is last
    work = _reversed(hessian, order, cols)
    work.diagonal().copy_(diagonal[order].flip(0))
    if not inverse_factor_(work):
        return None
    upper = hessian if cols == k else torch.empty(cols, cols, device=hessian.device)
    for start in range(0, cols, BLOCK):
        part = work[start : start + BLOCK]
        upper[cols - start - len(part) : cols - start] = part.flip(0, 1)
    return Curvature(order, upper, importance, damping)


def _reversed(hessian: torch.Tensor, order: torch.Tensor, cols: int) -> torch.Tensor:
    """``hessian`` ``[K, K]`` with rows and columns in the reverse of ``order``, in float64; padding is zero, and comes first."""
    k = len(hessian)
    made, last = torch.zeros(cols, cols, dtype=torch.float64, device=hessian.device), order[:k].flip(0)
    for rows, part in zip(last.split(BLOCK), made[cols - k :, cols - k :].split(BLOCK), strict=True):
        part.copy_(hessian[rows][:, last])
    return made


def quantize(
    spec: FormatSpec, weight: torch.Tensor, hessian: torch.Tensor | Curvature, layer: str = "weight"
) -> list[torch.Tensor]:
    """Stored planes, in spec order, of a float ``[N, K]`` weight under ``hessian`` float32 ``[K, K]``, the sum of x xᵀ over
    inputs.

    Scales and offsets of a group minimize its squared error weighted by the diagonal of H. Rows are worked on in chunks.
    Raises :class:`~qcompile.errors.FormatError` for formats with their own quantizer (see :func:`why_not`),
    :class:`~qcompile.errors.WeightError`, naming ``layer``, when weight or Hessian have NaN or infinite values.
    """
    if (reason := why_not(spec)) is not None:
        raise FormatError(f"{layer}: no rounding by GPTQ, {reason}; compile with rounding='nearest'")
    n, k = weight.shape
    cols = spec.whole(k)
    curvature = hessian if isinstance(hessian, Curvature) else Curvature.of(hessian, cols, layer)
    fixed = reference.whole_tensor_entries(spec, weight, layer)
    parts = [_round_rows(spec, chunk, curvature, cols, fixed) for _, chunk in
             reference.chunks(spec, weight, layer, CHUNK_ELEMENTS)]  # fmt: skip
    entries = {p.name: parts[0][p.name] if p.rows == ALL else torch.cat([part[p.name] for part in parts]) for p in spec.planes}
    planes = [stored for p in spec.planes for stored in pack_plane(spec, p, entries[p.name], n, k)]
    return planes + reference.columns(spec, k, weight.device)


def quantize_all(
    weights: Sequence[tuple[FormatSpec, torch.Tensor, str]], hessian: torch.Tensor, factors: torch.Tensor | None = None
) -> list[tuple[list[torch.Tensor], float]]:
    """What :func:`quantize` gives of each (format, weight ``[N, K]`` over ``factors`` ``[K]``, layer), all of layers with the
    inputs of ``hessian``, and the damping that it took. ``hessian`` is spoilt: one factor is alive at a time, the last one in
    its memory."""
    widths = [spec.whole(weight.shape[1]) for spec, weight, _ in weights]
    found: dict[int, tuple[list[torch.Tensor], float]] = {}
    for cols in (distinct := list(dict.fromkeys(widths))):
        here = [at for at, width in enumerate(widths) if width == cols]
        curvature = Curvature.of(hessian, cols, weights[here[0]][2], overwrite=cols == distinct[-1])
        for at in here:
            spec, weight, layer = weights[at]
            divided = weight if factors is None else weight.to(torch.float32) / factors
            found[at] = quantize(spec, divided, curvature, layer), curvature.damping
        del curvature, divided  # before the next are made
    return [found[at] for at in range(len(weights))]


def _round_rows(
    spec: FormatSpec, weight: torch.Tensor, curvature: Curvature, cols: int, fixed: Entries
) -> dict[str, torch.Tensor]:
    """Plane entries of float32 rows ``[N, K]``: codes ``[N, cols]``, scales as :func:`~.search.fit` gives them."""
    n, k = weight.shape
    group = spec.period or cols
    padded, _ = reference.padded(spec, weight)  # the importance of the padding is 0
    found = fit(spec, padded, curvature.importance, fixed, SHRINKS)
    # One column of the weight is one contiguous row here.
    scale = found.scale.t().contiguous()
    offset = found.offset.t().contiguous() if found.offset is not None else torch.zeros_like(scale)
    work = padded.t()[curvature.order].contiguous()
    codes = _round_columns(spec, work, scale, offset, curvature, group)
    sorted_back = torch.empty_like(codes)
    sorted_back[curvature.order] = codes
    sorted_back[k:] = 0
    return found.entries | {spec.code.name: sorted_back.t().contiguous().view(spec.code.entry_dtype)}


def _round_columns(
    spec: FormatSpec, work: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, curvature: Curvature, group: int
) -> torch.Tensor:
    """Codes, uint8 ``[cols, N]``, of ``work`` ``[cols, N]`` (overwritten), both in the order of rounding.

    ``scale`` and ``offset`` are ``[groups, N]``, groups in the order of the weight.
    """
    upper, cols = curvature.upper, len(work)
    groups = (curvature.order // group).tolist()
    diagonal = upper.diagonal().tolist()
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    for start in range(0, cols, BLOCK):
        stop = min(start + BLOCK, cols)
        errors = torch.empty_like(work[start:stop])
        for at in range(start, stop):
            column, s, o = work[at], scale[groups[at]], offset[groups[at]]
            code = nearest_code(spec, column.sub(o).div_(torch.where(s == 0, 1.0, s)))
            codes[at] = code.view(torch.uint8)
            rounded = gen_values(spec, code).mul_(s).add_(o)
            error = torch.sub(column, rounded, out=errors[at - start]).div_(diagonal[at])
            work[at + 1 : stop].addr_(upper[at, at + 1 : stop], error, alpha=-1)
        work[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
    return codes
