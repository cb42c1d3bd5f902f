"""Compiles ahead of the first request: a model is called on inputs of given shapes, beside what the program does meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from .errors import OptionError


class Warmup:
    """Calls under way. ``done`` of ``total`` are over; :meth:`wait` returns when all are."""

    def __init__(self, model: nn.Module, calls: Sequence[Call], progress: bool) -> None:
        self.total, self.done = len(calls), 0
        self._error: BaseException | None = None
        self._model, self._calls, self._progress = model, calls, progress
        self._modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()  # compiled code is guarded by them
        self._thread = threading.Thread(target=self._run, name="qcompile warm-up", daemon=True)

    def start(self) -> Warmup:
        self._thread.start()
        return self

    def wait(self, timeout: float | None = None) -> bool:
        """Whether all calls are over within ``timeout`` seconds (None: no limit). Raises what a call raised."""
        self._thread.join(timeout)
        if self._error is not None:
            raise self._error
        return not self._thread.is_alive()

    def _run(self) -> None:
        grad, inference = self._modes
        try:
            with torch.inference_mode() if inference else torch.set_grad_enabled(grad), self._bar() as bar:
                for call in self._calls:
                    self._model(*call.args, **call.kwargs)
                    self.done += 1
                    if bar is not None:
                        bar.advance(bar.task_ids[0])
        except BaseException as error:  # shown by wait(): nobody sees a thread's own
            self._error = error

    def _bar(self) -> Any:
        if not self._progress:
            return nullcontext()
        from rich.console import Console
        from rich.progress import Progress

        bar = Progress(console=Console(stderr=True), transient=True)
        bar.add_task("qcompile: compiling ahead", total=self.total)
        return bar


class Call:
    """Arguments of one call."""

    def __init__(self, item: Any, dtype: torch.dtype, device: torch.device) -> None:
        self.args: tuple[Any, ...] = ()
        self.kwargs: Mapping[str, Any] = {}
        if isinstance(item, Mapping):
            self.kwargs = item
        elif isinstance(item, Sequence) and item and all(isinstance(v, int) for v in item):
            self.args = (torch.zeros(tuple(item), dtype=dtype, device=device),)
        elif isinstance(item, tuple):
            self.args = item
        else:
            raise OptionError(f"warmup: found {item!r:.80}; expected a shape such as (1, 128), a tuple of arguments or a dict")


def warmup(
    model: nn.Module, shapes: Iterable[Any], *, dtype: torch.dtype = torch.int64, background: bool = True,
    progress: bool | None = None,
) -> Warmup:  # fmt: skip
    """Calls a compiled ``model`` once for each of ``shapes``, so that what it needs is quantized, generated and compiled.

    A shape is a tuple of numbers: one tensor of zeros of ``dtype`` (token ids) on the model's device; or a tuple or dict of
    whole arguments. Calls run in the order given, in the grad or inference mode of this call, for compiled code depends on it;
    in ``background`` beside the caller, else before this returns. ``progress``: a bar on standard error (None: on a terminal).
    Raises :class:`~qcompile.errors.OptionError` for what is no shape; what a call raises comes out of :meth:`Warmup.wait`.
    """
    import sys

    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    calls = [Call(item, dtype, device) for item in shapes]
    started = Warmup(model, calls, sys.stderr.isatty() if progress is None else progress).start()
    if not background:
        started.wait()
    return started
