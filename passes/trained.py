"""Which weights are being trained, and so stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qcompile.dtensor import packed_in
from qcompile.plan import Site
from qcompile.recorder import Recorder

from .notices import GRAD, TRAINED


def why_left(weight: torch.Tensor, recorder: Recorder) -> str | None:
    """Why a weight that requires grad stays as it is, if it does.

    In a model that is tuned it does so in every call: those without gradients, which evaluate what was trained, must not pack
    what is trained on afterwards.
    """
    if not weight.requires_grad:
        return None
    if recorder.tunes:
        return TRAINED
    return GRAD if torch.is_grad_enabled() else None


def tunes(sites: Sequence[Site], values: Mapping[str, Any], root: nn.Module | None, recorder: Recorder) -> bool:
    """Whether some linear layers of a graph were frozen, and not by us, while other parameters of the model ``root`` train.

    Packed weights never require grad. One that did when we packed it tells nothing. Others count where a float parameter is
    frozen too: a model that came packed from a file has none, before someone decides what to train.
    """
    parameters = list(root.parameters()) if root is not None else []
    if not any(p.requires_grad for p in parameters):
        return False
    floats = any(not p.requires_grad and packed_in(p) is None for p in parameters)
    linear = {s.weight: s.parameter for s in sites if s.is_linear and s.weight is not None}
    for name, parameter in linear.items():
        weight = values.get(name)
        if isinstance(weight, torch.Tensor) and not weight.requires_grad:
            if packed_in(weight) is None or (floats and parameter not in recorder.unfrozen):
                return True
    return False
