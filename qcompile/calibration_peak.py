"""``qcompile.calibration_memory``: what a calibration by GPTQ takes beside the float model, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .comparison import arguments
from .errors import CalibrationError, OptionError
from .formats import FormatSpec
from .formats.layout import matrix_shape
from .options import Options
from .passes.trace_ahead import Look
from .plan import Decision
from .recorder import Recorder
from .rounding import cholesky, gptq, seen
from .tracing import call_through

ROUNDING = 16
"""Bytes for each weight that is rounded at a time: the float32 weight and what the search for scales makes of it, then its
columns in the order of rounding and their codes. 32 where nothing compiles the search's C++."""

COMPARING = 12
"""Bytes for each weight whose outputs are compared at a time: the float32 weight, and the decoded one as it is made."""


@dataclass(frozen=True)
class CalibrationMemory:
    """Bytes beside the float model when ``layer`` is packed, which takes the most: ``packed``, of all weights that the policy
    packs; ``activations``, the inputs of the layer and the residual stream of all samples, and the rows kept to measure
    errors on; ``matrices``, H and its factor; ``working``, panels of the factorization or chunks of the weight."""

    layer: str
    packed: int
    activations: int
    matrices: int
    working: int

    @property
    def total(self) -> int:
        return self.packed + self.activations + self.matrices + self.working

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"total": self.total}


@torch.no_grad()
def calibration_memory(model: nn.Module, sample: Any, count: int, *, policy: Any = None) -> CalibrationMemory:
    """The most that :func:`qcompile.calibrate` by "gptq" takes beside ``model`` on ``count`` inputs like ``sample``.

    With K inputs and N outputs of a layer, of T rows over all samples in a dtype of b bytes, K′ = K in whole groups, and D inputs
    of the model's first linear layer: T·(K + D)·b + 4·512·K, and the most of

    - the factorization (:mod:`qcompile.rounding.cholesky`): 4·K² + 8·K′² and three panels of 8·256·K′,
    - the rounding: 4·K² and 16 for each of at most 2²⁵ weights,
    - the comparison of outputs: 4·K², 12 for each of at most 2²⁴ weights, and 8·512·N.

    That of the layer where it is most, and the packed weights. One H is alive at a time, and the inputs of one layer. The model
    may be on the meta device, and ``sample`` with it: only shapes are looked at. Tensors count here; compiled code, what
    libraries take for themselves and the C library's free lists come on top.

    Raises :class:`~qcompile.errors.OptionError` for a ``count`` below 1, ``CalibrationError`` where the policy packs nothing
    that GPTQ serves, and the errors of policies.
    """
    if not isinstance(count, int) or count < 1:
        raise OptionError(f"calibration_memory: count must be a whole number of 1 or more, found {count!r}")
    recorder = Recorder()
    args, kwargs = arguments(sample)
    call_through(model, Look(Options.parse({"policy": policy}, None), recorder), args, kwargs)
    decisions = list({r.decision.site.parameter: r.decision for r in recorder.plan}.values())
    width = next((d.site.shape[1] for d in decisions if d.site.is_linear and len(d.site.shape) == 2), 0)
    served = [d for d in decisions if d.scheme is not None and d.site.is_linear and len(d.site.shape) == 2
              and gptq.why_not(d.scheme.format) is None]  # fmt: skip
    if not served:
        raise CalibrationError("calibration_memory: the policy packs no linear layer of this model in a format that GPTQ serves; "
                               "give a float model, or other rules")  # fmt: skip
    packed = sum(d.scheme.format.nbytes(*matrix_shape(d.site.shape)) for d in decisions
                 if d.scheme is not None and d.site.is_linear)  # fmt: skip
    return max((_of(d, count, width, packed) for d in served), key=lambda found: found.total)


def _of(decision: Decision, count: int, width: int, packed: int) -> CalibrationMemory:
    site, scheme = decision.site, decision.scheme
    assert scheme is not None
    n, k = site.shape
    rows = count * site.flops // (2 * n * k)
    kept = min(rows, -(-seen.SAMPLE_ROWS // count) * count)
    activations = rows * (k + width) * site.dtype.itemsize + 4 * kept * k
    matrices, working = max(_phases(n, k, scheme.format, kept), key=sum)
    return CalibrationMemory(site.name, packed, activations, matrices, working)


def _phases(n: int, k: int, spec: FormatSpec, kept: int) -> Sequence[tuple[int, int]]:
    """(H and factor, all else) of the factorization, the rounding and the comparison of outputs."""
    cols = spec.whole(k)
    hessian, factor = 4 * k * k, 0 if cols == k else 4 * cols * cols
    return (
        (hessian + factor + 8 * cols * cols, 3 * 8 * cholesky.BLOCK * cols),
        (hessian + factor, ROUNDING * min(n * cols, gptq.CHUNK_ELEMENTS)),
        (hessian + factor, COMPARING * min(n * cols, seen.CHUNK_ELEMENTS) + 8 * kept * n),
    )
