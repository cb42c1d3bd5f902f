"""What a compilation leaves for those who look inside: artefacts of ``TORCH_LOGS``, structured traces that ``tlparse`` shows,
and a folder for each graph under ``TORCH_COMPILE_DEBUG=1``. Nothing is made that nobody asked for."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._guards import CompileContext
from torch._logging._internal import trace_log, trace_structured

from .kernels import source_of
from .logs import artifact
from .plan import Plan
from .report import Report

FOLDER = "qcompile"


def graph(gm: torch.fx.GraphModule, phase: str) -> None:
    """The graph ``"before"`` its weights are packed, or ``"after"``, as it is given to Inductor."""
    _leave("qcompile_graph", f"qcompile_graph_{phase}", "txt", lambda: gm.print_readable(print_output=False))


def decisions(plan: Plan) -> None:
    """The plan of one graph: a table in logs; JSON, too, in traces and folders."""
    _leave("qcompile_plan", "qcompile_plan", "txt", lambda: str(Report(plan)))
    _leave(None, "qcompile_plan", "json", plan.to_json)


def kernels(plan: Plan, device: torch.device) -> None:
    """The source of every kernel that the plan runs."""
    suffix = "py" if device.type == "cuda" else "cpp"
    for scheme in {r.decision.scheme: None for r in plan if r.decision.scheme is not None}:
        _leave("qcompile_code", f"qcompile_code_{scheme.label}", suffix, lambda s=scheme: source_of(s, device.type))  # type: ignore[misc]


def folder() -> Path | None:
    """Where ``TORCH_COMPILE_DEBUG=1`` (or ``torch._inductor.config.trace.enabled``) puts the graph under way."""
    from torch._inductor import config

    return debug_folder() if config.trace.enabled else None


def debug_folder() -> Path:
    """PyTorch's debug folder of this run, then ``qcompile``, then the number of the frame and of its compilation."""
    from torch._dynamo.utils import get_debug_dir

    number = CompileContext.current_compile_id()
    return Path(get_debug_dir()) / FOLDER / (str(number).replace("/", "_") if number is not None else "eager")


def _leave(log: str | None, name: str, suffix: str, make: Callable[[], str]) -> None:
    """Makes the text once, if anyone wants it."""
    logger = artifact(log) if log is not None else None
    logged, traced, kept = logger is not None and logger.isEnabledFor(logging.DEBUG), bool(trace_log.handlers), folder()
    if not (logged or traced or kept):
        return
    text = make()
    if logged and logger is not None:
        logger.debug("%s\n%s", name, text)
    if traced:
        kind = "json" if suffix == "json" else "string"
        payload: Any = json.loads(text) if suffix == "json" else text
        trace_structured("artifact", metadata_fn=lambda: {"name": f"{name}_{kind}", "encoding": kind}, payload_fn=lambda: payload)
    if kept:
        kept.mkdir(parents=True, exist_ok=True)
        (kept / f"{name}.{suffix}").write_text(text, encoding="utf-8")
