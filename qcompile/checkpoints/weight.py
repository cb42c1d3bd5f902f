"""What every reader says of a checkpoint: for each parameter, which tensors of the file it is made of, and how."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import sympy
import torch

from ..errors import CorruptCheckpointError
from ..formats import Codebook, FormatSpec, Plane, Scheme
from ..formats.layout import by_plane, unpack_plane
from ..formats.reference import tile_rows
from ..plan import Plan
from .files import Stored, TensorFiles


@dataclass(frozen=True)
class Weight:
    """One parameter of a checkpoint, not read yet.

    ``shape`` is the float tensor's, or (N, K) of a packed weight; ``sources`` are the tensors of the file that it is made
    of. ``read()`` gives the float tensor, or with a ``scheme`` the stored planes of the weight: copies that do not need the
    file any more. ``transposed``: the parameter is [K, N]. ``dtype`` is what the parameter had where it was saved (None: the
    file does not say).
    """

    shape: tuple[int, ...]
    sources: tuple[Stored, ...]
    read: Callable[[], torch.Tensor | list[torch.Tensor]]
    scheme: Scheme | None = None
    transposed: bool = False
    dtype: torch.dtype | None = None

    def release(self) -> None:
        """Lets go of the file's pages."""
        for source in self.sources:
            source.release()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was opened and checked: what holds each parameter, and what the file says beside them.

    ``kind`` names the layout; ``config`` is the model's configuration as JSON types (None: the file has none); ``used`` names
    tensors that readers have accounted for without a parameter, with the reason; ``tied`` maps further names of a parameter
    to the name it is stored under. ``named(parameters)`` gives the names in ``weights`` of a model's parameters, where they are
    others (None: they are the same); ``adjust(model)`` changes what no parameter holds, once all are in place.
    """

    kind: str
    weights: Mapping[str, Weight]
    config: Mapping[str, object] | None = None
    used: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    plan: Plan | None = None
    adjust: Callable[[torch.nn.Module], None] | None = None
    named: Callable[[list[str]], dict[str, str]] | None = None


def plain(stored: Stored) -> Weight:
    """A tensor that is a parameter as it is."""
    return Weight(stored.shape, (stored,), lambda: stored.read().clone())


LayerReader = Callable[[str, Mapping[str, Stored]], Weight]
"""(name of a layer, its tensors by the end of their names) → its weight."""

ACTIVATIONS = "describes activations or a cache, which stay in the model's dtype"
SPARE = dict.fromkeys(
    ("input_scale", "input_zero_point", "input_global_scale", "input_scale_ub", "output_scale", "output_zero_point", "k_scale",
     "v_scale", "q_scale", "prob_output_scale", "activation_scale"), ACTIVATIONS,
)  # fmt: skip
"""Ends of names of tensors that no weight is made of, and what they are."""


def by_layer(
    kind: str, files: TensorFiles, marks: Iterable[str], ends: Iterable[str], reader: LayerReader,
    spare: Mapping[str, str] = SPARE,
) -> Checkpoint:  # fmt: skip
    """A checkpoint in which a packed layer is several tensors.

    A layer is packed if it has one of the tensors ``layer.mark``; then all its tensors with a name in ``ends`` make the weight
    ``layer.weight``. Tensors that end in a name of ``spare`` are set aside, all others are parameters as they are.
    """
    longest = sorted({*ends, *marks}, key=lambda end: -len(end))
    layers: dict[str, dict[str, Stored]] = {
        name[: -len(mark) - 1]: {} for mark in marks for name in files.tensors if name.endswith(f".{mark}")
    }
    weights: dict[str, Weight] = {}
    used: dict[str, str] = {}
    for name, stored in files.tensors.items():
        end = next((e for e in longest if name.endswith(f".{e}") and name[: -len(e) - 1] in layers), None)
        if end is not None:
            layers[name[: -len(end) - 1]][end] = stored
        elif name.rpartition(".")[2] in spare:
            used[name] = spare[name.rpartition(".")[2]]
        else:
            weights[name] = plain(stored)
    for layer, parts in layers.items():
        if f"{layer}.weight" in weights:
            raise CorruptCheckpointError(f"{layer}.weight: is in the file both packed and by itself")
        weights[f"{layer}.weight"] = reader(layer, parts)
    return Checkpoint(kind, weights, used=used)


def part(layer: str, parts: Mapping[str, Stored], end: str) -> Stored:
    """The tensor ``layer.end``. Raises :class:`CorruptCheckpointError` if the layer has none."""
    if end not in parts:
        found = ", ".join(sorted(parts))
        raise CorruptCheckpointError(f"{layer}.{end}: not in the file, though the layer has {found}; download it again")
    return parts[end]


def rows_of(spec: FormatSpec, planes: Sequence[torch.Tensor], start: int, count: int) -> dict[str, torch.Tensor]:
    """The inverse: entries of rows ``start`` … (a multiple of 16), repeated where rows share them."""
    grouped = by_plane(spec, tile_rows(spec, planes, start, count))
    return {p.name: unpack_plane(p, grouped[p.name], count) for p in spec.planes}


def finite(name: str, scales: torch.Tensor) -> torch.Tensor:
    """``scales``, if none is NaN or infinite. Raises :class:`CorruptCheckpointError` naming the tensor."""
    if not torch.isfinite(scales).all():
        raise CorruptCheckpointError(f"{name}: scales have NaN or infinite values; the file is damaged, download it again")
    return scales


def valid_scales(name: str, spec: FormatSpec, planes: list[torch.Tensor]) -> list[torch.Tensor]:
    """``planes``, if no scale that a table gives is NaN or infinite. Raises :class:`CorruptCheckpointError` naming the tensor."""
    for stored, plane in zip(spec.parts, planes, strict=False):
        if not stored.plane.is_code and stored.plane.is_integer and (book := _book_of(spec, stored.plane)) is not None:
            valid_codes(f"{name} (plane {stored.name})", plane, book)
    return planes


def _book_of(spec: FormatSpec, plane: Plane) -> Codebook | None:
    """The table of scales that a plane indexes."""
    calls = [f for f in spec.value.atoms(sympy.Function) if plane.name in {s.name for s in f.free_symbols}]
    return spec.codebook(calls[0].func.__name__) if calls else None


def not_finite(book: Codebook) -> tuple[int, ...]:
    """The codes that ``book`` has no finite value for."""
    return tuple(code for code, value in enumerate(book.values) if not math.isfinite(value))


def valid_codes(name: str, codes: torch.Tensor, book: Codebook) -> torch.Tensor:
    """``codes`` (bytes), if ``book`` has a finite value for each. Raises :class:`CorruptCheckpointError` naming the tensor."""
    raw = codes.view(torch.uint8)
    if any((raw == code).any() for code in not_finite(book)):
        raise CorruptCheckpointError(f"{name}: has {book.name} codes that are NaN or infinite; the file is damaged")
    return codes
