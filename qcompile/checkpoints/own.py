"""qcompile's own layout: safetensors with the planes of each packed parameter, and what they mean in the header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import CheckpointError, CorruptCheckpointError, FormatError, QCompileError
from ..formats import FormatSpec, Scheme, find, register_format, serial
from ..formats.algebra import affine
from ..formats.layout import check_planes, matrix_shape
from ..plan import Plan
from .files import Stored, TensorFiles, parse_json
from .weight import Checkpoint, Weight, finite, part, plain

KEY = "qcompile"
"""Name of the header's entry."""

VERSION = 1


Packed = Mapping[str, tuple[Scheme, tuple[int, ...], bool, torch.dtype]]
"""(scheme, shape, transposed, dtype) of packed parameters by name."""


def describe(weights: Packed, tied: Mapping[str, str], plan: Plan) -> str:
    """The header's entry for packed ``weights``, with all formats that they and the ``plan`` name."""
    named = (scheme for record in plan for scheme in (record.decision.scheme, record.decision.wanted))
    schemes = {scheme.key: scheme for scheme in (*(s for s, *_ in weights.values()), *named) if scheme is not None}
    return json.dumps({
        "version": VERSION,
        "formats": {s.format.name: serial.to_dict(s.format) for s in schemes.values()},
        "weights": {
            name: {"format": scheme.format.name, "activations": scheme.activations, "shape": list(shape),
                   "transposed": transposed, "dtype": str(dtype).removeprefix("torch.")}
            for name, (scheme, shape, transposed, dtype) in weights.items()
        },
        "tied": dict(tied),
        "plan": plan.as_dict() if len(plan) else None,
    })  # fmt: skip


def is_own(files: TensorFiles) -> bool:
    return KEY in files.metadata


def read(files: TensorFiles) -> Checkpoint:
    """The weights of a file that :func:`qcompile.save` wrote. Formats that this process does not know are registered.

    Raises :class:`CorruptCheckpointError` naming the parameter where planes do not fit, :class:`CheckpointError` for a later
    version, and for a format that is declared otherwise here.
    """
    content = parse_json(files.metadata[KEY], f"{files.path}: header entry {KEY!r}")
    if not isinstance(content, dict) or content.get("version") != VERSION:
        found = content.get("version") if isinstance(content, dict) else content
        raise CheckpointError(f"{files.path}: saved as version {found!r} of qcompile's layout, this release reads {VERSION}")
    formats, entries, tied = (_dict(content, key, files) for key in ("formats", "weights", "tied"))
    specs = {name: _format(name, data) for name, data in formats.items()}
    weights, taken = {}, set()
    for name, entry in entries.items():
        weights[name] = _weight(name, entry, specs, files)
        taken |= {s.name for s in weights[name].sources}
    for name, stored in files.tensors.items():
        if name not in taken:
            weights[name] = plain(stored)
    return Checkpoint("qcompile", weights, tied={str(a): str(b) for a, b in tied.items()}, plan=_plan(content.get("plan")))


def _plan(content: Any) -> Plan | None:
    if content is None:
        return None
    try:
        return Plan.from_json(json.dumps(content))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptCheckpointError(f"the plan in the header cannot be read: {error!r}") from error


def _dict(content: dict[str, Any], key: str, files: TensorFiles) -> dict[str, Any]:
    value = content.get(key)
    if not isinstance(value, dict):
        raise CorruptCheckpointError(f"{files.path}: header entry {KEY!r} has no object {key!r}")
    return value


def _format(name: str, data: Any) -> FormatSpec:
    """The format that a file declares: this process's own if it has the same, since that one has its quantizer too."""
    try:
        spec = serial.from_dict(data)
        known = find(name)
        if known is not None and known.fingerprint == spec.fingerprint:
            return known
        affine(spec)
    except QCompileError as error:
        raise CorruptCheckpointError(f"format {name!r} of the file: {error}") from error
    try:
        return register_format(spec)
    except FormatError as error:
        raise CheckpointError(f"the file's format {name!r} is not the one of this process: {error}") from error


def _weight(name: str, entry: Any, specs: Mapping[str, FormatSpec], files: TensorFiles) -> Weight:
    """One packed parameter: its planes are ``name.plane``."""
    entry = entry if isinstance(entry, dict) else {}
    spec, shape = specs.get(str(entry.get("format"))), entry.get("shape")
    dtype = getattr(torch, str(entry.get("dtype")), None)
    if spec is None or not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CorruptCheckpointError(f"{name}: expected one of the formats {', '.join(specs)} and a float dtype, found {entry}")
    if not (isinstance(shape, list) and len(shape) in (2, 3) and all(type(s) is int and 0 <= s < 2**31 for s in shape)):
        raise CorruptCheckpointError(f"{name}: expected a shape of two or three numbers, found {shape}")
    transposed = entry.get("transposed") is True
    n, k = matrix_shape(shape, transposed)
    try:
        scheme = Scheme(spec, entry.get("activations"))
    except (FormatError, TypeError) as error:
        raise CorruptCheckpointError(f"{name}: {error}") from error
    here = {p: files.tensors[f"{name}.{p}"] for p in spec.part_names if f"{name}.{p}" in files.tensors}
    sources = tuple(part(name, here, plane) for plane in spec.part_names)
    meta = [torch.empty(s.shape, dtype=s.dtype, device="meta") for s in sources]
    try:
        check_planes(spec, meta, n, k, name)
    except QCompileError as error:
        raise CorruptCheckpointError(str(error)) from error
    return Weight(tuple(shape), sources, lambda: _planes(spec, sources, k), scheme, transposed, dtype)


def _planes(spec: FormatSpec, sources: tuple[Stored, ...], k: int) -> list[torch.Tensor]:
    planes = [s.read().clone() for s in sources]
    for stored, plane in zip(sources, planes, strict=True):
        if plane.is_floating_point():
            finite(stored.name, plane)
    for name, stored, plane in list(zip(spec.part_names, sources, planes, strict=True))[len(spec.parts) :]:
        if name == "order" and not torch.equal(plane.sort().values, torch.arange(k, dtype=torch.int32)):
            raise CorruptCheckpointError(f"{stored.name}: is no order of {k} columns")
        if name == "factors" and not (plane > 0).all():
            raise CorruptCheckpointError(f"{stored.name}: factors of columns must be positive")
    return planes
