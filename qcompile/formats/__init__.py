"""Weight formats: declarations, registry, reference and storage layout."""

from __future__ import annotations

import re

from ..errors import FormatError, UnknownFormatError
from . import codebook as _codebook
from . import float as _float
from . import gguf as _gguf
from . import integer as _integer
from .algebra import Affine, affine, gen_table, integer_gen, linear_gen
from .scheme import Scheme, activations_of, register_scheme, scheme_of
from .spec import ALL, ROW, SCALED, Codebook, FormatSpec, Part, Plane, scaled, symbols

__all__ = ["ALL", "BUILT_IN", "ROW", "SCALED", "Affine", "Codebook", "FormatSpec", "Part", "Plane",
           "REGISTRY", "Scheme", "activations_of", "affine",
           "find", "gen_table", "get", "integer_gen", "linear_gen", "names", "register_format", "register_scheme", "scaled",
           "scheme_of", "symbols"]  # fmt: skip

REGISTRY: dict[str, FormatSpec] = {}

_FAMILIES = (*_integer.FAMILIES, *_codebook.FAMILIES)


def register_format(spec: FormatSpec) -> FormatSpec:
    """Adds ``spec`` to the registry, so that policies can name it. Raises :class:`FormatError` when its value is not
    ``coeff * gen + offset``, or when another format has the name (in whatever case)."""
    affine(spec)
    known = find(spec.name)
    if known is not None and known.fingerprint != spec.fingerprint:
        raise FormatError(f"format {spec.name!r} is registered already with another declaration (as {known.name!r}); choose "
                          "another name")  # fmt: skip
    _asked_for.discard(spec.name)
    return REGISTRY.setdefault(spec.name, spec)


def find(name: str) -> FormatSpec | None:
    """The format ``name``: registered (upper and lower case alike), a family's with numbers of its own, like "int3_g96", or
    one of these with "_scaled" behind it; the last two are registered by asking. None if there is none."""
    if name in REGISTRY:
        return REGISTRY[name]
    folded = name.casefold()
    for known in REGISTRY:
        if known.casefold() == folded:
            return REGISTRY[known]
    if folded.endswith(SCALED) and (base := find(folded.removesuffix(SCALED))) is not None:
        return _asked(scaled(base))
    for pattern, make in _FAMILIES:
        if (match := re.fullmatch(pattern, folded)) and all(int(v) > 1 for v in match.groupdict().values()):
            return _asked(make(**{k: int(v) for k, v in match.groupdict().items()}))
    return None


def _asked(made: FormatSpec) -> FormatSpec:
    if made.name not in REGISTRY:
        _asked_for.add(made.name)
    return REGISTRY.setdefault(made.name, made)


_asked_for: set[str] = set()
"""Names of family members in the registry that nobody has registered."""


def names() -> list[str]:
    """The names to choose from: built in, or registered by users. Families have endless others."""
    return [name for name in REGISTRY if name not in _asked_for]


def get(name: str) -> FormatSpec:
    """The format ``name``. Raises :class:`UnknownFormatError` with the nearest names."""
    if (spec := find(name)) is None:
        raise UnknownFormatError(name, names())
    return spec


BUILT_IN = (*_integer.FORMATS, *_float.FORMATS, *_codebook.FORMATS, *_gguf.FORMATS)
"""The formats declared here; the registry also holds users' and those of families that were asked for."""

for _spec in BUILT_IN:
    register_format(_spec)
