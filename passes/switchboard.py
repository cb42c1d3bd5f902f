"""A float model, traced once, that runs with any of its weights replaced and any of its attention in low precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qcompile.dynamo_errors import as_themselves
from qcompile.formats import Scheme
from qcompile.owners import Owners, unwrapped
from qcompile.tracing import UNLIMITED

from .attention import rewrite
from .discover import attention_of


class Switchboard:
    """The graphs of ``model``, which is not changed, run eagerly; see :meth:`run`."""

    def __init__(self, model: nn.Module) -> None:
        self._weights: Mapping[str, torch.Tensor] = {}
        self._attention: Mapping[str, Scheme] = {}
        self._model = torch.compile(unwrapped(model), backend=self._traced)

    def run(
        self, weights: Mapping[str, torch.Tensor], attention: Mapping[str, Scheme], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """The output with ``weights``, by parameter name, and ``attention``, by name of the site, in place of the float ones."""
        self._weights, self._attention = weights, attention
        config: Any = torch._dynamo.config
        with as_themselves(), config.patch(UNLIMITED):
            return self._model(*args, **kwargs)

    def _traced(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        owners = Owners()
        names = [owners.name(v) if isinstance(v, nn.Parameter) else None for v in example_inputs]
        latest: tuple[Any, torch.fx.GraphModule] = ({}, gm)

        def call(*inputs: Any) -> Any:
            nonlocal latest
            if latest[0] != self._attention:
                changed = copy.deepcopy(gm)
                rewrite(attention_of(changed, example_inputs, owners.name), self._attention)
                changed.recompile()
                latest = (dict(self._attention), changed)
            values = [self._weights.get(name or "", v) for name, v in zip(names, inputs, strict=True)]
            return latest[1].forward(*values)

        return call
