"""A traced graph as plain data, for pages and files."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One node that computes: its ``module`` and ``source`` ("file:line") in the model, ``shape`` and ``dtype`` of its value
    (empty if it is no tensor), the nodes it takes as ``inputs``, the ``parameters`` it takes, and the key of the ``site`` that
    it is part of."""

    name: str
    operator: str
    module: str
    source: str
    shape: tuple[int, ...]
    dtype: str
    inputs: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    site: tuple[str, str] | None = None


@dataclass(frozen=True)
class Picture:
    """A graph: ``steps`` in order of execution. ``name`` tells it from the model's other graphs."""

    name: str
    steps: tuple[Step, ...]
