"""One call of a model through Dynamo for those who look and do not compile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .dynamo_errors import as_themselves
from .owners import unwrapped

UNLIMITED = {"recompile_limit": 1 << 30, "accumulated_recompile_limit": 1 << 30}
"""Every look is a compilation of its own; Dynamo would give up on a model after eight of them, without a word."""


def call_through(model: nn.Module, backend: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """``model(*args, **kwargs)`` compiled anew by ``backend``; our errors as themselves."""
    config: Any = torch._dynamo.config
    with as_themselves(), config.patch(UNLIMITED):
        return torch.compile(unwrapped(model), backend=backend)(*args, **kwargs)
