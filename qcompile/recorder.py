"""The plan of each model alive: what its compilations decided, kept for as long as the model lives."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from .plan import Plan, Record, Site
from .policy import Policy
from .report import Picture


class Recorder:
    """Collects the records of all graphs of one model into one :class:`~qcompile.plan.Plan`, and pictures of the ``graphs``;
    ``policy`` is the one that decided last. ``failures`` says by a parameter's name or a scheme's key why it is left in
    floating point whatever the policy says. ``tunes``: some weights of the model are trained while others are frozen;
    ``unfrozen``: names of the parameters that required grad when they were packed."""

    def __init__(self) -> None:
        self.tunes = False
        self.unfrozen: set[str] = set()
        self.policy: Policy | None = None
        self.failures: dict[str, str] = {}
        self.graphs: list[Picture] = []
        self._records: dict[tuple[str, str], Record] = {}

    @property
    def plan(self) -> Plan:
        return Plan(tuple(self._records.values()))

    def saw(self, graph: Picture) -> None:
        """Keeps the picture of a graph; of graphs that differ in sizes alone, compiled again for other ones, the latest."""
        nodes, count = _nodes(graph), len(self.graphs)
        at = next((i for i, known in enumerate(self.graphs) if _nodes(known) == nodes), count)
        self.graphs[at : at + 1] = [replace(graph, name=f"graph {at}")]

    def add(self, *records: Record) -> None:
        """For a site that was recorded before, the latest record stands."""
        self._records |= {r.decision.site.key: r for r in records}

    def find(self, site: Site) -> Record | None:
        """The record of a site of this name and operator."""
        return self._records.get(site.key)

    def sites(self) -> Iterable[Site]:
        return (r.decision.site for r in self._records.values())


def _nodes(graph: Picture) -> list[tuple[str, str, str]]:
    return [(step.name, step.operator, step.module) for step in graph.steps]


_recorders: weakref.WeakKeyDictionary[nn.Module, Recorder] = weakref.WeakKeyDictionary()


def recorder_of(model: nn.Module | None) -> Recorder:
    """The recorder of a model, by its outermost module; a fresh one that nobody keeps for None."""
    return Recorder() if model is None else _recorders.setdefault(model, Recorder())
