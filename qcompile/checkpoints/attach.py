"""Puts the weights of a checkpoint into a model, one at a time, and accounts for every tensor and every parameter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from ..errors import CheckpointError, CorruptCheckpointError, MissingTensorError
from ..tensor import as_parameter, tensor_class
from .models import Place, places
from .weight import Checkpoint, Weight

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def attach(
    model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> None:
    """Replaces the parameters of ``model`` by those of ``checkpoint`` and fills its persistent buffers.

    Names and shapes are compared first, as :func:`fitted` does. ``dtype``: of float parameters, and what packed ones decode to
    (None: as the file says if it does, else as the model's parameters have it). Raises :class:`MissingTensorError` for
    parameters without a tensor and tensors without a parameter, :class:`CheckpointError` for shapes that differ,
    :class:`CorruptCheckpointError` for what is found wrong while reading.
    """
    all_places, checkpoint, plan = fitted(model, checkpoint)
    with torch.no_grad():
        for name, place in plan.items():
            weight = checkpoint.weights[name]
            _put(place, _value(name, place, weight, dtype, device))
            _compare_twins(name, place, checkpoint.weights)
            weight.release()
        by_name = {name: place for place in all_places for name in place.names}
        for alias, name in checkpoint.tied.items():
            if alias in by_name and name in by_name and by_name[alias] is not by_name[name]:
                _share(by_name[alias], by_name[name])


def fitted(model: nn.Module, checkpoint: Checkpoint) -> tuple[list[Place], Checkpoint, dict[str, Place]]:
    """The places of ``model``, ``checkpoint`` under the names of its parameters, and the place of each weight. Reads nothing.

    Raises :class:`MissingTensorError` and :class:`CheckpointError` unless names and shapes fit.
    """
    all_places = places(model)
    if checkpoint.named is not None:
        checkpoint = _renamed(checkpoint, [name for place in all_places for name in place.names])
    plan = _matched(model, all_places, checkpoint)
    for name, place in plan.items():
        _check_shape(name, place, checkpoint.weights[name])
    return all_places, checkpoint, plan


def _renamed(checkpoint: Checkpoint, parameters: list[str]) -> Checkpoint:
    """``checkpoint`` with its weights under the names of parameters; the rest, which no parameter asks for, under their own."""
    assert checkpoint.named is not None
    names = {p: n for p, n in checkpoint.named(parameters).items() if n in checkpoint.weights}
    rest = {n: w for n, w in checkpoint.weights.items() if n not in set(names.values())}
    return replace(checkpoint, weights={p: checkpoint.weights[n] for p, n in names.items()} | rest)


def _matched(model: nn.Module, all_places: list[Place], checkpoint: Checkpoint) -> dict[str, Place]:
    """The place of each weight. Raises :class:`MissingTensorError` unless they fit one to one."""
    plan: dict[str, Place] = {}
    missing: list[str] = []
    known: set[str] = set()
    for place in all_places:
        known |= set(place.names)
        name = next((n for n in place.names if n in checkpoint.weights), None)
        if name is not None:
            plan[name] = place
        elif not any(checkpoint.tied.get(n) in checkpoint.weights for n in place.names):
            missing.append(place.names[0])
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    unused = [n for n in checkpoint.weights
              if n not in known and not any(re.search(p, n) for p in ignored)]  # fmt: skip
    if missing or unused:
        raise MissingTensorError(f"{checkpoint.kind} checkpoint and model do not fit: "
                                 + "; ".join(filter(None, (_some("no tensor for", missing), _some("no parameter for", unused))))
                                 + ". Was the file made for another model, or the architecture changed?")  # fmt: skip
    return plan


def _some(what: str, names: list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:5]) + (f", … ({len(names)} in all)" if len(names) > 5 else "")
    return f"{what} {shown}"


def _transposed(place: Place, weight: Weight) -> bool:
    """Whether the parameter is [K, N]: the file says so, or it belongs to a Conv1D and the file has the weight [N, K]."""
    return weight.transposed or (weight.scheme is not None and weight.dtype is None and place.is_conv1d)


def _check_shape(name: str, place: Place, weight: Weight) -> None:
    shape = weight.shape[::-1] if _transposed(place, weight) and not weight.transposed else weight.shape
    if tuple(place.tensor.shape) != tuple(shape):
        raise CheckpointError(f"{name}: the checkpoint has {list(shape)}, the model {list(place.tensor.shape)}; the file is for "
                              "another configuration")  # fmt: skip
    if weight.scheme is not None and place.is_buffer:
        raise CheckpointError(f"{name}: packed in the checkpoint, but a buffer of the model")


def _value(
    name: str, place: Place, weight: Weight, dtype: torch.dtype | None, device: torch.device | None
) -> torch.Tensor:
    """What the place is to hold: a packed parameter, or a float tensor of the model's dtype."""
    read, held = weight.read(), place.tensor
    wanted = dtype or weight.dtype or held.dtype
    if weight.scheme is not None:
        assert isinstance(read, list)
        planes = [p.to(device) for p in read] if device is not None else read
        transposed = _transposed(place, weight)
        return tensor_class(weight.scheme, transposed)(planes, tuple(held.shape), wanted)
    assert isinstance(read, torch.Tensor)
    if held.is_floating_point():
        if read.dtype not in FLOATS:
            raise CorruptCheckpointError(f"{name}: expected floats for a {held.dtype} tensor of the model, found {read.dtype}; "
                                         "its scales are missing, or the layout is one that is not read")  # fmt: skip
        read = read.to(wanted if not place.is_buffer else held.dtype)
    elif read.dtype != held.dtype:
        raise CorruptCheckpointError(f"{name}: expected {held.dtype}, found {read.dtype}")
    return read.to(device) if device is not None else read


def _put(place: Place, value: torch.Tensor) -> None:
    if place.is_buffer:
        for slot in place.slots:
            slot.module._buffers[slot.name] = value
        return
    requires_grad = place.tensor.requires_grad and type(value) is torch.Tensor and value.is_floating_point()
    parameter = nn.Parameter(value, requires_grad=True) if requires_grad else as_parameter(value)  # type: ignore[arg-type]
    for slot in place.slots:
        slot.set(parameter)


def _share(alias: Place, original: Place) -> None:
    """Puts one parameter into the slots of both."""
    parameter = original.slots[0].get()
    assert parameter is not None
    if tuple(alias.tensor.shape) != tuple(parameter.shape):
        raise CheckpointError(f"{alias.names[0]}: shares {original.names[0]} {list(parameter.shape)} in the checkpoint, but is "
                              f"{list(alias.tensor.shape)} in the model")  # fmt: skip
    for slot in alias.slots:
        slot.set(parameter)


def _compare_twins(name: str, place: Place, weights: Mapping[str, Weight]) -> None:
    """A file may hold a tied weight under both names, but then twice the same."""
    for other in place.names:
        if other == name or other not in weights:
            continue
        twin = weights[other]
        if twin.scheme is None and weights[name].scheme is None and twin.shape == weights[name].shape:
            read, mine = twin.read(), weights[name].read()
            same = isinstance(read, torch.Tensor) and isinstance(mine, torch.Tensor) and torch.equal(read, mine)
            twin.release()
        else:
            same = False
        if not same:
            raise CheckpointError(f"{name} and {other} are one parameter of the model, but differ in the checkpoint; set "
                                  "tie_word_embeddings to false in its configuration")  # fmt: skip
