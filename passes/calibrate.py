"""Packs weights so that layers' outputs change least on given inputs: runs the float model and asks each linear layer what it
is given.

Layers go in graph order, all samples together, and each passes on what its packed weight computes, so that later layers are
fitted to the errors of earlier ones. One Hessian is alive at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qcompile.packing import Packed
from qcompile.rounding.methods import METHODS

from .session import Session
from .walk import Walk, Weight, products

GPTQ = "rounded by GPTQ"
NOT_MULTIPLIED = "no linear layer of this graph multiplies by it"
FAKE = "the inputs are fake tensors"


def rounded(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any], weights: Mapping[str, Weight]
) -> dict[str, Packed | str]:
    """``weights``, by the name of the placeholder, as GPTQ packs them on one call; or the reason why it does not pack one.

    ``example_inputs`` are the real tensors of the call; tensors other than parameters are copied first, so that caches
    which the graph writes to stay as they are, and so does the state of random numbers. A weight used several times is
    fitted to the inputs of its first use alone. Raises :class:`~qcompile.errors.WeightError`, naming the layer, for weights
    or inputs with NaN or infinite values.
    """
    method = METHODS["gptq"]
    found: dict[str, Packed | str] = {name: method.why_not(w.scheme) or NOT_MULTIPLIED for name, w in weights.items()}
    served = {name: w for name, w in weights.items() if found[name] == NOT_MULTIPLIED}
    if not served:
        return found
    if any(isinstance(v, torch._subclasses.FakeTensor) for v in example_inputs):
        return found | dict.fromkeys(served, FAKE)
    session = Session(method)
    for weight in served.values():
        session.want(weight)
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(cuda_of(example_inputs)):
        try:
            session.enter(gm, example_inputs)
            for stop in Walk(gm, products(gm), session).stops(example_inputs):
                session.serve(stop.weights, [(0, stop)], {})
                del stop  # it holds the layer's inputs
        except Exception as error:
            error.add_note("raised while qcompile ran the graph once for rounding='gptq'; rounding='nearest' needs no run")
            raise
    return found | {n: session.outcomes[w.name].packed for n, w in served.items() if w.name in session.outcomes}


def cuda_of(values: Sequence[Any]) -> list[torch.device]:
    """Devices whose random numbers a run on ``values`` may draw."""
    return list({v.device for v in values if isinstance(v, torch.Tensor) and v.is_cuda})
