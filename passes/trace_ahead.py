"""What the backend would do on one call of a model, without compiling it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qcompile.options import Options
from qcompile.recorder import Recorder
from qcompile.tracing import call_through

from .convert import Conversion
from .pipeline import Compilation


class Look:
    """A backend that takes down what qcompile would do with each graph and runs it as it is. ``packs``: its conversions will be
    run, so their kernels are built."""

    def __init__(self, options: Options, recorder: Recorder, packs: bool = False) -> None:
        self.options, self.recorder, self.packs = options, recorder, packs
        self.conversions: list[Conversion] = []

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        compilation = Compilation(gm, example_inputs, self.options, self.recorder)
        found = compilation.conversions()
        self.conversions += compilation.ready(found) if self.packs else found
        self.recorder.saw(compilation.picture())
        return gm.forward


def conversions_of(
    model: nn.Module, options: Options, recorder: Recorder, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Conversion]:
    """The conversions that the backend would make on one call; the sites left alone are recorded at once."""
    look = Look(options, recorder)
    call_through(model, look, args, kwargs)
    return look.conversions
