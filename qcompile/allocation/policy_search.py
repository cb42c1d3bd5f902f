"""The search: measure every layer in every format, then choose."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..comparison import arguments
from ..divergence import check_evaluates
from ..errors import CompareError, OptionError
from ..evaluation import parameter_bytes
from ..formats import Scheme
from ..owners import unwrapped
from .budget import SECONDS, Budget
from .candidates import Layer, Times, layers_of, schemes_of
from .curvature import Curvature
from .knapsack import Solution
from .result import Search
from .sensitivity import Sensitivity
from .table import Candidate, Table

CURVATURE = "curvature"
SENSITIVITIES = ("measured", CURVATURE)


def search(
    model: nn.Module, data: Iterable[Any], budget: int | str | Budget, *, formats: Iterable[Any] | None = None,
    sensitivity: str = "measured", measure_total: bool = True, progress: bool = True,
) -> Search:  # fmt: skip
    """The format of every layer of the float ``model`` that costs least accuracy within ``budget``.

    ``budget``: bytes of all parameters (an int, or "2.1 GB"), bits per weight of the layers that are decided on ("4.25 bits",
    scales and padding included), or seconds of one token through these layers ("1.2 ms": each kernel timed on this machine).
    ``formats``: names, Schemes or FormatSpecs, and "float" if layers may stay as they are; None: a ladder from 2.5 bits to float.
    ``data``: inputs as for :func:`qcompile.compare`, a few thousand tokens like those to come; labels are not needed.

    For layer i and candidate c the loss d_ic is measured on ``data`` with this weight packed, run in its own kernel, and all
    else float: mean KL(float‖packed) a position where the output is logits, else ‖y − y₀‖² / ‖y₀‖². The choice minimizes Σ_i d_ic
    exactly (multiple-choice knapsack, by mixed-integer programming). Losses of small, independent changes add up; how well these
    did is ``measured`` against ``point.predicted``, unless ``measure_total`` is false. A tied weight is one layer; q, k and v may
    differ.

    ``sensitivity="curvature"`` estimates the losses by backward passes instead (:class:`.curvature.Curvature`).

    Costs layers × candidates calls of the model per item, and holds the float outputs and one packed candidate at a time; the
    total holds the chosen weights. Every loss is kept in the cache as it comes, so a search that was stopped goes on, and another
    budget costs nothing more. The model is not changed.

    Raises :class:`~qcompile.errors.BudgetError` for budgets that cannot be read or met, before anything is measured,
    :class:`~qcompile.errors.OptionError` for another ``sensitivity``, and :class:`~qcompile.errors.CompareError` for no data,
    packed models, training mode, and outputs that are not finite.
    """
    if sensitivity not in SENSITIVITIES:
        raise OptionError(f"sensitivity={sensitivity!r} of search: use one of {', '.join(map(repr, SENSITIVITIES))}")
    wanted, base, items = Budget.parse(budget), unwrapped(model), list(data)
    if not items:
        raise CompareError("no data: search needs at least one input; give a list of tensors, tuples or dicts of arguments")
    check_evaluates(base, "the model")
    items = [_without_labels(item) for item in items]
    with torch.no_grad():
        layers = layers_of(base, items[0])
        schemes = [schemes_of(formats, layer) for layer in layers]
        other = parameter_bytes(base) - sum(layer.float_bytes for layer in layers)
        empty = Table(tuple(layers), _costs(base, layers, schemes, wanted), other, "")
        empty.best(wanted)  # raises where no choice fits
        runs = Sensitivity(base, items)
        table = _measured(empty, runs, Curvature(runs, layers) if sensitivity == CURVATURE else None, progress)
        solution = table.best(wanted)
        total = _total(table, solution, runs) if measure_total else None
        return Search.of(table, wanted, solution, table.front(wanted.unit), total)


def _costs(
    model: nn.Module, layers: list[Layer], schemes: list[list[Scheme | None]], budget: Budget
) -> tuple[tuple[Candidate, ...], ...]:
    """Candidates whose losses are not known yet."""
    times = Times(model) if budget.unit == SECONDS else None
    return tuple(
        tuple(Candidate(s, layer.nbytes(s), 0.0, times(layer, s) if times is not None else None) for s in row)
        for layer, row in zip(layers, schemes, strict=True)
    )


def _measured(table: Table, runs: Sensitivity, curvature: Curvature | None, progress: bool) -> Table:
    losses = iter(_tracked(table, runs, curvature, progress))
    rows = tuple(
        tuple(Candidate(c.scheme, c.nbytes, next(losses), c.seconds) for c in row) for row in table.candidates
    )
    return Table(table.layers, rows, table.other_bytes, runs.measure)


def _tracked(table: Table, runs: Sensitivity, curvature: Curvature | None, progress: bool) -> Iterator[float]:
    from rich.console import Console
    from rich.progress import track

    pairs = [(layer, c.scheme) for layer, row in zip(table.layers, table.candidates, strict=True) for c in row]
    console = Console(stderr=True)
    shown = track(pairs, "losses of layers", console=console, transient=True, disable=not (progress and console.is_terminal))
    for layer, scheme in shown:
        if scheme is None:
            yield 0.0
        elif curvature is not None:
            yield curvature.loss(layer, layer.packed(runs.reference, scheme))
        else:
            yield _loss(layer, scheme, runs)


def _loss(layer: Layer, scheme: Scheme, runs: Sensitivity) -> float:
    def make() -> float:
        return runs.loss({layer.parameter: layer.packed(runs.reference, scheme)})

    return runs.kept(layer.parameter, scheme, make)


def _total(table: Table, solution: Solution, runs: Sensitivity) -> float:
    """The loss of all choices together."""
    chosen = [(layer, row[i].scheme) for layer, row, i in zip(table.layers, table.candidates, solution.chosen, strict=True)]
    return runs.loss({layer.parameter: layer.packed(runs.reference, scheme) for layer, scheme in chosen if scheme is not None})


def _without_labels(item: Any) -> Any:
    args, kwargs = arguments(item)
    return item if "labels" not in kwargs else {k: v for k, v in kwargs.items() if k != "labels"}
