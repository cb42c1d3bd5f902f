"""Sites of Dynamo's graphs, for tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion

from qcompile.passes.discover import discover
from qcompile.plan import Site


def traced(
    model: nn.Module, *args: object, dynamic: bool | None = None, **kwargs: object
) -> list[list[Site]]:
    """Sites of every graph that Dynamo makes of one call."""
    names = {id(p): n for n, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
    found: list[list[Site]] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[object]) -> Callable[..., object]:
        before = str(gm.graph)
        found.append(discover(gm, example_inputs, lambda t: names.get(id(t))))
        assert str(gm.graph) == before
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=dynamic)(*args, **kwargs)
    return found


def only(model: nn.Module, *args: object, **kwargs: object) -> dict[tuple[str, str], Site]:
    """Sites of the one graph of a call, by name and operator; no two have the same."""
    graphs = traced(model.eval(), *args, **kwargs)
    if len(graphs) > 1 and TorchVersion(torch.__version__) < "2.12":
        pytest.skip(f"torch {torch.__version__} breaks this model into {len(graphs)} graphs, where roles need one")
    (sites,) = graphs
    assert len({s.key for s in sites}) == len(sites)
    return {s.key: s for s in sites}


def roles(sites: dict[tuple[str, str], Site]) -> dict[str, set[str]]:
    return {s.name: set(s.roles) for s in sites.values() if s.roles}
