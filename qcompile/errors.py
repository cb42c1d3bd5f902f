"""One class for each failure that a user can meet; every message says what was found and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class QCompileError(Exception):
    """Base of every error that qcompile raises on purpose."""


class FormatError(QCompileError):
    """A :class:`~qcompile.formats.FormatSpec` is malformed, or its value is not ``coeff * gen(codes) + offset``."""


class UnknownFormatError(QCompileError, KeyError):
    """No format, preset or scheme has this name."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        super().__init__(f"unknown format {name!r}. {nearest(name, known)}")

    __str__ = Exception.__str__


class PolicyError(QCompileError, ValueError):
    """A policy cannot be read, contradicts itself, or has a rule that matches nothing."""


class OptionError(QCompileError, ValueError):
    """``options=`` of the backend has an unknown name or a value that it cannot take."""


class WeightError(QCompileError, ValueError):
    """A weight cannot be quantized or packed: wrong rank, dtype, or values that are not finite."""


class LayoutError(QCompileError, ValueError):
    """Planes do not have the shape or dtype that their format and weight shape call for."""


class StrictError(QCompileError):
    """``strict=True`` and a site that the policy meant to quantize was left in floating point."""


class CompareError(QCompileError, ValueError):
    """Two models, or two configurations of one, cannot be compared as they were given."""


class CalibrationError(QCompileError, ValueError):
    """A model cannot be calibrated on the data given: there is none, or nothing of the model is to be packed."""


class BudgetError(QCompileError, ValueError):
    """A budget of :func:`qcompile.search` cannot be read, or no choice of formats fits it."""


class KernelBuildError(QCompileError, RuntimeError):
    """A generated kernel did not compile; the message holds the command, the source file and the compiler's words."""


class PackageError(QCompileError, RuntimeError):
    """A model cannot be made into a package that runs without Python; the message names what has no kernel in C++."""


class ShardError(QCompileError, ValueError):
    """A packed weight cannot be divided among devices as asked: a group, a block or a tile would have to be cut."""


class UnsupportedOnTensorError(QCompileError, NotImplementedError):
    """A PyTorch function has no meaning on packed weights; the message says which and how to get a float tensor."""


class FingerprintError(QCompileError, TypeError):
    """What something is made from cannot be told in full, so it is made each time and not kept in the cache."""


class CacheError(QCompileError):
    """The cache, or a bundle of it, cannot be used as asked; the message says which entry and why."""


class DamagedEntryError(CacheError):
    """An entry of the cache is not what was written. It is put aside and made again."""


class CheckpointError(QCompileError, ValueError):
    """A checkpoint cannot be read into a model, or a model cannot be written as one."""


class CorruptCheckpointError(CheckpointError):
    """What a file says of itself does not hold: sizes, offsets, shapes, dtypes, scales. The message names the tensor."""


class UnsupportedCheckpointError(CheckpointError):
    """A file is sound, but holds a type or layout that has no reader here, or that the wanted layout has no place for."""


class MissingTensorError(CheckpointError):
    """A file or shard is not there, a parameter has no tensor in the file, or a tensor of the file has no parameter."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``Did you mean …? Known: …`` for an unknown ``name``."""
    names = sorted(set(known))
    close = get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
    shown = ", ".join(names[:100]) + (", …" if len(names) > 100 else "")
    return f"{hint}Known: {shown}."
