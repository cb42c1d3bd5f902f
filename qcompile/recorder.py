"""The plan of each model alive: what its compilations decided, kept for as long as the model lives."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import nn

from .plan import Plan, Record, Site
from .policy import Policy


class Recorder:
    """Collects the records of all graphs of one model into one :class:`~qcompile.plan.Plan`; ``policy`` is the one that
    decided last. ``failures`` says by a parameter's name or a scheme's key why it is left in floating point whatever the policy
    says."""

    def __init__(self) -> None:
        self.plan = Plan()
        self.policy: Policy | None = None
        self.failures: dict[str, str] = {}

    def add(self, *records: Record) -> None:
        """For a site that was recorded before, the latest record stands."""
        self.plan = self.plan.merge(records)

    def find(self, site: Site) -> Record | None:
        """The record of a site of this name and operator."""
        return next((r for r in self.plan if r.decision.site.key == site.key), None)

    def sites(self) -> Iterable[Site]:
        return (r.decision.site for r in self.plan)


_recorders: weakref.WeakKeyDictionary[nn.Module, Recorder] = weakref.WeakKeyDictionary()


def recorder_of(model: nn.Module | None) -> Recorder:
    """The recorder of a model, by its outermost module; a fresh one that nobody keeps for None."""
    return Recorder() if model is None else _recorders.setdefault(model, Recorder())
