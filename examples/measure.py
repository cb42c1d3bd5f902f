"""What the examples measure: bytes of parameters, and two callables timed in turns."""

import statistics
import time
from collections.abc import Callable

import torch


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements; of a tensor subclass, those of the tensors it is made of."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return tensor.numel() * tensor.element_size()
    names, _ = flatten()
    return sum(tensor_bytes(getattr(tensor, name)) for name in names)


def parameter_bytes(module: torch.nn.Module) -> int:
    """Bytes of all parameters, each counted once however many modules share it."""
    return sum(tensor_bytes(parameter) for parameter in module.parameters())


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock seconds of one call, with the work it left on a CUDA device."""
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_turns(
    ours: Callable[[], object], baseline: Callable[[], object], rounds: int = 15
) -> tuple[float, float]:
    """(median seconds of `ours`, median of baseline/ours over the rounds); above 1, `ours` is faster.

    Both run once before anything is timed. A round times the two one after the other, so that a change of
    clock or a busy neighbour meets both, and the ratio is taken within a round.
    """
    for call in (ours, baseline):
        call()
    pairs = [(seconds(ours), seconds(baseline)) for _ in range(rounds)]
    return statistics.median(a for a, _ in pairs), statistics.median(b / a for a, b in pairs)
