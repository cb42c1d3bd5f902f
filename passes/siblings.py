"""Equal parts of one model: when Dynamo compiles layer 0 alone, layers 1 to n will run the same code.

Dynamo guards that code on the types of its parameters. If only layer 0 were packed, each further layer would miss the
guard, be packed and be compiled again, until the recompile limit leaves the rest in float without a word. So all equal
layers are packed at once.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from qcompile.owners import Owners, Slot, find
from qcompile.plan import Site


@dataclass(frozen=True)
class Sibling:
    """The module at ``path``, equal in structure to the one at ``own`` whose graph was traced."""

    path: str
    own: str

    def rename(self, site: Site) -> Site:
        """The sibling's site for a ``site`` of the traced graph; no FX node stands for it."""
        return dataclasses.replace(site, name=self._moved(site.name), node="",
                                   parameter=site.parameter and self._moved(site.parameter))  # fmt: skip

    def _moved(self, name: str) -> str:
        return self.path + name.removeprefix(self.own) if name == self.own or name.startswith(self.own + ".") else name


def siblings(owners: Owners, root: nn.Module, slots: Sequence[Slot]) -> Iterator[Sibling]:
    """The siblings of the module that holds all of ``slots``, the parameters of one graph.

    A sibling lies below the same root, has the same class, the same path up to numbers, parameters of the same names and
    shapes, and is compiled if and only if the module itself is.
    """
    paths = [owners.path(s.module)[1].split(".") for s in slots]
    own = ".".join(os.path.commonprefix(paths))
    module = find(root, own)
    if not own or module is None:
        return
    for candidate in root.modules():
        if candidate is module or type(candidate) is not type(module):
            continue
        path = owners.path(candidate)[1]
        if (_without_numbers(path) == _without_numbers(own) and _structure(candidate) == _structure(module)
                and owners.is_compiled(candidate) == owners.is_compiled(module)):  # fmt: skip
            yield Sibling(path, own)


def _without_numbers(path: str) -> str:
    return re.sub(r"\b\d+\b", "#", path)


def _structure(module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(p.shape)) for name, p in module.named_parameters(remove_duplicate=False)]
