"""Layers that a search decides on, and the formats that each may be stored in."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..comparison import arguments
from ..errors import CompareError, PolicyError
from ..formats import Scheme, get
from ..formats.layout import matrix_shape
from ..options import Options
from ..passes.trace_ahead import conversions_of
from ..plan import Site
from ..recorder import Recorder
from ..rules import scheme_from
from ..tensor import QuantizedTensor, quantize
from ..timing import seconds

LADDER = ("int2_g64", "Q2_K", "int3_g64", "Q3_K", "int4_g64", "IQ4_XS", "Q4_K", "int5_g64", "Q5_K", "int6_g64", "Q6_K", "int8")
"""By accuracy. Where a layer's rows are padded a format can take more bytes than one below it, which is then left out there."""

FLOAT = "float"
LOOK = "int8"
"""A policy that means every layer that can be packed."""


@dataclass(frozen=True)
class Layer:
    """A weight to decide on: its ``parameter``'s name in the model, and the ``site`` that rules speak of. A tied weight is one
    layer."""

    parameter: str
    site: Site
    float_bytes: int

    @property
    def weights(self) -> int:
        return math.prod(self.site.shape)

    def nbytes(self, scheme: Scheme | None) -> int:
        """Stored bytes, padding included."""
        return self.float_bytes if scheme is None else scheme.format.nbytes(*matrix_shape(self.site.shape))

    def packed(self, model: nn.Module, scheme: Scheme) -> QuantizedTensor:
        """Raises :class:`~qcompile.errors.WeightError`, naming the layer."""
        original = model.get_parameter(self.parameter)
        return quantize(original, scheme, transposed=self.site.transposed, layer=self.site.name)


def layers_of(model: nn.Module, item: Any) -> list[Layer]:
    """Every weight that the backend could pack on the call ``item``, in the order of the graph.

    Raises :class:`~qcompile.errors.CompareError` where there is none, or the model is packed already.
    """
    packed = [n for n, p in model.named_parameters() if isinstance(p, QuantizedTensor)]
    if packed:
        raise CompareError(f"{packed[0]!r} and {len(packed) - 1} others are packed already; search needs the float model")
    recorder = Recorder()
    found = conversions_of(model, Options.parse({"policy": LOOK}, None), recorder, *arguments(item))
    names = {id(p): n for n, p in model.named_parameters()}
    sites = {site.key: site for site in recorder.sites()}
    layers = []
    for conversion in found:
        parameter = conversion.slots[0].get()
        site = next(s for s in sites.values() if s.name == conversion.layer and s.is_packable and s.weight is not None)
        if parameter is not None and id(parameter) in names:
            layers.append(Layer(names[id(parameter)], site, parameter.nbytes))
    if not layers:
        left = {r.decision.site.name: r.decision.reason for r in recorder.plan}
        raise CompareError(f"no layer of {type(model).__name__} can be packed on this call: {left or 'no site was found'}")
    return layers


def schemes_of(formats: Iterable[Any] | None, layer: Layer) -> list[Scheme | None]:
    """The candidates of one layer, floating point among them: all ``formats`` that a user named, or the default ladder.

    Raises :class:`~qcompile.errors.UnknownFormatError`, and :class:`~qcompile.errors.PolicyError` for one that comes twice.
    """
    if formats is not None:
        if isinstance(formats, str):
            raise PolicyError(f"formats={formats!r}: expected a list of formats' names, Schemes or FormatSpecs")
        given = [scheme_from("formats", f) for f in formats]
        if len(set(given)) < len(given) or not given:
            raise PolicyError(f"formats={list(formats)!r}: expected at least one format, each once")
        return given
    kept: list[Scheme | None] = [None]
    smallest = layer.float_bytes
    for name in reversed(LADDER):
        scheme = Scheme(get(name))
        if (size := layer.nbytes(scheme)) < smallest:
            kept.append(scheme)
            smallest = size
    return kept[::-1]


class Times:
    """Seconds of one token through a layer, or one expert of it, by the layer's kernel; layers of one shape and dtype are timed
    once."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known: dict[object, float] = {}

    def __call__(self, layer: Layer, scheme: Scheme | None) -> float:
        weight = self._model.get_parameter(layer.parameter)
        kind = (layer.site.shape, layer.site.transposed, weight.dtype, weight.device, scheme)
        if kind not in self._known:
            stored: torch.Tensor = weight.detach() if scheme is None else layer.packed(self._model, scheme)
            stored = stored[0] if stored.dim() == 3 else stored
            matrix = stored.t() if layer.site.transposed else stored
            x = torch.randn(1, layer.site.shape[-1], device=weight.device).to(weight.dtype)
            self._known[kind] = seconds(functools.partial(F.linear, x, matrix), weight.device)
        return self._known[kind]
