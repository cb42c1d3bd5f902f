"""What a graph computes on its inputs, as one digest: what a calibration's result depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from qcompile.errors import FingerprintError
from qcompile.packing import digest
from qcompile.store import key_of

KNOWN = ("torch", "_operator", "operator", "math", "builtins")
"""Packages whose functions are told by their names and their version."""


def fingerprint(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any], parameters: dict[int, list[Any]] | None = None
) -> str:
    """SHA-256 over the graph's operations and the values of its inputs and constants. ``parameters`` collects what was found
    of parameters, by id, for graphs that share them.

    Raises :class:`~qcompile.errors.FingerprintError` for a graph that calls functions of others, whose code may change, or
    with inputs other than tensors and numbers.
    """
    for node in gm.graph.nodes:
        if node.op == "call_module":
            raise FingerprintError(f"{node.name} calls a module of its own, which has no fingerprint")
        if node.op == "call_function" and _package(node.target) not in KNOWN:
            raise FingerprintError(f"{node.name} calls {node.target}, whose code has no fingerprint")
    parameters = {} if parameters is None else parameters
    for value in example_inputs:
        if isinstance(value, torch.nn.Parameter) and id(value) not in parameters:
            parameters[id(value)] = _value(value)
    inputs = [parameters.get(id(v)) or _value(v) for v in example_inputs]
    constants = {n.target: _value(_attribute(gm, n.target)) for n in gm.graph.find_nodes(op="get_attr")}
    return key_of("graph", {"code": gm.code, "inputs": inputs, "constants": constants})


def _package(target: Any) -> str:
    return str(getattr(target, "__module__", None) or type(target).__module__).partition(".")[0]


def _attribute(gm: torch.fx.GraphModule, path: str) -> Any:
    found: Any = gm
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _value(value: Any) -> list[Any]:
    if isinstance(value, torch.Tensor):
        return [type(value).__name__, str(value.dtype), str(value.device.type), list(value.shape), _digest(value)]
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        value = value.node.hint
    if value is None or isinstance(value, bool | int | float | str):
        return [type(value).__name__, value]
    raise FingerprintError(f"an input of type {type(value).__name__} has no fingerprint")


def _digest(value: torch.Tensor) -> str:
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        inner = getattr(value, "planes", None)
        if inner is None:
            raise FingerprintError(f"a tensor of type {type(value).__name__} has no fingerprint")
        return hashlib.sha256("".join(map(digest, inner)).encode()).hexdigest()
    return digest(value)
