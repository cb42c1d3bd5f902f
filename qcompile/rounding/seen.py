"""What a layer's inputs say about its weight: sums over all samples, and a bounded sample of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import WeightError
from ..formats.scheme import ACTIVATIONS

CHUNK_ELEMENTS = 1 << 24
"""Inputs widened to float32 at a time."""

SAMPLE_ROWS = 512
"""Rows kept to measure output errors on, spread evenly over all samples."""


@dataclass(frozen=True)
class Seen:
    """The inputs x ``[rows, K]`` of layers that take the same ones, float32.

    ``mean_square``, ``mean_abs`` and ``largest`` ``[K]``: mean of x², mean and maximum of |x|. ``sample`` ``[R, K]``: some of
    the rows. ``hessian`` ``[K, K]``: Σ x xᵀ, where it was asked for. ``drift`` ``[K, K]``: as :func:`drift`, where the float
    model ran as well.
    """

    rows: int
    mean_square: torch.Tensor
    mean_abs: torch.Tensor
    largest: torch.Tensor
    sample: torch.Tensor
    hessian: torch.Tensor | None
    drift: torch.Tensor | None = None

    @staticmethod
    def of(inputs: Sequence[tuple[int, torch.Tensor]], layer: str, with_hessian: bool) -> Seen:
        """From (number of the sample, x ``[..., K]``). Raises :class:`~qcompile.errors.WeightError`, naming ``layer`` and the
        sample, for NaN or infinite values."""
        k, device = inputs[0][1].shape[-1], inputs[0][1].device
        square, absolute, largest = (torch.zeros(k, dtype=torch.float64, device=device) for _ in range(3))
        hessian = torch.zeros(k, k, dtype=torch.float32, device=device) if with_hessian else None
        rows, kept = 0, []
        for number, x in inputs:
            flat = x.detach().reshape(-1, k)
            rows += len(flat)
            kept.append(_spread(flat, -(-SAMPLE_ROWS // len(inputs))))
            for part in flat.split(max(1, CHUNK_ELEMENTS // k)):
                wide = part.to(torch.float32)
                size = wide.abs()
                if not torch.isfinite(total := size.sum(0)).all():
                    raise WeightError(_not_finite(layer, number, size))
                absolute += total
                square += wide.square().sum(0)
                largest = torch.maximum(largest, size.amax(0)) if len(size) else largest
                if hessian is not None:
                    hessian.addmm_(wide.t(), wide)
        mean_square, mean_abs = (t.div(max(rows, 1)).to(torch.float32) for t in (square, absolute))
        return Seen(rows, mean_square, mean_abs, largest.to(torch.float32), torch.cat(kept), hessian)


def drift(inputs: Sequence[tuple[int, torch.Tensor]], in_float: Mapping[int, torch.Tensor], layer: str) -> torch.Tensor:
    """Σ (x' − x)ᵀ x, float32 ``[K, K]``, over rows x of (number of the sample, x ``[..., K]``), x' those that the float model has
    ``in_float``, by sample: x itself where that went another way, and has none or another count. Raises
    :class:`~qcompile.errors.WeightError`, naming ``layer`` and the sample, for NaN or infinite values."""
    k = inputs[0][1].shape[-1]
    total = torch.zeros(k, k, device=inputs[0][1].device)
    for number, x in inputs:
        exact = in_float.get(number, x)
        if exact is x or exact.shape != x.shape:
            continue
        rows = max(1, CHUNK_ELEMENTS // k)
        for part, other in zip(x.reshape(-1, k).split(rows), exact.reshape(-1, k).split(rows), strict=True):
            wide = part.to(torch.float32)
            off = other.to(torch.float32) - wide
            if not torch.isfinite(off.sum()):
                raise WeightError(_not_finite(layer, number, off))
            total.addmm_(off.t(), wide)
    return total


def _spread(rows: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` rows, evenly spread, in float32 and memory of their own."""
    at = torch.linspace(0, max(len(rows) - 1, 0), min(count, len(rows)), device=rows.device).round().long()
    return rows[at].to(torch.float32)


def _not_finite(layer: str, number: int, size: torch.Tensor) -> str:
    columns = (~torch.isfinite(size)).any(0).nonzero().flatten().tolist()
    return (f"{layer}: the inputs seen at calibration have NaN or infinite values: in sample {number}, at {len(columns)} of "
            f"{size.shape[1]} inputs (first: {columns[:1]}); leave the sample out, calibrate in another dtype than float16, or "
            "give the layer the value 'float'")  # fmt: skip


def as_multiplied(x: torch.Tensor, activations: str | None) -> torch.Tensor:
    """Float32 ``x`` ``[R, K]`` as a kernel multiplies it: rounded per token to int8 or fp8 (see
    :class:`~qcompile.formats.Scheme`), or as it is."""
    if activations is None:
        return x
    limit = ACTIVATIONS[activations]
    scale = x.abs().amax(1, keepdim=True).div_(limit).clamp_min_(1e-30)
    codes = x / scale
    rounded = codes.round_() if activations == "int8" else codes.clamp_(-limit, limit).to(torch.float8_e4m3fn).to(torch.float32)
    return rounded * scale


def outputs(
    sample: torch.Tensor, matrix: torch.Tensor, decoded: torch.Tensor, activations: str | None,
    factors: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """xwᵀ and Q(x·f)(ŵ/f)ᵀ, float32 ``[R, N]``, of the ``sample`` of rows x ``[R, K]``: ``matrix`` w and its ``decoded`` form ŵ
    ``[N, K]``, ``factors`` f ``[K]`` on x before it is rounded to ``activations`` (None: 1)."""
    wanted = sample @ matrix.to(torch.float32).t()
    given = decoded.to(torch.float32)
    if activations is None:
        return wanted, sample @ given.t()
    f = torch.ones_like(sample[0]) if factors is None else factors
    return wanted, as_multiplied(sample * f, activations) @ (given / f).t()


def relative_error(wanted: torch.Tensor, got: torch.Tensor) -> float:
    """‖got − wanted‖ / ‖wanted‖, and ‖got‖ where that is 0."""
    scale = float(wanted.norm())
    return float((got - wanted).norm()) / scale if scale else float(got.norm())
