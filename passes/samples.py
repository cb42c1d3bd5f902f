"""Calibrates a model on many samples: records its graphs through Dynamo, and packs its layers one group after another."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from qcompile.calibration import NEAREST, Calibrated, Calibration
from qcompile.dynamo_errors import as_themselves
from qcompile.errors import CalibrationError, FingerprintError
from qcompile.options import Options
from qcompile.owners import Owners, unwrapped
from qcompile.packing import digest
from qcompile.recorder import Recorder
from qcompile.tensor import QuantizedTensor
from qcompile.tracing import UNLIMITED

from . import heap
from .calibrate import cuda_of
from .lanes import Call, Lane, current, lanes
from .pipeline import TABLE, Compilation, why_unserved
from .session import Outcome, Session
from .walk import Walk, Weight, products

UNREACHED = "no sample reached a linear layer that multiplies by it"


class Recording:
    """A backend whose graphs run node by node in the lane of their thread. ``session`` learns which weights the policy wants;
    ``unserved`` are those that no method serves: tables of embeddings, and experts."""

    def __init__(self, session: Session, options: Options, recorder: Recorder) -> None:
        self.session, self.options, self.recorder = session, options, recorder
        self.unserved: dict[str, Weight] = {}

    def forget(self) -> None:
        """Lets go of all weights: Dynamo keeps the backend with the code that it compiled for it."""
        self.session, self.unserved = Session(self.session.method, keep=False), {}

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        compilation = Compilation(gm, example_inputs, self.options, self.recorder)
        for conversion in compilation.conversions():
            value = conversion.slots[0].get()
            name = compilation.owners.name(value) if value is not None else None
            if value is None or name is None:
                continue
            weight = Weight(name, conversion.layer, conversion.scheme, conversion.transposed, value)
            if why_unserved(weight.value, conversion.looked_up) is not None:
                self.unserved[name] = weight
            else:
                self.session.want(weight)
        nodes = products(gm)

        def call(*inputs: Any) -> Any:
            if not current().in_float:
                self.session.enter(gm, inputs)
            walk = Walk(gm, nodes, self.session, current().in_float).stops(inputs)
            while True:
                try:
                    current().wait_at(next(walk))  # without a name, so that the inputs go as soon as the lane goes on
                except StopIteration as end:
                    return end.value

        return call


@torch.no_grad()
def calibration(model: nn.Module, calls: Sequence[Call], options: Options, session: Session) -> Calibration:
    """What ``session`` finds for the weights of ``model`` that the policy of ``options`` wants packed, on ``calls``.

    The model is left as it is. Raises :class:`~qcompile.errors.CalibrationError` when it has no weight to pack; what the model
    raises on a sample has a note that tells which.
    """
    root, recorder = unwrapped(model), Recorder()
    backend = Recording(session, options, recorder)
    values = pytree.tree_leaves(list(calls))
    config: Any = torch._dynamo.config
    cuda = cuda_of([*root.parameters(), *values])
    with as_themselves(), config.patch(UNLIMITED), torch.random.fork_rng(cuda):
        # Not left to Dynamo, whose choice depends on what it has seen before, and the names of kept results on the graph.
        dynamic = len({_shapes(call) for call in calls}) > 1
        compiled = torch.compile(root, backend=backend, dynamic=dynamic)
        with heap.large_blocks_apart(), untouched(root), lanes(compiled, calls, twins=session.method.with_float) as waiting:
            _run(waiting, session, cuda)
    weights, unserved = {w.name: w for w in session.weights.values()}, backend.unserved
    backend.forget()
    if not weights and not unserved:
        raise CalibrationError(_nothing(recorder))
    entries = {name: _entry(w, session.outcomes.get(name)) for name, w in weights.items()}
    entries |= {name: _left(w, why_unserved(w.value) or TABLE) for name, w in unserved.items() if name not in entries}
    assert recorder.policy is not None
    return Calibration(recorder.policy, session.method.name, len(calls), entries, _unseen(root, recorder))


@contextlib.contextmanager
def bar(session: Session, shown: bool) -> Iterator[None]:
    """A progress bar on stderr, if it is to be ``shown``: weights packed of those that the graphs so far hold."""
    if not shown:
        yield
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(f"qcompile: {session.method.name}", total=None)
        session.done = lambda names: progress.update(task, total=len(session.weights), completed=len(session.outcomes))
        yield


def _run(waiting: Sequence[Lane], session: Session, cuda: list[torch.device]) -> None:
    """Packs what lanes stop at, that which comes first in the model first, until all have returned."""
    for lane in waiting:
        _advance(lane, cuda)
    while stopped := [(lane, lane.stop) for lane in waiting if lane.stop is not None]:
        order = {w.name: at for at, w in enumerate(session.weights.values())}
        _, first = min(stopped, key=lambda s: order[s[1].weights[0].name])
        group = {w.name for w in first.weights}
        ready = [(lane, stop) for lane, stop in stopped if stop.weights[0].name in group]
        goes = [lane for lane, _ in ready]
        session.serve(first.weights, [(lane.number, stop) for lane, stop in ready], _in_float(goes, group))
        del stopped, first, ready  # they hold the layer's inputs
        for lane in goes:
            _advance(lane, cuda)


def _in_float(waiting: Sequence[Lane], group: set[str]) -> dict[int, torch.Tensor]:
    """By sample, what the layers of ``group`` are given in the float model, if it came by them."""
    stops = [(lane.number, lane.twin.stop) for lane in waiting if lane.twin is not None]
    return {number: stop.x for number, stop in stops if stop is not None and stop.weights[0].name in group}


def _advance(lane: Lane, cuda: list[torch.device]) -> None:
    """The twin goes to its next stop as well, unless it waits for weights that are not packed, and draws the same random numbers,
    also on ``cuda``."""
    if lane.twin is not None and not lane.twin.returned:
        with torch.random.fork_rng(cuda):
            lane.twin.advance()
    lane.advance()


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Puts every buffer back as it was, which the calls may have written to or exchanged."""
    held = [(m, n, b, b.clone()) for m in model.modules() for n, b in m._buffers.items() if b is not None]
    try:
        yield
    finally:
        for module, name, buffer, value in held:
            if not torch.equal(buffer, value):
                buffer.copy_(value)
            module._buffers[name] = buffer


def _shapes(call: Call) -> tuple[Any, ...]:
    return tuple(tuple(v.shape) for v in pytree.tree_leaves(call) if isinstance(v, torch.Tensor))


def _entry(weight: Weight, outcome: Outcome | None) -> Calibrated:
    if outcome is None:
        return _left(weight, UNREACHED)
    return Calibrated(weight.layer, weight.scheme, outcome.scheme, weight.transposed, tuple(weight.value.shape), outcome.packed,
                      _digest(weight.value), outcome.method, outcome.note, outcome.nearest, outcome.error)  # fmt: skip


def _left(weight: Weight, reason: str) -> Calibrated:
    return Calibrated(weight.layer, weight.scheme, weight.scheme, weight.transposed, tuple(weight.value.shape), None,
                      _digest(weight.value), NEAREST, reason)  # fmt: skip


def _digest(value: torch.Tensor) -> str:
    try:
        return digest(value)
    except FingerprintError as error:
        raise CalibrationError(f"{error}; calibrate a model of ordinary parameters") from error


def _unseen(root: nn.Module, recorder: Recorder) -> tuple[str, ...]:
    """Matrices that no graph held."""
    owners, seen = Owners(), {site.parameter for site in recorder.sites()}
    named = {owners.name(p): p for p in root.parameters()}
    return tuple(n for n, p in named.items() if n and p.dim() >= 2 and n not in seen and not isinstance(p, QuantizedTensor))


def _nothing(recorder: Recorder) -> str:
    reasons = [f"{r.decision.site.name}: {r.decision.reason}" for r in recorder.plan if r.decision.reason is not None]
    found = "; ".join(reasons[:4]) or "no sample reached a weight"
    return f"nothing to calibrate: the policy wants no weight of this model packed ({found}); give a float model, or other rules"
