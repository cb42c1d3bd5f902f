"""What a node costs, and which line of the model's code it comes from."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path

import torch
from torch.fx import Node

from .trace import data_inputs, example, op_name

FRAME = re.compile(r'File "([^"]+)", line (\d+)')
BIAS_FIRST = frozenset({"addmm", "baddbmm"})
LIBRARY = str(Path(torch.__file__).parent)


def flops(node: Node, weight: Node, tensor: torch.Tensor) -> int:
    """Floating-point operations of the product that ``node`` makes with the parameter ``tensor``, whose node is ``weight``:
    2 · rows · N · K, where rows are the vectors of length K in its input; a dynamic dimension counts as in the first call.

    Of a weight ``[experts, …]`` every input vector meets one expert. 0 if the sizes are unknown.
    """
    inputs = [t for n in data_inputs(node) if n is not weight and isinstance(t := example(n), torch.Tensor)]
    if op_name(node) in BIAS_FIRST:
        inputs = inputs[1:]
    x = next((t for t in inputs if t.dim() and t.is_floating_point()), None)
    if x is None or not hint(x.shape[-1]):
        return 0
    experts = tensor.shape[0] if tensor.dim() == 3 else 1
    rows = math.prod(map(hint, x.shape)) // hint(x.shape[-1])
    return 2 * rows * math.prod(map(hint, tensor.shape)) // hint(experts)


def hint(size: object) -> int:
    """A dimension as a number: that of the first call if it is symbolic."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)  # type: ignore[call-overload]


def source(node: Node) -> str:
    """``"file:line"`` of the innermost line outside PyTorch that the node was traced from; empty when none is known."""
    return _own_line(node.meta.get("stack_trace") or "")


@functools.lru_cache(maxsize=256)
def _own_line(trace: str) -> str:
    """The layers of a model have the same traces, one after the other."""
    frames = FRAME.findall(trace)
    own = [f"{path}:{line}" for path, line in frames if not path.startswith(LIBRARY)]
    return own[-1] if own else ""
