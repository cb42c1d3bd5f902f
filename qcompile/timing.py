"""Times the linear layers of a model one by one, beside what the machine allows."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn

from .plan import Record, Site
from .report.roofline import Machine, Timing
from .tensor import QuantizedTensor

ROUNDS = 7
STREAM_BYTES = 1 << 28
"""Larger than every cache."""


def times(model: nn.Module, records: Iterable[Record]) -> dict[tuple[str, str], Timing]:
    """Seconds of one call, by site key, of every linear layer in ``records`` with its weight as ``model`` holds it now, on
    random inputs of as many rows as the first call had. Layers of one kind are timed once. Weights on the meta device, experts
    (how rows meet them is the router's choice), and sites that no call has counted, have none."""
    known: dict[tuple[object, ...], Timing] = {}
    found: dict[tuple[str, str], Timing] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for record in records:
        site = record.decision.site
        weight = parameters.get(site.parameter or "")
        if not site.is_linear or weight is None or weight.dim() != 2 or weight.is_meta or not site.flops:
            continue
        kind = (type(weight), weight.shape, weight.dtype, weight.device, site.transposed, site.flops)
        if kind not in known:
            known[kind] = _timed(weight, site)
        found[site.key] = known[kind]
    return found


def _timed(weight: torch.Tensor, site: Site) -> Timing:
    n, k = site.shape
    rows = site.flops // (2 * n * k)
    x = torch.randn(rows, k, device=weight.device).to(weight.dtype)
    stored = weight.packed_nbytes if isinstance(weight, QuantizedTensor) else weight.nbytes
    bound = machine(weight.device, weight.dtype).bound(stored + (rows * k + rows * n) * x.itemsize, site.flops)
    matrix = weight.t() if site.transposed else weight
    return Timing(bound, seconds(lambda: F.linear(x, matrix), weight.device))


@functools.cache
def machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measured once: the sum of a long vector, and a product of two 1024² matrices in ``dtype``."""
    stream = torch.zeros(STREAM_BYTES // 4, device=device)
    a = torch.ones(1024, 1024, device=device, dtype=dtype)
    return Machine(STREAM_BYTES / seconds(stream.sum, device), 2 * 1024**3 / seconds(lambda: a @ a, device))


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median over some calls after the first, in seconds."""
    call()
    taken = []
    for _ in range(ROUNDS):
        _wait(device)
        began = time.perf_counter()
        call()
        _wait(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
