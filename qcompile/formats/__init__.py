"""Weight formats: declarations, registry, reference and storage layout."""

from __future__ import annotations

from ..errors import FormatError, UnknownFormatError
from . import float as _float
from . import integer as _integer
from .algebra import Affine, affine
from .scheme import Scheme, register_scheme, scheme_of
from .spec import ROW, Codebook, FormatSpec, Plane, symbols

__all__ = ["ROW", "Affine", "Codebook", "FormatSpec", "Plane", "REGISTRY", "Scheme", "affine", "get", "register_format",
           "register_scheme", "scheme_of", "symbols"]  # fmt: skip

REGISTRY: dict[str, FormatSpec] = {}


def register_format(spec: FormatSpec) -> FormatSpec:
    """Adds ``spec`` to the registry, so that policies can name it. Raises :class:`FormatError` when its value is not
    ``coeff * gen + offset``, or when another format has the name."""
    affine(spec)
    if REGISTRY.setdefault(spec.name, spec).fingerprint != spec.fingerprint:
        raise FormatError(f"format {spec.name!r} is registered already with another declaration; choose another name")
    return spec


def get(name: str) -> FormatSpec:
    """The registered format ``name``. Raises :class:`UnknownFormatError` with the nearest names."""
    if name not in REGISTRY:
        raise UnknownFormatError(name, REGISTRY)
    return REGISTRY[name]


for _spec in (*_integer.FORMATS, *_float.FORMATS):
    register_format(_spec)
