"""Blocks of a graph: steps of one numbered module (``layers.3``) together, and runs of equal blocks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .graph import Picture, Step

BLOCK = re.compile(r"^(?:[^.]+\.)*?[^.]*?(?<![^.])\d+(?=\.|$)")
"""The shortest beginning of a module's name that ends in a number."""

Say = Mapping[tuple[str, str], object]
"""What is said of a site, by its key; equal blocks say the same."""


@dataclass(frozen=True)
class Block:
    """Steps of the module ``name``; ``run`` is the number of the run of equal blocks that it belongs to."""

    name: str
    run: int
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Laid:
    """A picture cut into blocks: the steps of no block, the blocks, and the edges between these ``elements`` by id: a step's
    is ``n:`` and its name, a block's ``b:`` and its name."""

    name: str
    loose: tuple[Step, ...]
    blocks: tuple[Block, ...]
    edges: tuple[tuple[str, str], ...]


def block_of(step: Step) -> str:
    """The name of the block that the step lies in; empty for none, and for the graph's inputs."""
    match = BLOCK.match(step.module) if step.operator != "input" else None
    return match[0] if match else ""


def cut(picture: Picture, say: Say) -> Laid:
    """``picture`` in blocks. Blocks next to each other are equal when their steps are, names of modules and numbers of nodes
    apart, and the same is said of their sites."""
    grouped: dict[str, list[Step]] = {}
    element: dict[str, str] = {}
    for step in picture.steps:
        name = block_of(step)
        if name:
            grouped.setdefault(name, []).append(step)
        element[step.name] = f"b:{name}" if name else f"n:{step.name}"
    blocks: list[Block] = []
    before: tuple[Any, ...] | None = None
    run = -1
    for name, steps in grouped.items():
        looks = _looks(name, steps, say)
        run += looks != before
        before = looks
        blocks.append(Block(name, run, tuple(steps)))
    edges = {(element[source], element[step.name]): None for step in picture.steps for source in step.inputs if source in element}
    loose = tuple(s for s in picture.steps if element[s.name].startswith("n:"))
    return Laid(picture.name, loose, tuple(blocks), tuple(e for e in edges if e[0] != e[1]))


def _looks(name: str, steps: list[Step], say: Say) -> tuple[Any, ...]:
    """All that two equal blocks have in common."""
    numbers = {s.name: i for i, s in enumerate(steps)}
    return tuple(
        (
            replace(s, name="", module=s.module.removeprefix(name), inputs=(), parameters=(), site=None),
            tuple(p.removeprefix(name) for p in s.parameters),
            tuple(numbers.get(source, -1) for source in s.inputs),
            s.site and (s.site[0].removeprefix(name), say.get(s.site)),
        )
        for s in steps
    )
