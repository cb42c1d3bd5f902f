"""Names of modules, as traces spell them."""

from __future__ import annotations

import functools
import re

from torch.fx import Node


def module_name(node: Node) -> str:
    """Qualified name of the innermost module that the node was traced in, relative to the traced frame's
    root; empty when the trace tells none. Dynamo spells it ``L['self'].model.layers[0]…``, export
    ``model.layers.0…``; a method that takes ``*args`` makes it ``L['args'][0].model.layers[0]…``."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    return _plain(str(stack[next(reversed(stack))][0]))


@functools.lru_cache(maxsize=4096)
def _plain(path: str) -> str:
    path = re.sub(r"^[LG]\['(?:args'\]\[\d+|[^']*')\]\.?", "", path)
    path = re.sub(r"\.slice\([^)]*\)", "", path)
    path = re.sub(r"(?:\._modules)?\[['\"]?([^\]'\"]*)['\"]?\]", r".\1", path)
    return path.strip(".")
