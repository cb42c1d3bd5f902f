"""What a calibration found: for each parameter the planes that fit the model's inputs best, and how well they do."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import CheckpointError, CorruptCheckpointError, FormatError, MissingTensorError, PolicyError, QCompileError
from .formats import Scheme, find, reference, register_format, register_scheme, scheme_of, serial
from .formats.layout import check_planes, matrix_shape
from .owners import unwrapped
from .packing import Packed, digest
from .policy import Policy

VERSION = 1
RECORD, PLANES = "calibration.json", "planes.safetensors"
NEAREST = "nearest"


@dataclass(frozen=True)
class Calibrated:
    """One parameter of a layer: the scheme that the policy ``asked`` for and the one that it is packed in, which may have
    factors for columns; its planes and SQNR in ``packed`` (None: it is packed when a model is compiled, to nearest), the
    ``digest`` of the float weight that they are for, the ``method`` that found them and a ``note`` (why, of "nearest").

    ``nearest`` and ``error``: ‖ŷ − y‖ / ‖y‖ of the layer's outputs on rows of its calibration inputs, by rounding to nearest
    and as it is packed (None: no sample reached it).
    """

    layer: str
    asked: Scheme
    scheme: Scheme
    transposed: bool
    shape: tuple[int, ...]
    packed: Packed | None
    digest: str
    method: str
    note: str = ""
    nearest: float | None = None
    error: float | None = None

    @property
    def said(self) -> str:
        """What reports say of the layer."""
        if self.method == NEAREST:
            return f"rounded to nearest: {self.note}"
        return f"calibrated by {self.method}" + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True, eq=False)
class Calibration:
    """The result of :func:`qcompile.calibrate`: a ``policy`` and, by parameter name, what its weights are packed to.

    Wherever a policy is taken, as ``options["policy"]`` and by ``quantize_`` and ``explain``, so is this. ``method`` and the
    number of ``samples`` say how it was made; ``unseen`` names parameters that no sample reached.
    """

    policy: Policy
    method: str
    samples: int
    weights: Mapping[str, Calibrated]
    unseen: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[tuple[str, Calibrated]]:
        return iter(self.weights.items())

    def __len__(self) -> int:
        return len(self.weights)

    def __str__(self) -> str:
        from .report.calibration_table import text

        return text(self)

    def check_names(self, names: Sequence[str]) -> None:
        """Raises :class:`PolicyError` for a model that has none of the calibrated parameters."""
        if self.weights and not set(self.weights) & set(names):
            raise PolicyError(f"the calibration is of another model: it has {', '.join(list(self.weights)[:3])}, …, this one has "
                              f"{', '.join(list(names)[:3])}, …; calibrate this model")  # fmt: skip

    def scheme_for(self, name: str | None, asked: Scheme) -> Scheme:
        """The scheme that parameter ``name`` is packed in where the policy asks for ``asked``. Raises :class:`PolicyError`,
        naming the layer, where it was calibrated for another."""
        entry = self.weights.get(name or "")
        if entry is None:
            return asked
        if entry.asked != asked:
            raise PolicyError(f"{entry.layer}: calibrated as {entry.asked.label}, and the policy says {asked.label} here; "
                              "calibrate this model")  # fmt: skip
        return entry.scheme

    def packed_for(self, name: str, value: torch.Tensor, transposed: bool) -> Packed | None:
        """The planes for parameter ``name``, of memory of their own on the device of its float ``value``; None where it is to be
        rounded to nearest. Raises :class:`PolicyError`, naming the layer, where they were found for another weight."""
        entry = self.weights.get(name)
        if entry is None or entry.packed is None:
            return None
        if tuple(value.shape) != entry.shape or transposed != entry.transposed:
            raise PolicyError(f"{entry.layer}: calibrated for a weight of shape {list(entry.shape)}, found {list(value.shape)}; "
                              "calibrate this model")  # fmt: skip
        if (found := digest(value)) != entry.digest:
            raise PolicyError(f"{entry.layer}: calibrated for other weights (SHA-256 {entry.digest[:12]}…, found {found[:12]}…): "
                              "the model was trained on, cast or loaded anew; calibrate it as it is now")  # fmt: skip
        return Packed([p.to(value.device, copy=True) for p in entry.packed.planes], entry.packed.sqnr)

    @torch.no_grad()
    def round_(self, model: nn.Module) -> nn.Module:
        """Puts the values that the planes stand for in place of the float weights of ``model``, which is returned: a start for
        quantization-aware training that is better than rounding to nearest.

        Weights that were rounded to nearest stay. Raises :class:`PolicyError` where ``model`` is not the calibrated one.
        """
        parameters = dict(unwrapped(model).named_parameters(remove_duplicate=False))
        self.check_names(list(parameters))
        present = {name: entry for name, entry in self if entry.packed is not None and name in parameters}
        found = {name: self.packed_for(name, parameters[name], entry.transposed) for name, entry in present.items()}
        for name, packed in found.items():  # all of them fit before the first is written
            entry = present[name]
            assert packed is not None
            n, k = entry.shape[::-1] if entry.transposed else entry.shape
            decoded = reference.decode(entry.scheme.format, packed.planes, n, k)
            parameters[name].copy_(decoded.t() if entry.transposed else decoded)
        return model

    def save(self, folder: str | Path) -> Path:
        """Writes ``calibration.json`` and ``planes.safetensors`` into ``folder``, which it returns; nothing is pickled."""
        from safetensors.torch import save_file

        where = Path(folder)
        where.mkdir(parents=True, exist_ok=True)
        tensors = {f"{name}.{part}": plane.contiguous() for name, entry in self if entry.packed is not None
                   for part, plane in zip(entry.scheme.format.part_names, entry.packed.planes, strict=True)}  # fmt: skip
        save_file(tensors, where / PLANES)
        (where / RECORD).write_text(json.dumps(self.as_dict(), indent=1))
        return where

    def as_dict(self) -> dict[str, Any]:
        """Everything but the planes as JSON types."""
        rules = [r.scheme for r in self.policy.rules if r.scheme is not None]
        schemes = {s.key: s for s in (*rules, *(s for _, e in self for s in (e.asked, e.scheme)))}
        formats = {s.format.name: serial.to_dict(s.format) for s in schemes.values()}
        return {"version": VERSION, "method": self.method, "samples": self.samples, "policy": self.policy.as_dict(),
                "formats": formats, "weights": {name: _to_dict(e) for name, e in self}, "unseen": list(self.unseen)}  # fmt: skip

    @staticmethod
    def load(folder: str | Path) -> Calibration:
        """Inverse of :meth:`save`; planes are mapped from their file. Formats that this process does not have are registered.

        Raises :class:`~qcompile.errors.MissingTensorError` where a file or a plane is missing, ``CorruptCheckpointError``,
        naming the parameter, for what does not fit, ``CheckpointError`` for another version.
        """
        from safetensors import safe_open

        where = Path(folder)
        for name in (RECORD, PLANES):
            if not (where / name).is_file():
                raise MissingTensorError(f"{where}: no {name}; expected a folder that Calibration.save() wrote")
        content = _parsed(where / RECORD)
        try:
            for data in content["formats"].values():
                _register(data)
            policy = Policy.from_json(json.dumps(content["policy"]))
            with safe_open(where / PLANES, "pt") as file:  # type: ignore[no-untyped-call]
                weights = {name: _from_dict(name, data, file) for name, data in content["weights"].items()}
            return Calibration(policy, str(content["method"]), int(content["samples"]), weights, tuple(content["unseen"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, QCompileError):
                raise
            raise CorruptCheckpointError(f"{where / RECORD}: not as Calibration.save() writes it: {error!r}") from error


def _parsed(path: Path) -> Any:
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptCheckpointError(f"{path}: is no JSON: {error}") from error
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION:
        raise CheckpointError(f"{path}: a calibration of version {version!r}; this release reads {VERSION}. Calibrate again")
    return content


def _register(data: Any) -> None:
    """Makes a saved declaration known; one that this process has keeps its own quantizer."""
    spec = serial.from_dict(data)
    known = find(spec.name)
    if known is None:
        register_format(spec)
    elif known.fingerprint != spec.fingerprint:
        raise FormatError(f"format {spec.name!r} of the calibration is declared otherwise in this process; calibrate again")


def _to_dict(entry: Calibrated) -> dict[str, Any]:
    sqnr = None if entry.packed is None else repr(entry.packed.sqnr)
    asked, scheme = register_scheme(entry.asked), register_scheme(entry.scheme)
    return {"layer": entry.layer, "asked": asked, "scheme": scheme, "transposed": entry.transposed, "shape": list(entry.shape),
            "digest": entry.digest, "sqnr_db": sqnr, "method": entry.method, "note": entry.note,
            "nearest": entry.nearest, "error": entry.error}  # fmt: skip


def _from_dict(name: str, data: Any, file: Any) -> Calibrated:
    asked, scheme, shape = scheme_of(data["asked"]), scheme_of(data["scheme"]), tuple(data["shape"])
    packed = None
    if data["sqnr_db"] is not None:
        missing = [p for p in scheme.format.part_names if f"{name}.{p}" not in file.keys()]
        if missing:
            raise MissingTensorError(f"{name}: {PLANES} has no plane {missing[0]!r}; save the calibration again")
        planes = [file.get_tensor(f"{name}.{p}") for p in scheme.format.part_names]
        try:
            check_planes(scheme.format, planes, *matrix_shape(shape, data["transposed"]))
        except QCompileError as error:
            raise CorruptCheckpointError(f"{name}: {error}") from error
        packed = Packed(planes, float(data["sqnr_db"]))
    return Calibrated(data["layer"], asked, scheme, bool(data["transposed"]), shape, packed, data["digest"], data["method"],
                      data["note"], data["nearest"], data["error"])  # fmt: skip
