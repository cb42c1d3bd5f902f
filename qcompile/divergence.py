"""How far a model's output is from the float model's: Kullback-Leibler divergence of logits, squared error of anything else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from .comparison import Arguments, main_tensor
from .errors import CompareError

CHUNK = 1 << 22
"""Logits that are brought to float64 at a time."""


@dataclass
class Sums:
    """Sums over the positions that count, in float64. ``divergence``: Σ KL(p₀‖p) in nats; ``agreements``: how often both have
    the same largest logit; ``squares``, ``norms``: Σ‖y − y₀‖² and Σ‖y₀‖². All are additive over items."""

    positions: int = 0
    divergence: float = 0.0
    agreements: int = 0
    squares: float = 0.0
    norms: float = 0.0

    def __iadd__(self, other: Sums) -> Sums:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        return self

    @property
    def relative_square(self) -> float:
        """Σ‖y − y₀‖² / Σ‖y₀‖²; Σ‖y − y₀‖² where the reference is zero."""
        return self.squares / self.norms if self.norms else self.squares


@dataclass(frozen=True)
class Output:
    """What is compared of a call: ``values`` of one output, of which ``keep`` (None: all) tells the positions that count, all but
    padding; ``classes``: the last dimension is one of logits. ``ids``: the token at each position, for a model of tokens."""

    values: torch.Tensor
    classes: bool
    keep: torch.Tensor | None = None
    ids: torch.Tensor | None = None


def output_of(result: Any, item: Arguments) -> Output:
    """Logits (``result.logits`` or ``result["logits"]``, or the first floating tensor where it has the shape of an integer input
    and one dimension more), else the first floating tensor. Positions whose ``attention_mask`` is 0 do not count.

    Raises :class:`~qcompile.errors.CompareError` for a result without a floating tensor.
    """
    named = result.get("logits") if isinstance(result, Mapping) else getattr(result, "logits", None)
    values = named if isinstance(named, torch.Tensor) else main_tensor(result)
    ids = next((t for t in _tensors(item) if not t.is_floating_point() and t.shape == values.shape[:-1]), None)
    mask = item[1].get("attention_mask")
    keep = mask.bool() if isinstance(mask, torch.Tensor) and mask.shape == values.shape[:-1] else None
    classes = values.dim() >= 2 and values.shape[-1] > 1 and (values is named or ids is not None)
    return Output(values, classes, keep, ids)


def sums(ours: torch.Tensor, reference: Output, what: str) -> Sums:
    """The sums of one item: ``ours`` against the float model's output. ``what`` names model and item in errors.

    KL(p₀‖p) = Σ_v p₀(v)·(log p₀(v) − log p(v)), p = softmax of the last dimension, in float64, some positions at a time.
    Raises :class:`~qcompile.errors.CompareError` for values that are not finite and for outputs of different shapes.
    """
    theirs = reference.values
    if ours.shape != theirs.shape:
        raise CompareError(f"{what}: an output of shape {list(ours.shape)}, the float model's is {list(theirs.shape)}; compare "
                           "models of one architecture, on inputs that both take whole")  # fmt: skip
    check_finite(ours, what)
    made = Sums()
    for y, y0 in _chunks(ours, theirs, reference.keep):
        made.positions += len(y)
        made.squares += float((y - y0).square().sum())
        made.norms += float(y0.square().sum())
        if reference.classes:
            logs, logs0 = y.log_softmax(-1), y0.log_softmax(-1)
            made.divergence += float((logs0.exp() * (logs0 - logs)).sum())
            made.agreements += int((y.argmax(-1) == y0.argmax(-1)).sum())
    return made


def check_finite(values: torch.Tensor, what: str) -> None:
    """Raises :class:`CompareError` that counts the NaN and infinite entries."""
    wrong = int((~values.isfinite()).sum())
    if wrong:
        raise CompareError(f"{what}: {wrong:,} of {values.numel():,} output values are NaN or infinite; qcompile.bisect finds "
                           "the first node where a policy makes them")  # fmt: skip


def check_evaluates(model: nn.Module, what: str) -> None:
    """Raises :class:`CompareError` for a model whose outputs are random, or change its own buffers, from call to call."""
    for name, module in model.named_modules():
        random = isinstance(module, _DropoutNd) and module.p > 0
        if module.training and (random or isinstance(module, _BatchNorm)):
            raise CompareError(f"{what} is in training mode: {name or 'it'} ({type(module).__name__}) gives another output "
                               "at each call; call .eval() first")  # fmt: skip


def _chunks(
    ours: torch.Tensor, theirs: torch.Tensor, keep: torch.Tensor | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The positions that count as matrices of float64, at most :data:`CHUNK` entries each."""
    ours, theirs = (t.reshape(-1, t.shape[-1] if t.dim() else 1) for t in (ours, theirs))
    kept = None if keep is None else keep.flatten().nonzero().flatten()
    count = len(ours) if kept is None else len(kept)
    step = max(1, CHUNK // max(1, ours.shape[-1]))
    for start in range(0, count, step):
        rows = slice(start, start + step) if kept is None else kept[start : start + step]
        yield ours[rows].double(), theirs[rows].double()


def _tensors(item: Arguments) -> Iterator[torch.Tensor]:
    args, kwargs = item
    named = [kwargs["input_ids"]] if "input_ids" in kwargs else [*args, *kwargs.values()]
    return (t for t in named if isinstance(t, torch.Tensor))
