"""What the backend would convert on one call of a model, without compiling it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qcompile.dynamo_errors import as_themselves
from qcompile.options import Options
from qcompile.owners import unwrapped
from qcompile.recorder import Recorder

from .convert import Conversion
from .pipeline import Compilation


def conversions_of(
    model: nn.Module, options: Options, recorder: Recorder, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Conversion]:
    """The conversions that the backend would make on one call; the sites left alone are recorded at once."""
    found: list[Conversion] = []

    def look(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.extend(Compilation(gm, example_inputs, options, recorder).conversions())
        return gm.forward

    # Each call compiles anew; Dynamo would run the ninth model of one class eagerly, and nothing of it would be found.
    unlimited = torch._dynamo.config.patch(recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize)
    with as_themselves(), unlimited:
        torch.compile(unwrapped(model), backend=look)(*args, **kwargs)
    return found
