"""Guards on packed parameters: one each.

One class stands for one scheme, orientation and layout, so the guard on a packed parameter itself (type, shape, dtype,
device) decides the shapes and dtypes of its planes. Dynamo adds a full set of guards for every plane, which for hundreds
of layers costs more on each call than all other guards together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._guards import Guard, TracingContext
from torch.utils.weak import TensorWeakRef

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
    if not packed:
        return 0
    guards = context.guards_context.dynamo_guards
    belongs = _inside(packed)
    redundant = [g for g in guards if _redundant(g, packed, belongs)]
    for guard in redundant:
        guards.inner.discard(guard)
    shapes = getattr(context.fake_mode, "shape_env", None)
    if shapes is not None and shapes.tracked_fakes:  # whose symbols Dynamo looks for, tensor by tensor: those have none
        shapes.tracked_fakes[:] = [t for t in shapes.tracked_fakes if not (belongs(t.source) and _fixed(t.fake))]
    return len(redundant)


def exchange_guards(gm: torch.fx.GraphModule, inputs: Sequence[Any], parameters: Mapping[int, torch.Tensor]) -> bool:
    """Has the guards of the trace under way expect ``parameters``, by the id of the input that each replaces; whether it could:
    nothing was asked of those inputs but to be the tensors that they are. If not, no guard is touched."""
    context = TracingContext.try_get()
    if context is None:
        return False
    placeholders = gm.graph.find_nodes(op="placeholder")
    new = {getattr(node, "_dynamo_source", None): parameters[id(value)]
           for node, value in zip(placeholders, inputs, strict=True) if id(value) in parameters}  # fmt: skip
    sources = set(new)
    belongs = _inside(sources)
    guards = [g for g in context.guards_context.dynamo_guards if belongs(g.originating_source)]
    found = [(g, new[g.originating_source]) for g in guards if _matches_tensor(g) and g.originating_source in sources]
    others = {g.create_fn_name() for g in guards} - {"TENSOR_MATCH", "DUPLICATE_INPUT"}
    if None in sources or len(found) != len(new) or others:
        return False
    for guard, parameter in found:
        guard.create_fn = functools.partial(guard.create_fn.func, value=TensorWeakRef(parameter))  # type: ignore[attr-defined]
    return True


def _matches_tensor(guard: Guard) -> bool:
    return guard.create_fn_name() == "TENSOR_MATCH" and isinstance(guard.create_fn, functools.partial)


def _redundant(guard: Any, packed: set[Any], belongs: Callable[[Any], bool]) -> bool:
    if guard.originating_source in packed:
        return guard.create_fn_name() in IMPLIED
    return belongs(guard.originating_source)


def _inside(packed: set[Any]) -> Callable[[Any], bool]:
    """A function of a source, asked of thousands that have most of their way in common: whether it is one of ``packed`` or of
    something inside one."""
    known: dict[int, bool] = {id(None): False}  # by identity: sources live as long as their trace, and hash slowly

    def belongs(source: Any) -> bool:
        found = known.get(id(source))
        if found is None:
            found = known[id(source)] = source in packed or belongs(getattr(source, "base", None))
        return found

    return belongs


def _fixed(fake: Any) -> bool:
    """Whether no size, stride or offset of a tensor, or of its planes, is symbolic."""
    inner = fake.planes if isinstance(fake, QuantizedTensor) else []
    return isinstance(fake, torch.Tensor) and all(
        isinstance(n, int) for t in (fake, *inner) for n in (*t.shape, *t.stride(), t.storage_offset())
    )
