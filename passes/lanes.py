"""Several calls of one model in lock step: each stops at the linear layers whose weights are yet to be packed.

Every call runs in a thread of its own, of which one at a time runs: only so can a call stop inside a graph that Dynamo
compiled, be it the model's only one or one of many between graph breaks, and go on later with all its Python state. Beside
each a second call of the same sample may go, its twin, whose weights stay in float.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .walk import Stop

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Cancelled(BaseException):
    """Raised inside a call that is not to go on; passes by ``except Exception`` of the model."""


class Lane:
    """The call ``function(*args, **kwargs)`` of sample ``number``; ``stop`` is where it waits (None: it has returned). Its
    ``twin`` is a lane of the same sample whose weights stay ``in_float``."""

    def __init__(self, number: int, function: Callable[..., Any], call: Call, in_float: bool = False) -> None:
        self.number, self.in_float = number, in_float
        self.stop: Stop | None = None
        self.twin: Lane | None = None
        self._function, self._call = function, call
        self._error: BaseException | None = None
        self._cancelled = False
        self._goes, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        context, modes = contextvars.copy_context(), _modes()
        self._thread = threading.Thread(target=context.run, args=(self._run, modes), daemon=True,
                                        name=f"qcompile calibration {number}")  # fmt: skip

    def advance(self) -> None:
        """Goes on to the next stop, or to the end. Raises what the call raised, with a note that names the sample."""
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._goes.release()
        self._waits.acquire()
        if self._error is not None:
            self._error.add_note(f"raised by sample {self.number} of the data given for calibration: {_described(self._call)}")
            raise self._error

    @property
    def returned(self) -> bool:
        return self._thread.ident is not None and self.stop is None

    def cancel(self) -> None:
        """Unwinds a call that waits, and returns when its thread is over."""
        if self._thread.ident is not None:
            self._cancelled = True
            self._goes.release()
            self._thread.join()

    def wait_at(self, stop: Stop) -> None:
        """Called inside the lane's thread: returns when the lane is advanced again."""
        self.stop = stop
        self._waits.release()
        self._goes.acquire()
        if self._cancelled:
            raise Cancelled
        self.stop = None

    def _run(self, modes: Sequence[tuple[str, bool, torch.dtype]]) -> None:
        _here.lane = self
        args, kwargs = self._call
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
                for device, enabled, dtype in modes:
                    stack.enter_context(torch.autocast(device, enabled=enabled, dtype=dtype))
                self._function(*args, **kwargs)
        except Cancelled:
            pass
        except BaseException as error:  # shown by advance(): nobody sees a thread's own
            self._error = error
        finally:
            self.stop = None
            self._waits.release()


_here = threading.local()


def current() -> Lane:
    """The lane whose thread this is."""
    lane: Lane = _here.lane
    return lane


@contextlib.contextmanager
def lanes(function: Callable[..., Any], calls: Sequence[Call], twins: bool = False) -> Iterator[list[Lane]]:
    """A lane for each call, with a twin that has the arguments to itself if ``twins`` are asked for; those that wait when the
    block is left are cancelled."""
    made = [Lane(number, function, call) for number, call in enumerate(calls)]
    if twins:
        for lane, call in zip(made, calls, strict=True):
            lane.twin = Lane(lane.number, function, _copied(lane.number, call), in_float=True)
    try:
        yield made
    finally:
        for lane in made:
            for each in (lane, lane.twin):
                if each is not None:
                    each.cancel()


def _copied(number: int, call: Call) -> Call:
    """The ``call`` of sample ``number`` with memory of its own: what is written to in one, such as a cache, is not seen by the
    other. What cannot be copied raises its own error, with a note."""
    tensors = [v for v in pytree.tree_leaves(call) if isinstance(v, torch.Tensor)]
    try:
        return copy.deepcopy(call, {id(t): t.detach().clone().requires_grad_(t.requires_grad) for t in tensors})
    except Exception as error:
        error.add_note(f"raised by copying sample {number} of the data given for calibration, {_described(call)}: the float "
                       "model takes it as well; give arguments that can be copied, or method='gptq'")  # fmt: skip
        raise


def _modes() -> list[tuple[str, bool, torch.dtype]]:
    """Autocast as this thread has it: new threads start without."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices if torch.is_autocast_enabled(d)]


def _described(call: Call) -> str:
    args, kwargs = call
    return ", ".join([*map(_shape, args), *(f"{name}={_shape(value)}" for name, value in kwargs.items())]) or "no arguments"


def _shape(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return f"{len(value)} items" if isinstance(value, Mapping) else type(value).__name__
