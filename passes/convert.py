"""Turns float parameters into packed ones, in every module that owns them, and has Dynamo trace once more."""

from __future__ import annotations

import dataclasses
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch._dynamo.exc import TensorifyScalarRestartAnalysis, UnspecializeRestartAnalysis

from qcompile.dtensor import packed_in, parameter_like, part_to_pack
from qcompile.errors import QCompileError, ShardError, WeightError
from qcompile.formats import Scheme
from qcompile.owners import Slot
from qcompile.packing import Packed, packed
from qcompile.tensor import QuantizedTensor, as_parameter

ORIGINALS = "_qcompile_originals"
"""Attribute of a module that keeps its float parameters by name under ``weights="keep"``."""


@dataclass(frozen=True)
class Conversion:
    """One parameter to pack: every slot that holds it, the scheme, and who hears of the result.

    ``looked_up``: it is an embedding's table, which no calibration rounds. ``packed`` is the weight where a calibration has
    rounded it (None: round to nearest).
    ``traced``: the parameter to store, where a compiled graph expects it. ``done(packed, bytes before, SQNR in dB)`` is
    called once it is stored; ``failed(reason)``, if there is one, in place of raising when the weight cannot be packed, which
    then stays as it is.
    """

    layer: str
    slots: tuple[Slot, ...]
    scheme: Scheme
    transposed: bool
    keep: bool
    done: Callable[[QuantizedTensor, int, float | None], None]
    packed: Packed | None = None
    traced: nn.Parameter | None = None
    looked_up: bool = False
    failed: Callable[[str], None] | None = None

    def run(self) -> None:
        """Packs and stores; the float original goes when its last holder lets go. Raises ``WeightError`` naming the layer."""
        original = self.slots[0].get()
        if original is None or packed_in(original) is not None:
            return
        try:
            parameter = self.pack(original)
        except WeightError as error:
            if self.failed is None:
                raise
            self.failed(str(error))
            return
        for slot in self.slots:
            if self.keep:
                slot.module.__dict__.setdefault(ORIGINALS, {})[slot.name] = original
            slot.set(parameter)

    def over(self, made: Packed) -> Conversion:
        """The same with its planes, and the parameter over them."""
        original = self.slots[0].get()
        assert original is not None
        parameter = as_parameter(made.tensor(self.scheme, self.transposed, original.shape, original.dtype))
        return dataclasses.replace(self, packed=made, traced=parameter)

    def measure(self) -> None:
        """Packs, reports to ``done`` and lets go: what :meth:`run` would do, without doing it. A weight on the meta device has
        no values to measure."""
        original = self.slots[0].get()
        if original is not None and packed_in(original) is None and not original.is_meta:
            self.pack(original)

    def pack(self, original: torch.Tensor) -> nn.Parameter:
        """``original`` packed; ``done`` hears of it. Of a DTensor, each process packs its own part."""
        part = part_to_pack(original, self.scheme.format, self.transposed, self.layer)
        if self.packed is not None and part is not original:
            raise ShardError(f"{self.layer}: is divided among processes, and was calibrated whole; pack the whole "
                             "model with qcompile.quantize_, then divide it with qcompile.parallelize_module")  # fmt: skip
        made = self.packed or packed(part, self.scheme.format, transposed=self.transposed, layer=self.layer)
        parameter = self.traced
        if parameter is None:
            parameter = as_parameter(made.tensor(self.scheme, self.transposed, part.shape, part.dtype))
        self.done(parameter, part.nbytes, made.sqnr)  # type: ignore[arg-type]
        return parameter_like(original, parameter)


class Retrace(UnspecializeRestartAnalysis, TensorifyScalarRestartAnalysis):
    """Raised by the backend: Dynamo drops its trace, the conversions run, and Dynamo traces again.

    Dynamo asks for ``restart_reason`` after it has let go of the failed trace. Converting at that moment, and not in the
    backend, is what frees each float weight as soon as its packed form is stored: no frame of the trace holds it any more.
    The two bases are the ones that Dynamo lets through from a backend and clears its speculation log for.
    """

    def __init__(self, conversions: list[Conversion]) -> None:
        self._pending: Pending | None = Pending(conversions)
        super().__init__()

    @property
    def restart_reason(self) -> str:
        pending, self._pending = self._pending, None
        if pending is not None:
            if self.__traceback__ is not None:
                traceback.clear_frames(self.__traceback__)
            pending.run()
        return "qcompile packed weights"

    @restart_reason.setter
    def restart_reason(self, value: object) -> None:
        """Dynamo's own constructor sets a reason; ours is fixed."""


class Pending:
    """Conversions that were announced to Dynamo. Errors wait for the retrace, where Dynamo shows them to the user."""

    _error: QCompileError | None = None
    _waiting: weakref.WeakSet[Pending] = weakref.WeakSet()

    def __init__(self, conversions: list[Conversion]) -> None:
        self._conversions = conversions
        Pending._waiting.add(self)

    def run(self) -> None:
        """Runs what has not run yet, in order; stops at the first error and keeps it for :meth:`finish_all`."""
        Pending._waiting.discard(self)
        while self._conversions and Pending._error is None:
            try:
                self._conversions.pop(0).run()
            except QCompileError as error:
                Pending._error = error

    @classmethod
    def finish_all(cls) -> None:
        """Runs conversions that a torch release without the hook above left over; raises the first error of any."""
        for pending in list(cls._waiting):
            pending.run()
        error, cls._error = cls._error, None
        if error is not None:
            raise error


def restore_(model: nn.Module) -> int:
    """Puts back the float parameters that ``options={"weights": "keep"}`` kept; returns how many."""
    count = 0
    for module in model.modules():
        for name, original in module.__dict__.pop(ORIGINALS, {}).items():
            module._parameters[name] = original
            count += 1
    return count
