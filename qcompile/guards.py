"""Guards that say nothing new: those on the planes of packed parameters.

One class stands for one scheme, orientation and layout, so the guard on a packed parameter itself (type, shape, dtype,
device) decides the shapes and dtypes of its planes. Dynamo adds a full set of guards for every plane, which for hundreds
of layers costs more on each call than all other guards together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._guards import TracingContext

from .tensor import QuantizedTensor

IMPLIED = {"TYPE_MATCH", "TENSOR_SUBCLASS_METADATA_MATCH"}
"""Guards on a packed parameter that its TENSOR_MATCH implies (exact type, dtype)."""


def drop_plane_guards(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> int:
    """Takes the guards on planes out of the trace under way; returns how many.

    Where Dynamo does not tell the sources of its inputs, all guards stay: slower, never wrong.
    """
    context = TracingContext.try_get()
    if context is None:
        return 0
    placeholders = gm.graph.find_nodes(op="placeholder")
    packed = {
        source
        for node, value in zip(placeholders, example_inputs, strict=True)
        if isinstance(value, QuantizedTensor) and (source := getattr(node, "_dynamo_source", None)) is not None
    }
    guards = context.guards_context.dynamo_guards
    redundant = [g for g in guards if _redundant(g, packed)]
    for guard in redundant:
        guards.inner.discard(guard)
    return len(redundant)


def _redundant(guard: Any, packed: set[Any]) -> bool:
    source = guard.originating_source
    if source in packed:
        return guard.create_fn_name() in IMPLIED
    while (source := getattr(source, "base", None)) is not None:
        if source in packed:
            return True
    return False
