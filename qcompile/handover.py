"""What a start that finds its weights packed leaves for after the first call: to free the float weights, and to copy planes
out of the store's files.

For gigabytes the system takes as long for either as some calls of the model take. A thread does it soon, or at once when someone
looks at the planes; compiled code may go on meanwhile, on the pages of the files.
"""

from __future__ import annotations

import atexit
import threading
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .tensor import QuantizedTensor

GRACE = 1.0
"""Seconds for the first call."""

_waiting: list[Handover] = []


class Handover(threading.Thread):
    """Frees the memory of ``floats``, aliases of weights that all others have let go of, then gives the planes of ``packed``
    memory of their own."""

    def __init__(self, floats: list[torch.Tensor], packed: list[QuantizedTensor]) -> None:
        super().__init__(name="qcompile handover", daemon=True)
        self.due = threading.Event()
        self._floats, self._packed, self._abandoned = floats, packed, False

    def run(self) -> None:
        self.due.wait(GRACE)
        try:
            with torch.inference_mode():  # there every tensor may be changed, also those made there
                while self._floats and not self._abandoned:
                    self._floats.pop().set_()  # type: ignore[call-overload]  # frees without the interpreter's lock
            while self._packed and not self._abandoned:
                self._packed.pop().own_planes_()
        finally:
            _waiting.remove(self)

    def abandon(self) -> None:
        self._abandoned = True
        self.due.set()


def later(floats: list[torch.Tensor], packed: list[QuantizedTensor]) -> None:
    """Begins a :class:`Handover`, which takes both lists."""
    handover = Handover(floats, packed)
    _waiting.append(handover)
    handover.start()


def settle() -> None:
    """Returns when nothing is left to do."""
    for handover in tuple(_waiting):
        if handover is not threading.current_thread():
            handover.due.set()
            handover.join()


@atexit.register
def _leave() -> None:
    """The program ends, and all memory with it."""
    for handover in tuple(_waiting):
        handover.abandon()
        handover.join()
