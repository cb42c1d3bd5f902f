"""Packs weights, each once on a machine: what was packed before is read from the store."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from .errors import FingerprintError
from .formats import Scheme, huge_pages, reference
from .formats.layout import check_planes, empty_planes, matrix_shape
from .formats.spec import FormatSpec
from .store import code_version, count, the_store
from .tensor import QuantizedTensor, tensor_class

PLANES = "planes.safetensors"
BLOCK = 1 << 25
"""Bytes of a tensor that are brought to the host and digested at a time."""

Planes = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Packed:
    """A weight in its format's planes, and its signal-to-quantization-noise ratio in dB (None: on the meta device)."""

    planes: Planes
    sqnr: float | None

    def tensor(self, scheme: Scheme, transposed: bool, shape: Sequence[int], dtype: torch.dtype) -> QuantizedTensor:
        """The parameter's value: ``shape`` and ``dtype`` are those of the float one."""
        return tensor_class(scheme, transposed)(self.planes, shape, dtype)


@torch.no_grad()
def packed(
    weight: torch.Tensor, spec: FormatSpec, *, transposed: bool = False, layer: str = "weight", rounding: Any = "nearest",
    planes: Planes | None = None,
) -> Packed:  # fmt: skip
    """``weight`` ``[N, K]`` or ``[E, N, K]`` (``[…, K, N]`` if ``transposed``) in ``spec``, from the store if it holds it, which
    it does afterwards.

    ``planes``: those that a calibration found (None: round to nearest, or by the format's own quantizer). ``rounding`` tells
    the store how, in text, numbers and lists of them; None keeps nothing. Processes that need the same weight at the same
    time quantize it once.
    On the meta device there are planes without values, as of any weight there.
    Raises :class:`~qcompile.errors.WeightError`, naming ``layer``.
    """
    matrix = weight.detach().mT if transposed else weight.detach()
    if weight.is_meta:
        return Packed(empty_planes(spec, *matrix_shape(matrix.shape), weight.device), None)

    def make() -> Packed:
        made = planes if planes is not None else reference.quantize(spec, matrix, layer)
        return Packed(made, reference.sqnr(spec, made, matrix))

    try:
        parts = _parts(weight, spec, transposed, rounding)
    except FingerprintError:
        count("quantized")
        return make()
    with the_store().making("packed", parts) as slot:
        found = _read(slot.found, spec, matrix_shape(matrix.shape), weight.device) if slot.found is not None else None
        if found is None:
            found = make()
            slot.put(lambda folder: _write(folder, found, spec))
        return found


def known(
    weight: torch.Tensor, spec: FormatSpec, *, transposed: bool = False, rounding: Any = "nearest", mapped: bool = False
) -> Packed | None:
    """What :func:`packed` would read from the store; None where it would have to quantize. ``mapped``: on CPUs the planes
    are the file's own pages, which take no memory until they are read."""
    try:
        folder = the_store().find("packed", _parts(weight, spec, transposed, rounding))
    except FingerprintError:
        return None
    if folder is None:
        return None
    count("packed read")
    return _read(folder, spec, matrix_shape(weight.shape, transposed), weight.device, mapped)


def _parts(weight: torch.Tensor, spec: FormatSpec, transposed: bool, rounding: Any) -> dict[str, Any]:
    """Everything that decides the planes. Raises :class:`FingerprintError` where that cannot be told."""
    if rounding is None:
        raise FingerprintError(f"format {spec.name}: what the weight was rounded by has no fingerprint")
    return {
        "code": code_version("qcompile.formats", "qcompile.rounding"),
        "torch": torch.__version__,
        "device": weight.device.type,
        "format": f"{spec.name}@{spec.fingerprint}",
        "shrinks": spec.shrinks,
        "quantizer": _quantizer(spec),
        "rounding": rounding,
        "transposed": transposed,
        "shape": list(weight.shape),
        "dtype": str(weight.dtype),
        "weight": digest(weight),
    }


def _quantizer(spec: FormatSpec) -> str | None:
    if spec.quantizer is None:
        return None
    given = getattr(spec.quantizer, "fingerprint", None)
    if not isinstance(given, str):
        raise FingerprintError(f"format {spec.name}: what its quantizer does cannot be told from here, so weights are quantized "
                               "each time; give it an attribute `fingerprint`, a text that changes with its results")  # fmt: skip
    return given


def digest(tensor: torch.Tensor) -> str:
    """BLAKE3, 64 hex digits, of the values of ``tensor`` in row-major order: all weights are digested at every start, and it is
    three times as fast as SHA-256."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_meta:
        raise FingerprintError(f"a {type(tensor).__name__} on {tensor.device} has no values of its own, and so no fingerprint")
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)

    found = blake3()
    for start in range(0, flat.numel(), BLOCK):
        found.update(flat[start : start + BLOCK].cpu().numpy().data)
    return found.hexdigest()


def _write(folder: Path, made: Packed, spec: FormatSpec) -> None:
    from safetensors.torch import save_file

    names = dict(zip(spec.part_names, made.planes, strict=True))
    save_file({n: p.contiguous() for n, p in names.items()}, folder / PLANES, {"sqnr_db": json.dumps(made.sqnr)})


def _read(
    folder: Path, spec: FormatSpec, shape: Sequence[int], device: torch.device, mapped: bool = False
) -> Packed | None:
    """Planes of a matrix of ``shape`` (N, K), in memory of their own unless ``mapped``; None if another process has dropped the
    entry.

    Raises :class:`~qcompile.errors.LayoutError` for planes that do not fit.
    """
    from safetensors import safe_open

    try:
        with safe_open(folder / PLANES, "pt") as file:  # type: ignore[no-untyped-call]
            planes = [_placed(file.get_tensor(name), device, mapped) for name in spec.part_names]
            sqnr = json.loads(file.metadata()["sqnr_db"])
    except FileNotFoundError:
        return None
    n, k = shape
    check_planes(spec, planes, n, k)
    return Packed(planes, sqnr)


def _placed(stored: torch.Tensor, device: torch.device, mapped: bool) -> torch.Tensor:
    """On ``device``. A copy out of the mapped file starts at a cache line, which kernels read fastest, and needs no file."""
    if device.type != "cpu":
        return stored.to(device)
    return stored if mapped else huge_pages.copy(stored)
