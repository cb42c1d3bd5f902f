"""See what happens to a model before, after, or without compiling it; and quantize ahead of time."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .calibration import Calibration
from .comparison import arguments
from .dtensor import packed_in
from .errors import CalibrationError
from .options import Options
from .owners import Owners, unwrapped
from .passes.samples import bar, calibration
from .passes.session import Session
from .passes.trace_ahead import Look
from .plan import Decision, Record, Site
from .recorder import Recorder, recorder_of
from .report import Report
from .rounding.methods import method_named
from .timing import times
from .tracing import call_through


def explain(model: nn.Module, *args: Any, policy: Any = None, measure: bool = False, **kwargs: Any) -> Report:
    """Calls ``model(*args, **kwargs)`` and reports every site: what was, or would be, done with it, and why.

    A model compiled with backend "qcompile" is called once, as it is, and the report says what its compilations did. Any other
    model is traced under ``policy`` (as ``options["policy"]``) and left untouched: each weight that the policy means is
    packed for a moment to measure its SQNR; on the meta device nothing is measured. Gradients are off. The report also holds
    pictures of the graphs that were traced. ``measure``: every linear layer, with its weight as it is in the model, is timed.
    """
    root = unwrapped(model)
    with torch.no_grad():
        recorder = recorder_of(_root(model))
        if policy is None:
            model(*args, **kwargs)
        if policy is not None or not len(recorder.plan):
            recorder = Recorder()
            look = Look(Options.parse({"policy": policy}, None), recorder)
            call_through(model, look, args, kwargs)
            for conversion in look.conversions:
                conversion.measure()
        plan = recorder.plan.merge(_unseen(model, recorder))
        return Report(plan, tuple(recorder.graphs), times(root, plan) if measure else None)


def quantize_(model: nn.Module, *args: Any, policy: Any = None, **kwargs: Any) -> Report:
    """Packs the weights that ``policy`` means in place, as the backend would on ``model(*args, **kwargs)``; returns the report.

    The model then runs packed in eager mode, and can be exported, compiled by any backend, or ahead of time
    (:func:`qcompile.package`).
    """
    from .inductor import install

    install()
    with torch.no_grad():
        recorder = recorder_of(_root(model))
        look = Look(Options.parse({"policy": policy}, None), recorder, packs=True)
        call_through(model, look, args, kwargs)
        for conversion in look.conversions:
            conversion.run()
        return Report(recorder.plan.merge(_unseen(model, recorder)), tuple(recorder.graphs))


def calibrate(
    model: nn.Module, data: Iterable[Any], *, policy: Any = None, method: str = "gptq", progress: bool | None = None
) -> Calibration:
    """Packs the weights that ``policy`` means so that layers' outputs change least on ``data``, and leaves ``model`` as it is.

    ``data``: inputs as those to come, a tensor, a tuple of arguments or a dict of them each, of any lengths: a few thousand
    to a hundred thousand tokens, with little padding. All samples go through the model together, layer by layer, each layer
    seeing what the packed ones before it compute. ``method``: "gptq" (Frantar et al. 2023), "awq" (Lin et al. 2024),
    "awq+gptq", "smoothquant" (Xiao et al. 2023) or "imatrix" (scales weighted by mean squares, as llama.cpp's). For "awq" samples
    go through the float model as well, which every layer's outputs are to be near to. A layer whose format the method does not
    serve is rounded to nearest, and the table says why. Each finished layer is kept in the cache, so a run that was killed goes
    on where it was. ``progress``: a bar on stderr (None: on terminals).

    Raises :class:`~qcompile.errors.CalibrationError` without data or without a weight to pack, ``OptionError`` for an unknown
    method, ``PolicyError`` for a bad policy, ``WeightError``, naming layer and sample, for NaN and infinite values. What the
    model raises on a sample has a note that says which.
    """
    chosen, options = method_named(method), Options.parse({"policy": policy}, None)
    if isinstance(data, (Mapping, torch.Tensor)):
        raise CalibrationError(f"data is one {type(data).__name__}; calibrate takes a list of inputs: write [data]")
    calls = [arguments(item) for item in data]
    if not calls:
        raise CalibrationError("no data: calibrate needs at least one input; give a list of tensors, of tuples or of dicts")
    session = Session(chosen)
    with bar(session, sys.stderr.isatty() if progress is None else progress):
        return calibration(model, calls, options, session)


def _root(model: nn.Module) -> nn.Module:
    """The outermost module that holds ``model``: records are kept for it, because names start there."""
    return Owners().path(unwrapped(model))[0]


def _unseen(model: nn.Module, recorder: Recorder) -> list[Record]:
    """Records of the weights that no graph held: Dynamo ran their part of the model eagerly, or the inputs did not reach it."""
    reason = "no graph used the weight: Dynamo ran this part of the model eagerly, or these inputs do not reach it"
    owners, seen = Owners(), {site.parameter for site in recorder.sites()}
    records = []
    for parameter in unwrapped(model).parameters():
        name = owners.name(parameter)
        if parameter.dim() < 2 or name is None or name in seen or packed_in(parameter) is not None:
            continue
        site = Site(name.removesuffix(".weight"), "other", weight=name, shape=tuple(parameter.shape), dtype=parameter.dtype,
                    unsupported=reason, parameter=name)  # fmt: skip
        records.append(Record.of(Decision(site, None, "none", reason)))
    return records
