"""Equal layers as one: names with running numbers, and rows of a plan that say the same."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..plan import Record

NUMBER = re.compile(r"(?<![\w-])\d+(?![\w-])")
"""A number that stands alone between dots: the index of a layer."""


@dataclass(frozen=True)
class Row:
    """Records that differ in the numbers of their names alone, in the order of the plan."""

    records: tuple[Record, ...]

    @property
    def first(self) -> Record:
        return self.records[0]

    @property
    def name(self) -> str:
        return folded_name([r.decision.site.name for r in self.records])

    @property
    def reason(self) -> str | None:
        reasons = [r.decision.reason for r in self.records if r.decision.reason is not None]
        return folded_name(reasons) if reasons else None

    @property
    def rule(self) -> str:
        return folded_name([r.decision.rule for r in self.records])

    @property
    def bytes_before(self) -> int:
        return sum(r.bytes_before for r in self.records)

    @property
    def bytes_after(self) -> int:
        return sum(r.bytes_after for r in self.records)

    @property
    def flops(self) -> int:
        return sum(r.decision.site.flops for r in self.records)

    @property
    def sqnr(self) -> tuple[float, float] | None:
        """The lowest and the highest, where measured."""
        known = [r.sqnr for r in self.records if r.sqnr is not None]
        return (min(known), max(known)) if known else None


def rows(records: Iterable[Record], fold: bool = True) -> list[Row]:
    """Equal records as one row, at the place of the first; each its own row without ``fold``."""
    if not fold:
        return [Row((r,)) for r in records]
    groups: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(_likeness(record), []).append(record)
    return [Row(tuple(group)) for group in groups.values()]


def _likeness(record: Record) -> tuple[object, ...]:
    decision, site = record.decision, record.decision.site
    texts = (bare(site.name), bare(decision.rule), bare(decision.reason or ""))
    return (*texts, site.operator, site.roles, site.shape, site.dtype, site.flops, decision.scheme, record.kernel)


def bare(text: str) -> str:
    """``text`` with every number that stands alone replaced by ``#``."""
    return NUMBER.sub("#", text)


def folded_name(names: Sequence[str]) -> str:
    """One name for names that differ in numbers alone: ``layers.{0…31}.mlp``; gaps are listed, ``{0,2,4…7}``."""
    found = [NUMBER.findall(name) for name in names]
    columns = iter(zip(*found, strict=True))
    return NUMBER.sub(lambda _: _spans([int(n) for n in next(columns)]), names[0])


def _spans(numbers: Sequence[int]) -> str:
    distinct = sorted(set(numbers))
    if len(distinct) == 1:
        return str(distinct[0])
    runs: list[list[int]] = []
    for n in distinct:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return "{" + ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}…{r[-1]}" for r in runs) + "}"
