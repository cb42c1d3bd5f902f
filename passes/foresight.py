"""Graphs that are the same over packed weights as over float ones, so that later processes need not trace them twice.

When weights are to be packed, Dynamo traces again over the packed ones, for functions may have another meaning on them. Mostly
the second graph is the first one, word for word, and the store keeps that it was. Where it was, and the store has the weights,
packed parameters take the place of the float ones in the graph's inputs and in the guards on them, and the one trace serves.
To trace float weights is also the faster: each packed one is several tensors to Dynamo.

Dynamo holds the float weights until it has compiled the frame, so planes are mapped from their files until then, which takes no
memory. On other devices than CPUs they would be a second model beside the float one; there Dynamo traces again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from qcompile import handover
from qcompile.guards import exchange_guards
from qcompile.packing import Packed, known
from qcompile.store import code_version, the_store
from qcompile.tensor import QuantizedTensor, tensor_class

from .convert import Conversion

SAME = "plan.json"
"""File that says ``true``: what it says it of is the entry's name."""

_traced_float: str | None = None
"""What the graph is named by whose weights are being packed; Dynamo compiles one frame at a time, under a lock."""

_mapped: list[QuantizedTensor] = []
"""Parameters whose planes are mapped from files while Dynamo holds the float ones."""

_floats: list[torch.Tensor] = []
"""Aliases of the float ones, so that their memory is freed when :mod:`qcompile.handover` says."""


@dataclass(frozen=True)
class Foreseen:
    """A graph that needs no second trace: ``conversions`` with their planes, the graph's ``inputs`` with them packed, and those
    as ``fakes``, without values."""

    conversions: list[Conversion]
    inputs: list[Any]
    fakes: list[Any]


def foresee(gm: fx.GraphModule, inputs: Sequence[Any], conversions: Sequence[Conversion]) -> Foreseen | None:
    """Puts packed weights into ``gm``, traced over the float ``inputs``, if that gives what another trace would; None if not, or
    where that is unknown. Then the next graph tells: :func:`retraced`.

    Parameters are stored in their modules when the conversions run.
    """
    global _traced_float
    _type_inputs(gm, inputs, conversions)
    _traced_float = name = named(gm)
    context = TracingContext.try_get()
    if context is None or context.fake_mode is None or the_store().find("plan", _parts(name)) is None:
        return None
    found = _packed(conversions)
    parameters = {id(c.slots[0].get()): c.traced for c in found or ()}
    if found is None or not exchange_guards(gm, inputs, parameters):  # type: ignore[arg-type]
        return None
    _traced_float = None
    _mapped.extend(c.traced for c, before in zip(found, conversions, strict=True) if before.packed is None)  # type: ignore[misc]
    _floats.extend(c.slots[0].get().data for c in conversions)  # type: ignore[union-attr]
    exchanged, fakes = [parameters.get(id(v), v) for v in inputs], list(inputs)
    for at, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        if exchanged[at] is not inputs[at]:
            fakes[at] = node.meta["example_value"] = _fake(exchanged[at], context.fake_mode)
    return Foreseen(found, exchanged, fakes)


def _type_inputs(gm: fx.GraphModule, inputs: Sequence[Any], conversions: Sequence[Conversion]) -> None:
    """Gives placeholders of ``gm`` the types that ``inputs`` will have after the ``conversions``."""
    types = {id(c.slots[0].get()): tensor_class(c.scheme, c.transposed) for c in conversions}
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        node.type = types.get(id(value), node.type)


def named(gm: fx.GraphModule) -> str:
    """SHA-256 of the text of ``gm`` and the graphs within."""
    parts = [str(m.graph) for m in gm.modules() if isinstance(m, fx.GraphModule)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def retraced(gm: fx.GraphModule) -> None:
    """Keeps, for later processes, that ``gm``, traced over packed weights, is what was traced over float ones before."""
    global _traced_float
    before, _traced_float = _traced_float, None
    if before is None or named(gm) != before:
        return
    with the_store().making("plan", _parts(before)) as slot:
        if slot.found is None:
            slot.put(lambda folder: (folder / SAME).write_text("true"))


def end() -> None:
    """At the end of a compilation: Dynamo holds no float weights any more."""
    global _traced_float
    _traced_float = None
    if _mapped:
        handover.later(_floats.copy(), _mapped.copy())
    _floats.clear()
    _mapped.clear()


def _fake(parameter: QuantizedTensor, mode: FakeTensorMode) -> QuantizedTensor:
    """What Dynamo would make of ``parameter``: planes without values. Its own way, with a symbol for every size, takes ten times
    as long."""
    planes = [FakeTensor(mode, torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device="meta"), p.device)
              for p in parameter.planes]  # fmt: skip
    made = parameter.with_planes(planes)
    made._is_param = True  # type: ignore[attr-defined]
    return made


def _parts(name: str) -> Mapping[str, Any]:
    return {"graph": name, "code": code_version("qcompile", "qcompile.passes"), "torch": torch.__version__}


def _packed(conversions: Sequence[Conversion]) -> list[Conversion] | None:
    """The conversions with the planes that the store has of their weights, mapped, or that a calibration found, and the
    parameters over them; None if one lacks."""

    def planes(conversion: Conversion) -> Packed | None:
        original = conversion.slots[0].get()
        if type(original) is not nn.Parameter or not original.is_cpu:
            return None
        return conversion.packed or known(original, conversion.scheme.format, transposed=conversion.transposed, mapped=True)

    waiting, found = iter(enumerate(conversions)), dict[int, Packed | None]()

    def drain() -> None:
        for at, conversion in waiting:  # each thread takes the next, and wakes the one that waits for all when none is left
            found[at] = planes(conversion)

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:  # digests leave the interpreter alone
        for running in [pool.submit(drain) for _ in range(threads)]:
            running.result()
    known_planes = [found[at] for at in range(len(conversions))]
    return [c.over(p) for c, p in zip(conversions, known_planes, strict=True) if p] if all(known_planes) else None
