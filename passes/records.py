"""Records of weights that were packed, and who writes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch

from qcompile.formats import Scheme
from qcompile.plan import Decision, Record
from qcompile.recorder import Recorder
from qcompile.tensor import QuantizedTensor

UNSEEN = "the layer's inputs were not seen before it was packed"

Done = Callable[[QuantizedTensor, int, float | None], None]


def packed_record(decision: Decision, packed: QuantizedTensor, before: int, decibels: float | None) -> Record:
    """The record of a weight that was packed: what runs, bytes ``before`` and after, SQNR in dB."""
    return Record(decision, kernel_name(packed.scheme, packed.device), before, packed.packed_nbytes, decibels)


def kernel_name(scheme: Scheme, device: torch.device) -> str:
    """Which generated kernel serves ``scheme`` on ``device``."""
    language = "triton" if device.type == "cuda" else "cpp"
    return f"{language} {scheme.label}"


def recording(recorder: Recorder, decision: Decision, rounding: Mapping[str, str] | None) -> Done:
    """Must not hold the compilation: it holds the float weights, which are to go one by one.

    ``rounding`` tells, by parameter, what rounded it, or why it was rounded to nearest; None where all are.
    """

    def done(packed: QuantizedTensor, before: int, decibels: float | None) -> None:
        said = decision
        if rounding is not None:
            how = rounding.get(decision.site.parameter or "", f"rounded to nearest: {UNSEEN}")
            said = dataclasses.replace(decision, rule=f"{decision.rule}; {how}")
        recorder.add(packed_record(said, packed, before, decibels))

    return done


def each(*listeners: Done) -> Done:
    def done(packed: QuantizedTensor, before: int, decibels: float | None) -> None:
        for listener in listeners:
            listener(packed, before, decibels)

    return done
