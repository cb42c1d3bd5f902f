"""How coeff and offset are stored: factored into the planes of a product, coarsest first, each rounded as it is stored."""

from __future__ import annotations

import torch

from .algebra import Level, Product, affine, finite_range, levels_of, zero_points
from .codes import nearest_entry
from .spec import ALL, FormatSpec, Plane

Entries = dict[str, torch.Tensor]
"""Entries of planes by name: ``[rows, entries]``."""


class Storage:
    """Stores coeff or offset of every group in the planes of its product; ``entries`` collects them."""

    def __init__(self, spec: FormatSpec, expr: object, entries: Entries, n: int, groups: int) -> None:
        self.spec, self.n, self.groups, self.entries = spec, n, groups, entries
        self.product: Product = levels_of(spec, expr)
        self.open = [level for level in self.product.levels if level.plane.name not in entries]
        tables = [level.table for level in self.product.levels if level.table is not None]
        positive = all(finite_range(t)[0] >= 0 for t in tables)
        self.either_sign = any(
            self._block(level.plane) == (1, 1) and (level.table is None or min(finite_range(level.table)) < 0)
            for level in self.open
        )
        """Whether each group has a sign of its own."""
        self.sign = (1 if self.product.number > 0 else -1) if tables and positive else 0
        """The sign that stored values have, if integer planes that are never negative decide it; else 0."""
        self.steps = zero_points(spec) if expr == affine(spec).offset else None
        """Values that offset / scale can have (:func:`~qcompile.formats.algebra.zero_points`)."""

    def step(self, ratio: torch.Tensor) -> torch.Tensor:
        """The one of ``steps`` that is nearest to ``ratio`` = offset / scale."""
        assert self.steps is not None
        return self.steps.to(torch.float32).to(ratio.device)[nearest_entry(self.steps, ratio).int()]

    def rounded(self, value: torch.Tensor) -> torch.Tensor:
        """``value`` ``[n·groups]`` as it would be read back, if exactly one plane is still open and each group has an entry."""
        if not self._alone():
            return value
        known = self.product.number
        for level in self.product.levels:
            if level.plane.name in self.entries:
                known = known * float(self._value(level, self.entries[level.plane.name]))
        return self._value(self.open[0], self._entry(self.open[0], value / known)) * known

    def _alone(self) -> bool:
        known = (level.plane for level in self.product.levels if level.plane.name in self.entries)
        return len(self.open) == 1 and self._block(self.open[0].plane) == (1, 1) and all(p.rows == ALL for p in known)

    @property
    def rounds_to(self) -> str | None:
        """What :meth:`rounded` amounts to: dtype of a float plane, "" if it changes nothing, None: more than that."""
        if not self._alone():
            return ""
        level = self.open[0]
        return level.plane.dtype if level.table is None and self.product == Product(1.0, (level,)) else None

    def store(self, ideal: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Factors ``ideal`` ``[n, groups]`` into entries, coarsest plane first; returns what they stand for."""
        rest, actual = ideal / self.product.number, torch.full_like(ideal, self.product.number)
        for at, level in enumerate(self.product.levels):
            name, finer = level.plane.name, self.product.levels[at + 1 :]
            if name not in self.entries:
                reduced = _extreme(rest, *self._block(level.plane))
                if finer:
                    reduced = reduced / largest(finer)
                self.entries[name] = self._entry(level, reduced)
            value = self._spread(self._value(level, self.entries[name]), level.plane)
            rest = torch.where(value != 0, rest / value, 0.0)
            actual = actual * value
        return actual

    def _block(self, plane: Plane) -> tuple[int, int]:
        """(rows, groups) that share an entry of ``plane``."""
        return plane.rows or self.n, plane.per // self.spec.period if plane.per else self.groups

    def _entry(self, level: Level, wanted: torch.Tensor) -> torch.Tensor:
        if level.table is None:
            dtype = level.plane.entry_dtype
            return wanted.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
        if level.book is not None and level.book.cast is not None:
            return wanted.clamp(*finite_range(level.table)).to(level.book.cast).view(level.plane.entry_dtype)
        return nearest_entry(level.table, wanted).view(level.plane.entry_dtype)

    def _value(self, level: Level, entry: torch.Tensor) -> torch.Tensor:
        if level.table is None:
            return entry.to(torch.float32)
        if level.book is not None and level.book.cast is not None:
            return entry.view(level.book.cast).to(torch.float32)
        return level.table.to(torch.float32).to(entry.device)[entry.view(torch.uint8).int()]

    def _spread(self, value: torch.Tensor, plane: Plane) -> torch.Tensor:
        """``[rows, entries]`` → ``[n, groups]``."""
        rows, groups = self._block(plane)
        return value.repeat_interleave(rows, 0)[: self.n].repeat_interleave(groups, 1)


def largest(levels: tuple[Level, ...]) -> float:
    """The value of largest magnitude, with its sign, of a product of integer planes; 1 for float planes."""
    result = 1.0
    for level in levels:
        if level.table is not None:
            low, high = finite_range(level.table)
            result *= low if -low > high else high
    return result


def _extreme(values: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """Of every block of ``rows`` × ``groups`` of ``[n, groups]`` the value of largest magnitude: ``[⌈n/rows⌉, blocks]``."""
    n, count = values.shape
    if rows == groups == 1:
        return values
    blocks = -(-n // rows)
    padded = torch.cat([values, values[-1:].expand(blocks * rows - n, count)]) if blocks * rows != n else values
    split = padded.view(blocks, rows, count // groups, groups).transpose(1, 2).flatten(2)
    low, high = split.amin(-1), split.amax(-1)
    return torch.where(-low > high, low, high)

