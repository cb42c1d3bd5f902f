"""``qcompile.memory_plan``: what a model takes on each device, from its configuration alone.

Nothing is loaded: the model is built on the meta device, and what the policy does with each weight is decided on its graph.
"""

from __future__ import annotations

import inspect
import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoints.models import empty_model
from .errors import CheckpointError, OptionError, ShardError
from .formats import Scheme
from .formats.layout import matrix_shape
from .kv_cache import formats_of
from .options import Options
from .owners import Owners
from .passes.trace_ahead import Look
from .plan import Decision, Site
from .recorder import Recorder
from .sharding import COLUMN, share, split_of
from .tracing import call_through

EVERYWHERE = "replicated"
ELSEWHERE = Decision(Site("", "other"), None, "none")
"""Of a parameter or buffer that no site of the graph is of."""


@dataclass(frozen=True)
class Group:
    """Weights of one role, format and way of being divided. ``layer``: the role, or the module's name where it has none;
    ``nbytes``: once; ``device_nbytes``: of one device."""

    layer: str
    format: str
    split: str
    weights: int
    nbytes: int
    device_nbytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a model and of its KV cache, together and on each of ``devices``; ``notes`` say what could not be divided."""

    policy: str
    devices: int
    context: int
    batch: int
    kv: str
    groups: tuple[Group, ...]
    kv_nbytes: int
    kv_device_nbytes: int
    notes: tuple[str, ...] = field(default=())

    @property
    def weights_nbytes(self) -> int:
        """Of all parameters and buffers, each once."""
        return sum(g.nbytes for g in self.groups)

    @property
    def weights_device_nbytes(self) -> int:
        return sum(g.device_nbytes for g in self.groups)

    @property
    def device_nbytes(self) -> int:
        """Weights and KV cache of one device; activations and the allocator's own come on top."""
        return self.weights_device_nbytes + self.kv_device_nbytes

    def as_dict(self) -> dict[str, Any]:
        totals = ("weights_nbytes", "weights_device_nbytes", "device_nbytes")
        return asdict(self) | {name: getattr(self, name) for name in totals}

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=1)

    def __str__(self) -> str:
        from .report.memory_table import text

        return text(self)


def memory_plan(
    model: Any, *, policy: Any = None, devices: int = 1, context: int = 8192, batch: int = 1, kv: Any = None
) -> MemoryPlan:
    """What ``model`` takes on each of ``devices`` under ``policy`` when it is split as tensor parallelism splits it.

    ``model``: a Hugging Face ``config.json`` (a path to it or its folder, or its content), or a module on the meta device that
    takes token ids ``[batch, tokens]``. Attention's q, k, v, the MLP's gate and up and the head are divided by output features,
    attention's o and the MLP's down by input features; all else is on every device, and so is a weight that has no such division
    (``notes``). ``kv``: format of keys and values as ``options["kv_cache"]`` takes it; None: the model's dtype. Heads of keys and
    values are divided, at least one on each device; layers with a sliding window keep its tokens alone unless they are packed.

    Raises :class:`~qcompile.errors.CheckpointError` for a configuration that cannot be read or built, ``OptionError`` for numbers
    below 1, and the errors of policies and cache formats.
    """
    for name, value in (("devices", devices), ("context", context), ("batch", batch)):
        if not isinstance(value, int) or value < 1:
            raise OptionError(f"memory_plan: {name} must be a whole number of 1 or more, found {value!r}")
    options, formats = Options.parse({"policy": policy}, None), None if kv is None else formats_of(kv)
    built = model if isinstance(model, nn.Module) else empty_model(_config(model))
    recorder, ids = Recorder(), torch.zeros(1, 8, dtype=torch.long, device="meta")
    with torch.no_grad():
        call_through(built, Look(options, recorder), (ids,), _caching(built, False))
        caches = _cache_layers(built(ids, **_caching(built, True)))
    groups, notes = _grouped(built, {r.decision.site.parameter or "": r.decision for r in recorder.plan}, devices)
    bytes_of = [_kv_nbytes(layer, formats, context, batch, heads) for layer in caches
                for heads in (layer.keys.shape[1], math.ceil(layer.keys.shape[1] / devices))]  # fmt: skip
    label = "as the model" if formats is None else " / ".join(dict.fromkeys(s.label for s in formats))
    return MemoryPlan(options.policy.name, devices, context, batch, label, groups, sum(bytes_of[::2]), sum(bytes_of[1::2]), notes)


def _config(model: Any) -> Mapping[str, Any]:
    if isinstance(model, Mapping):
        return model
    path = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: no configuration can be read from it ({error}); give the config.json of a Hugging Face "
                              "model, or its folder") from error  # fmt: skip
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; a configuration is an object with a model_type")
    return content


def _caching(model: nn.Module, wanted: bool) -> dict[str, bool]:
    """Has a Hugging Face decoder return its cache, from which shapes of keys and values are read, or makes it have none."""
    return {"use_cache": wanted} if "use_cache" in inspect.signature(model.forward).parameters else {}


def _cache_layers(output: Any) -> list[Any]:
    cache = getattr(output, "cache", None) or getattr(output, "past_key_values", None)  # its name changed in transformers 5.24
    layers = getattr(cache, "layers", [])
    return [layer for layer in layers if getattr(layer, "keys", None) is not None]


def _kv_nbytes(layer: Any, formats: tuple[Scheme, Scheme] | None, context: int, batch: int, heads: int) -> int:
    dims = layer.keys.shape[-1], layer.values.shape[-1]
    if formats is None:
        kept = min(context, getattr(layer, "sliding_window", None) or context)
        return batch * heads * kept * sum(dims) * int(layer.keys.dtype.itemsize)
    center = dims[0] * int(layer.keys.dtype.itemsize)  # what keys are stored without
    return batch * heads * (sum(s.format.nbytes(context, dim) for s, dim in zip(formats, dims, strict=True)) + center)


def _grouped(
    model: nn.Module, decisions: Mapping[str, Decision], devices: int
) -> tuple[tuple[Group, ...], tuple[str, ...]]:
    owners, found, notes = Owners(), defaultdict(list), {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        decision = decisions.get(owners.name(tensor) or "", ELSEWHERE)
        site, scheme = decision.site, decision.scheme
        whole = tensor.nbytes if scheme is None else scheme.format.nbytes(*matrix_shape(site.shape))
        split, own = EVERYWHERE, whole
        wanted = split_of(site.roles) if site.is_linear and devices > 1 else None
        if wanted is not None and len(site.shape) == 3:
            notes[site.name], wanted = f"{site.name}: {site.shape[0]} experts of one stack are on every device", None
        if wanted is not None:
            try:
                own = _share_nbytes(decision, wanted, devices, tensor)
                split = wanted
            except ShardError as error:
                notes[site.name] = str(error)
        label = str(tensor.dtype).removeprefix("torch.") if scheme is None else scheme.label
        found[" + ".join(sorted(site.roles)) or _kind(name, tensor), label, split].append((whole, own))
    made = [Group(layer, label, split, len(sizes), sum(w for w, _ in sizes), sum(o for _, o in sizes))
            for (layer, label, split), sizes in found.items()]  # fmt: skip
    return tuple(sorted(made, key=lambda g: -g.device_nbytes)), tuple(notes.values())


def _share_nbytes(decision: Decision, split: str, devices: int, tensor: torch.Tensor) -> int:
    site, (n, k) = decision.site, decision.site.shape
    if decision.scheme is not None:
        return decision.scheme.format.nbytes(*share(decision.scheme.format, n, k, split, devices, site.name))
    if (n if split == COLUMN else k) % devices:
        raise ShardError(f"{site.name}: a {n}×{k} weight cannot be divided by {split} among {devices} devices; it is on each")
    return int(tensor.nbytes) // devices


def _kind(name: str, tensor: torch.Tensor) -> str:
    return "norms, biases, buffers" if tensor.dim() < 2 else name
