"""The gradient of a packed linear layer's input, without a float copy of its weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .formats import reference, scheme_of
from .formats.layout import columns_multiple, columns_of
from .kernels import Prepared, for_key

CHUNK_BYTES = 1 << 21
"""Of decoded weights that exist at a time: they stay in a processor's caches until they are multiplied."""


def times_weight(grad: torch.Tensor, planes: Sequence[torch.Tensor], key: str, n: int, k: int) -> torch.Tensor:
    """``grad [..., N]`` (fp32, fp16, bf16) times the N×K weight of scheme ``key``: ``[..., K]`` in grad's dtype.

    The weight is decoded by columns, :data:`CHUNK_BYTES` at a time, in the dtype that is multiplied, so that each element of
    the result is one sum of the vendor's product, rounded once. On CPUs float16 is multiplied in float32, which is what their
    units have. Beside chunk and result there is the chunk's own result, and its planes. Activations that a scheme quantizes
    count as if they were not (the straight-through estimator: Bengio et al., "Estimating or Propagating Gradients", 2013).
    Raises :class:`~qcompile.errors.LayoutError` for planes that do not fit.
    """
    spec, kernels = scheme_of(key).format, for_key(key, grad.device.type)
    decode = (kernels.inner if isinstance(kernels, Prepared) else kernels).decode
    dtype = torch.float32 if grad.is_cpu and grad.dtype == torch.float16 else grad.dtype
    rows = grad.reshape(-1, n).to(dtype)
    out = torch.empty(len(rows), k, dtype=dtype, device=grad.device)
    unit = columns_multiple(spec)
    step = max(unit, CHUNK_BYTES // max(n * dtype.itemsize, 1) // unit * unit)
    for start in range(0, k, step):
        part = out[:, start : start + step]
        part.copy_(rows @ decode(columns_of(spec, planes, start, start + step), n, part.shape[1], dtype))
    return reference.in_place(spec, out, planes).to(grad.dtype).view(*grad.shape[:-1], k)
